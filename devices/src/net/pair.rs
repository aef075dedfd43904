//! A pair of queues and the thread that serves it.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use log::warn;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::receive::{self, Receiver};
use super::shared::Shared;
use super::transmit::{self, Sender};
use crate::rate_limit::Limiter;
use crate::virtio::device::{DeviceError, Interrupt};
use crate::virtio::queue::ActiveQueue;
use crate::virtio::worker::{Event, Handler, Watch};

/// Tokens of the worker's descriptors.
const TAP: u32 = 0;
const RECEIVE_TIMER: u32 = 1;
const SEND_TIMER: u32 = 2;

/// A timer of a rate limit; set only while something waits for it.
struct Timer(TimerFd);

impl Timer {
    fn new(limiter: Option<&Arc<Limiter>>) -> Result<Option<Self>, DeviceError> {
        let failed = |e: vmm_sys_util::errno::Error| DeviceError::host("a timer for a rate limit")(e.into());
        limiter.map(|_| TimerFd::new().map(Self).map_err(failed)).transpose()
    }

    fn set(timer: &mut Option<Self>, wait: Duration) -> Result<(), DeviceError> {
        let Some(Self(timer)) = timer else { return Ok(()) };
        // An interval of nothing would switch it off.
        let wait = wait.max(Duration::from_micros(50));
        timer.reset(wait, None).map_err(|e| DeviceError::host("setting a rate limit's timer")(e.into()))
    }

    /// Its time has come: nothing more is to be read from it.
    fn take(timer: &mut Option<Self>) {
        if let Some(Self(timer)) = timer {
            let _ = timer.wait();
        }
    }
}

/// What a pair of queues works on.
pub struct PairSpec {
    /// Its number.
    pub number: u16,
    /// For the log.
    pub device: String,
    /// The tap's file.
    pub file: Arc<File>,
    /// To the guest.
    pub receive: ActiveQueue,
    /// From it.
    pub send: ActiveQueue,
    /// Limits of either way, shared by all pairs.
    pub limiters: [Option<Arc<Limiter>>; 2],
    /// Whether a packet may take several buffers.
    pub mergeable: bool,
}

/// A pair of queues at work.
pub struct QueuePair {
    number: u16,
    device: String,
    file: Arc<File>,
    shared: Arc<Shared>,
    interrupt: Arc<dyn Interrupt>,
    receiver: Receiver,
    sender: Sender,
    receive_timer: Option<Timer>,
    send_timer: Option<Timer>,
    /// What the tap is watched for; not at all if nothing.
    watched: EventSet,
    /// Whether packets can be taken from the tap when there are some.
    listens: bool,
    /// Whether packets wait for the tap to take them.
    full: bool,
    /// Whether the tap has gone.
    gone: bool,
}

impl QueuePair {
    /// Ready to be served.
    ///
    /// # Errors
    /// No descriptor is left for a timer.
    pub fn new(spec: PairSpec, shared: &Arc<Shared>) -> Result<Self, DeviceError> {
        let [receive_limiter, send_limiter] = spec.limiters;
        Ok(Self {
            number: spec.number,
            device: spec.device,
            shared: Arc::clone(shared),
            interrupt: Arc::clone(spec.receive.interrupt()),
            receive_timer: Timer::new(receive_limiter.as_ref())?,
            send_timer: Timer::new(send_limiter.as_ref())?,
            receiver: Receiver::new(
                spec.receive,
                Arc::clone(&spec.file),
                Arc::clone(shared),
                receive_limiter,
                spec.mergeable,
            ),
            sender: Sender::new(spec.send, Arc::clone(&spec.file), Arc::clone(shared), send_limiter),
            file: spec.file,
            watched: EventSet::empty(),
            listens: false,
            full: false,
            gone: !shared.has_link(),
        })
    }

    fn in_use(&self) -> bool {
        self.number < self.shared.pairs()
    }

