//! The event monitor: what happens to the machine, told to a file or pipe in Cloud Hypervisor's form.
//!
//! Each event is a pretty-printed JSON object and an empty line. Whoever tells an event never waits: a thread writes, to a
//! descriptor that does not block, and a reader that does not read loses events, as it always has. `device-power` is Dormouse's own.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use log::debug;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use serde::Serialize;

/// Events on their way to the writer.
const QUEUE: usize = 1024;
/// Stack of the writer.
const STACK_BYTES: usize = 128 << 10;

/// What an event says beside its name.
pub type Properties = BTreeMap<&'static str, String>;

#[derive(Debug, Serialize)]
struct Event {
    timestamp: Timestamp,
    source: &'static str,
    event: &'static str,
    properties: Option<Properties>,
}

/// Time since the VMM started.
#[derive(Debug, Serialize)]
struct Timestamp {
    secs: u64,
    nanos: u32,
}

/// Takes events; a clone takes them to the same place. Without a monitor they go nowhere.
#[derive(Clone, Debug)]
pub struct Events {
    start: Instant,
    queue: Option<Arc<Mutex<Option<SyncSender<Event>>>>>,
}

/// The writer's thread.
#[derive(Debug)]
pub struct Monitor {
    events: Events,
    thread: Option<JoinHandle<()>>,
}

impl Events {
    /// Events that go nowhere.
    pub fn nowhere(start: Instant) -> Self {
        Self { start, queue: None }
    }

    /// Something has happened.
    pub fn tell(&self, source: &'static str, event: &'static str) {
        self.send(source, event, None);
    }

    /// Something has happened, and there is more to say of it.
    pub fn tell_with(&self, source: &'static str, event: &'static str, properties: Properties) {
        self.send(source, event, Some(properties));
    }

    /// Whether anybody listens.
    pub fn are_heard(&self) -> bool {
        self.queue.is_some()
    }

    fn send(&self, source: &'static str, event: &'static str, properties: Option<Properties>) {
        let Some(queue) = &self.queue else { return };
        let since = self.start.elapsed();
        let timestamp = Timestamp { secs: since.as_secs(), nanos: since.subsec_nanos() };
        let queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = &*queue
            && queue.try_send(Event { timestamp, source, event, properties }).is_err()
        {
            debug!("an event is lost: {source} {event}");
        }
    }
}

impl Monitor {
    /// Writes to `file` from a thread of its own.
    pub fn start(file: File, start: Instant) -> io::Result<Self> {
        let flags = fcntl_getfl(&file)?;
        fcntl_setfl(&file, flags | OFlags::NONBLOCK)?;
        let (sender, receiver) = sync_channel(QUEUE);
        let thread = thread::Builder::new()
            .name("event-monitor".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || write_all(&receiver, file))?;
        let events = Events { start, queue: Some(Arc::new(Mutex::new(Some(sender)))) };
        Ok(Self { events, thread: Some(thread) })
    }

    /// Where to tell events.
    pub fn events(&self) -> &Events {
        &self.events
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // The writer ends when it has written what has been told so far; it never waits for its reader.
        if let Some(queue) = &self.events.queue {
            drop(queue.lock().unwrap_or_else(PoisonError::into_inner).take());
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            debug!("the event monitor's thread has panicked");
        }
    }
}

fn write_all(events: &Receiver<Event>, mut file: File) {
    for event in events {
        let Ok(mut text) = serde_json::to_string_pretty(&event) else { continue };
        text.push_str("\n\n");
        // In one write, which a pipe takes whole or not at all.
        if let Err(e) = file.write_all(text.as_bytes()) {
            debug!("an event is not written: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn events_have_the_form_that_clients_parse() {
        let (mut reader, writer) = io::pipe().unwrap();
        let monitor = Monitor::start(File::from(std::os::fd::OwnedFd::from(writer)), Instant::now()).unwrap();
        monitor.events().tell("vm", "booted");
        monitor.events().tell_with("vm", "device-removed", [("id", "gpu0".to_owned())].into());
        drop(monitor);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert!(text.ends_with("}\n\n"), "{text:?}");
        let parts: Vec<_> = text.trim_end().split("\n\n").collect();
        let events: Vec<serde_json::Value> =
            parts.iter().map(|part| serde_json::from_str(part).unwrap()).collect();
        assert_eq!(events.len(), 2);
        assert!(parts[0].starts_with("{\n  \"timestamp\": {\n    \"secs\": 0,"), "{}", parts[0]);
        assert_eq!((&events[0]["source"], &events[0]["event"]), (&"vm".into(), &"booted".into()));
        assert!(events[0]["properties"].is_null());
        assert_eq!(events[1]["properties"]["id"], "gpu0");
    }

    #[test]
    fn a_reader_that_does_not_read_holds_nobody_up() {
        let (reader, writer) = io::pipe().unwrap();
        let monitor = Monitor::start(File::from(std::os::fd::OwnedFd::from(writer)), Instant::now()).unwrap();
        let started = Instant::now();
        for _ in 0..5000 {
            monitor.events().tell("vm", "paused");
        }
        drop(monitor);
        assert!(started.elapsed().as_secs() < 5);
        drop(reader);
    }
}
