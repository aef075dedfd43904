//! The main thread's loop: device events (console input, clock alarms), stop requests and signals.
//!
//! It sleeps in epoll without a time-out; nothing wakes it while the guest is idle.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use event_manager::{EventManager, EventOps, EventSubscriber, Events, SubscriberId, SubscriberOps};
use log::{error, info};
use vmm_sys_util::epoll::EventSet;

use crate::control::{Control, StopReason};
use crate::orders::Orders;
use crate::remedy::remedy;

/// A device with descriptors to watch.
pub type Subscriber = Arc<dyn EventSubscriber + Send + Sync>;

/// The loop could not be set up or broke down.
#[derive(Debug, thiserror::Error)]
#[error("the main thread cannot wait for events: {cause}; {remedy}")]
pub struct EventLoopError {
    cause: String,
    remedy: &'static str,
}

impl From<event_manager::Error> for EventLoopError {
    fn from(error: event_manager::Error) -> Self {
        let remedy = match &error {
            event_manager::Error::Epoll(e) => remedy(&io::Error::from_raw_os_error(e.errno())),
            _ => "this is a defect, please report it",
        };
        Self { cause: error.to_string(), remedy }
    }
}

/// Signals that end the VMM in an orderly way, turned into events for its whole life.
#[derive(Debug)]
pub struct Signals {
    pipes: Vec<(i32, UnixStream)>,
}

impl Signals {
    /// What becomes readable when a signal has arrived.
    pub fn descriptors(&self) -> impl Iterator<Item = &UnixStream> {
        self.pipes.iter().map(|(_, pipe)| pipe)
    }

    /// Takes the signals over, but for a SIGHUP that is ignored: whoever started us wants it so (`nohup`). SIGINT is taken
    /// even so, because a shell script that starts us in the background ignores it, and means nothing by that.
    pub fn install() -> io::Result<Self> {
        let mut pipes = Vec::new();
        let ignored = ignored(&std::fs::read_to_string("/proc/self/status").unwrap_or_default());
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            if signal == libc::SIGHUP && ignored & 1 << (signal - 1) != 0 {
                info!("SIGHUP was ignored when this process began, and stays so");
                continue;
            }
            let (read, write) = UnixStream::pair()?;
            read.set_nonblocking(true)?;
            signal_hook::low_level::pipe::register(signal, write)?;
            pipes.push((signal, read));
        }
        Ok(Self { pipes })
    }

    /// A signal that has arrived, if any.
    pub fn pending(&self) -> Option<i32> {
        self.pipes
            .iter()
            .find(|(_, pipe)| {
                let mut reader: &UnixStream = pipe;
                matches!(reader.read(&mut [0; 16]), Ok(count) if count > 0)
            })
            .map(|(signal, _)| *signal)
    }
}

/// The ignored signals of a process, from its status (proc_pid_status(5)): bit 0 is signal 1.
fn ignored(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// Watches the signals for one machine.
struct SignalSubscriber {
    signals: Arc<Signals>,
    control: Arc<Control>,
}

impl EventSubscriber for SignalSubscriber {
    fn process(&self, _events: Events, _ops: &mut EventOps<'_>) {
        if let Some(signal) = self.signals.pending() {
            info!("signal {signal}: the machine stops");
            self.control.stop(StopReason::Signal(signal));
        }
    }

    fn init(&self, ops: &mut EventOps<'_>) {
        for (_, pipe) in &self.signals.pipes {
            if let Err(e) = ops.add(Events::new(pipe, EventSet::IN)) {
                error!("signals cannot be watched: {e}");
            }
        }
    }
}

/// Ends a wait when a stop is asked for, or an operator wants something.
struct WaitEnder {
    control: Arc<Control>,
    orders: Arc<Orders>,
}

impl EventSubscriber for WaitEnder {
    fn process(&self, _events: Events, _ops: &mut EventOps<'_>) {}

    fn init(&self, ops: &mut EventOps<'_>) {
        let added = ops
            .add(Events::new(self.control.event(), EventSet::IN))
            .and_then(|()| ops.add(Events::new(self.orders.event(), EventSet::IN)));
        if let Err(e) = added {
            error!("stop requests and orders cannot be watched: {e}");
        }
    }
}

/// Why the loop has been left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The machine is to stop.
    Stop(StopReason),
    /// There are orders to carry out; the loop goes on after that.
    Orders,
    /// The guest has let go of devices, or does not; the loop goes on after that.
    Releases,
}

/// The loop of one machine.
pub struct EventLoop {
    manager: EventManager<Subscriber>,
    control: Arc<Control>,
    orders: Arc<Orders>,
    subscribers: Vec<SubscriberId>,
}

impl EventLoop {
    /// Watches `control`, `orders`, `signals` and the devices.
    pub fn new(
        control: Arc<Control>,
        orders: Arc<Orders>,
        signals: Arc<Signals>,
        devices: Vec<Subscriber>,
    ) -> Result<Self, EventLoopError> {
        let mut manager = EventManager::<Subscriber>::new()?;
        let mut subscribers = vec![
            manager.add_subscriber(Arc::new(WaitEnder {
                control: Arc::clone(&control),
                orders: Arc::clone(&orders),
            })),
            manager.add_subscriber(Arc::new(SignalSubscriber { signals, control: Arc::clone(&control) })),
        ];
        subscribers.extend(devices.into_iter().map(|device| manager.add_subscriber(device)));
        Ok(Self { manager, control, orders, subscribers })
    }

    /// Runs until something asks for a stop or there are orders.
    pub fn run(&mut self) -> Result<Outcome, EventLoopError> {
        loop {
            if let Some(reason) = self.control.reason() {
                return Ok(Outcome::Stop(reason));
            }
            if self.control.wants_attention() {
                return Ok(Outcome::Releases);
            }
            if self.orders.are_waiting() {
                return Ok(Outcome::Orders);
            }
            match self.manager.run() {
                Ok(_) => {}
                Err(event_manager::Error::Epoll(e)) if e.errno() == libc::EINTR => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        // The devices outlive the loop when the machine is rebuilt; their descriptors must leave this epoll.
        for id in self.subscribers.drain(..) {
            if let Err(e) = self.manager.remove_subscriber(id) {
                error!("an event subscriber cannot be removed: {e}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_from_the_status() {
        let status = "SigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000004002\n";
        let mask = ignored(status);
        assert_ne!(mask & 1 << (libc::SIGHUP - 1), 0);
        assert_eq!(mask & 1 << (libc::SIGINT - 1), 0);
        assert_eq!(ignored(""), 0);
    }
}