    fn receive(&mut self) -> Result<(), DeviceError> {
        self.listens = false;
        if self.gone || !self.in_use() {
            return Ok(());
        }
        match self.receiver.run()? {
            receive::Pause::Drained => self.listens = true,
            receive::Pause::NoBuffers => {}
            receive::Pause::Limited(wait) => Timer::set(&mut self.receive_timer, wait)?,
            // The tap is still readable, or there is a packet that waits.
            receive::Pause::Turn => self.receiver.queue().ring_own_doorbell(),
            receive::Pause::Gone => self.lose_tap(),
        }
        Ok(())
    }

    fn send(&mut self) -> Result<(), DeviceError> {
        self.full = false;
        match self.sender.run()? {
            transmit::Pause::Drained => {}
            transmit::Pause::Full => self.full = true,
            transmit::Pause::Limited(wait) => Timer::set(&mut self.send_timer, wait)?,
            transmit::Pause::Turn => self.sender.queue().ring_own_doorbell(),
        }
        if self.sender.is_gone() {
            self.lose_tap();
        }
        Ok(())
    }

    /// The tap has gone for good: the guest is told that the link is down, and what it sends is dropped.
    fn lose_tap(&mut self) {
        self.gone = true;
        self.listens = false;
        self.sender.set_gone();
        if self.shared.cut_link() {
            warn!(
                "{}: the tap has gone: the guest's link is down; remove the device and add it again",
                self.device
            );
            self.interrupt.config();
        }
    }

    /// Something is wrong with the tap's file.
    fn tap_error(&mut self) -> Result<(), DeviceError> {
        if !self.in_use() {
            // The kernel reports a file that is detached from the tap so.
            return Ok(());
        }
        self.receive()?;
        if !self.gone {
            self.lose_tap();
        }
        // What waits for the tap need not wait any more.
        if self.full { self.send() } else { Ok(()) }
    }

    /// Watches the tap for what is waited for, and not at all if nothing is: an error would be reported over and over.
    fn watch_tap(&mut self, watch: &Watch) -> Result<(), DeviceError> {
        let mut wanted = EventSet::empty();
        if !self.gone && self.in_use() {
            wanted.set(EventSet::IN, self.listens);
            wanted.set(EventSet::OUT, self.full);
        }
        if wanted == self.watched {
            return Ok(());
        }
        let file = &*self.file;
        let result = if wanted.is_empty() {
            watch.remove(file)
        } else if self.watched.is_empty() {
            watch.add(file, wanted, TAP)
        } else {
            watch.change(file, wanted, TAP)
        };
        result.map_err(DeviceError::host("watching the tap"))?;
        self.watched = wanted;
        Ok(())
    }
}

impl Handler for QueuePair {
    fn doorbells(&self) -> Vec<(u16, Arc<EventFd>)> {
        let bell = |queue: &ActiveQueue| (queue.index(), Arc::clone(queue.kick()));
        vec![bell(self.receiver.queue()), bell(self.sender.queue())]
    }

    fn start(&mut self, watch: &Watch) -> Result<(), DeviceError> {
        let failed = |source: io::Error| DeviceError::host("watching a rate limit's timer")(source);
        for (timer, token) in [(&self.receive_timer, RECEIVE_TIMER), (&self.send_timer, SEND_TIMER)] {
            if let Some(Timer(timer)) = timer {
                watch.add(timer, EventSet::IN, token).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn event(&mut self, event: Event, watch: &Watch) -> Result<(), DeviceError> {
        match event {
            Event::Kick(index) if index == self.receiver.queue().index() => self.receive()?,
            Event::Kick(_) => self.send()?,
            Event::Ready(TAP, events) => {
                if events.contains(EventSet::OUT) {
                    self.send()?;
                }
                if events.contains(EventSet::IN) {
                    self.receive()?;
                }
                if events.intersects(EventSet::ERROR | EventSet::HANG_UP) {
                    self.tap_error()?;
                }
            }
            Event::Ready(RECEIVE_TIMER, _) => {
                Timer::take(&mut self.receive_timer);
                self.receive()?;
            }
            Event::Ready(_, _) => {
                Timer::take(&mut self.send_timer);
                self.send()?;
            }
        }
        self.watch_tap(watch)
    }

    fn quiesce(&mut self) {
        self.receiver.undo();
    }
}
