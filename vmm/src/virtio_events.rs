//! News of virtio devices on their way to operators: Cloud Hypervisor's events `activated` and `reset`.
//!
//! A guest can start and reset a device thousands of times in a second. Events that it provokes would fill the file that they are written to, or push
//! others out of a reader's pipe. So each device has an allowance, which outlives reboots: some events at once, which is more than firmware, boot loader
//! and operating system need, and then one every few seconds. What is held back is counted in the next event that is told, and the log says so once.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use devices::virtio::life::LifeSink;
use log::warn;

use crate::events::{Events, Properties};

/// Events of one device that may come at once.
const BURST: u32 = 20;
/// How long it takes until there may be one more.
const REFILL: Duration = Duration::from_secs(5);

/// How many events there may be of one device.
#[derive(Debug)]
pub struct Allowance(Mutex<Purse>);

#[derive(Debug)]
struct Purse {
    left: u32,
    /// When `left` was last added to; at some time before the first event.
    filled: Option<Instant>,
    held_back: u64,
    complained: bool,
}

/// What becomes of an event.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// It is told, and that so many before it were not.
    Tell { left_out: u64 },
    /// It is not told.
    HoldBack { for_the_first_time: bool },
}

impl Default for Allowance {
    fn default() -> Self {
        Self(Mutex::new(Purse { left: BURST, filled: None, held_back: 0, complained: false }))
    }
}

impl Allowance {
    fn ask(&self, now: Instant) -> Verdict {
        let mut purse = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let filled = *purse.filled.get_or_insert(now);
        let earned = now.saturating_duration_since(filled).as_secs() / REFILL.as_secs();
        let earned = u32::try_from(earned).unwrap_or(u32::MAX);
        purse.left = purse.left.saturating_add(earned).min(BURST);
        // What has been waited for beyond that counts for the next, but for a purse that is full.
        let until = REFILL.checked_mul(earned).and_then(|time| filled.checked_add(time));
        purse.filled = if purse.left == BURST { Some(now) } else { until.or(Some(now)) };
        if purse.left == 0 {
            purse.held_back = purse.held_back.saturating_add(1);
            return Verdict::HoldBack { for_the_first_time: !std::mem::replace(&mut purse.complained, true) };
        }
        purse.left -= 1;
        Verdict::Tell { left_out: std::mem::take(&mut purse.held_back) }
    }
}

/// Tells of one device in one machine.
#[derive(Debug)]
pub struct LifeTeller {
    id: String,
    events: Events,
    allowance: Arc<Allowance>,
}

impl LifeTeller {
    /// For the device that the operator calls `id`.
    pub fn new(id: &str, events: Events, allowance: Arc<Allowance>) -> Self {
        Self { id: id.to_owned(), events, allowance }
    }

    fn tell(&self, event: &'static str) {
        if !self.events.are_heard() {
            return;
        }
        match self.allowance.ask(Instant::now()) {
            Verdict::Tell { left_out } => {
                let mut properties: Properties = [("id", self.id.clone())].into();
                if left_out > 0 {
                    properties.insert("left_out", left_out.to_string());
                }
                self.events.tell_with("virtio-device", event, properties);
            }
            Verdict::HoldBack { for_the_first_time: true } => warn!(
                target: &self.id,
                "device {}: the guest starts and resets it again and again; of these events one is told every {} s",
                self.id,
                REFILL.as_secs()
            ),
            Verdict::HoldBack { .. } => {}
        }
    }
}

impl LifeSink for LifeTeller {
    fn activated(&self) {
        self.tell("activated");
    }

    fn reset(&self) {
        self.tell("reset");
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{self, Read};
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::events::Monitor;

    #[test]
    fn after_a_burst_there_is_one_event_for_each_period_and_it_counts_the_others() {
        let (allowance, start) = (Allowance::default(), Instant::now());
        let told = |now| matches!(allowance.ask(now), Verdict::Tell { .. });
        assert_eq!((0..1000).filter(|_| told(start)).count(), 20);
        assert_eq!(allowance.ask(start), Verdict::HoldBack { for_the_first_time: false });
        // A day of a guest that does nothing else, ten times in a second.
        let day = (1..864_000).filter(|tenth| told(start + Duration::from_millis(100) * *tenth)).count();
        assert_eq!(day, 24 * 60 * 60 / 5 - 1);
        // It is quiet for long, and has earned no more than what it began with.
        let later = start + Duration::from_secs(1_000_000);
        assert_eq!(allowance.ask(later), Verdict::Tell { left_out: 49 });
        assert_eq!((0..1000).filter(|_| told(later)).count(), 19);
        assert_eq!(allowance.ask(later + REFILL), Verdict::Tell { left_out: 981 });
    }

    #[test]
    fn the_log_has_one_line_of_a_device_whatever_its_guest_does() {
        let (allowance, start) = (Allowance::default(), Instant::now());
        let verdicts = (0..10_000).map(|second| allowance.ask(start + Duration::from_millis(second * 50)));
        let lines = verdicts.filter(|verdict| *verdict == Verdict::HoldBack { for_the_first_time: true });
        assert_eq!(lines.count(), 1);
    }

    #[test]
    fn what_one_device_does_leaves_room_for_the_events_of_others_though_nobody_reads() {
        let (mut reader, writer) = io::pipe().unwrap();
        let monitor = Monitor::start(File::from(OwnedFd::from(writer)), Instant::now()).unwrap();
        let teller = |id| LifeTeller::new(id, monitor.events().clone(), Arc::default());
        let (wild, tame) = (teller("_disk0"), teller("__rng"));
        let started = Instant::now();
        for _ in 0..500_000 {
            wild.activated();
            wild.reset();
        }
        tame.activated();
        monitor.events().tell("vm", "shutdown");
        drop((wild, tame));
        drop(monitor);
        let most = 20 + started.elapsed().as_secs() / 5 + 1;
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let events: Vec<serde_json::Value> =
            text.trim_end().split("\n\n").map(|part| serde_json::from_str(part).unwrap()).collect();
        let of = |id: &str| events.iter().filter(|event| event["properties"]["id"] == id).count() as u64;
        assert!((20..=most).contains(&of("_disk0")), "{text}");
        assert_eq!(of("__rng"), 1);
        assert_eq!(events[0]["source"], "virtio-device");
        assert_eq!((&events[0]["event"], &events[1]["event"]), (&"activated".into(), &"reset".into()));
        assert_eq!(events.last().unwrap()["event"], "shutdown");
    }
}
