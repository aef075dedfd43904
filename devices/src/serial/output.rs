//! The transmit side of a serial port: a bounded queue in front of a descriptor.
//!
//! A guest transmits a byte at a time, and a vCPU must neither pay a write(2) for each nor wait for a reader. The first byte
//! after a pause goes out at once and opens a window of one millisecond; what follows inside it goes out with the next line
//! end, when a batch is full, or when the window closes, whichever is first. So a lone byte is never late, a prompt is late by
//! no more than the window, and a boot log costs about a write per line. Nothing is armed while the guest is silent.
//!
//! When the reader does not keep up the queue fills; then the vCPU waits once, for a bounded time, and after that the oldest
//! bytes are dropped until the reader moves again.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use super::stream::{Direction, Stream};

/// Bytes written together at most, and so the longest a byte can wait for its neighbours.
const BATCH: usize = 256;
/// Bytes kept for a reader that does not keep up.
pub(super) const BACKLOG: usize = 64 << 10;
/// How long the window stays open.
const WINDOW_NS: i64 = 1_000_000;
/// How long a vCPU waits, once, for a reader that has stopped reading.
const PATIENCE: Duration = Duration::from_millis(200);

/// Queue and descriptor of the transmit side.
#[derive(Debug)]
pub(super) struct Output {
    /// What messages call it.
    name: String,
    sink: Option<Stream>,
    /// Whether a vCPU may wait for the reader at all.
    patient: bool,
    queue: VecDeque<u8>,
    /// One-shot timer of the window.
    timer: OwnedFd,
    window_open: bool,
    /// The descriptor took no more; wait for it to become writable.
    blocked: bool,
    /// The reader has used up our patience.
    stalled: bool,
    /// A write failed, and that was logged.
    failed: bool,
    dropped: u64,
}

impl Output {
    pub(super) fn new(name: String, sink: Option<Stream>, patient: bool) -> io::Result<Self> {
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        Ok(Self {
            name,
            sink,
            patient,
            queue: VecDeque::new(),
            timer,
            window_open: false,
            blocked: false,
            stalled: false,
            failed: false,
            dropped: 0,
        })
    }

    /// Descriptor of the window's timer, for the event loop.
    pub(super) fn timer_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Descriptor written to, for the event loop.
    pub(super) fn sink_fd(&self) -> Option<RawFd> {
        self.sink.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Replaces the descriptor. What was meant for the old one is forgotten.
    pub(super) fn connect(&mut self, sink: Option<Stream>) {
        self.sink = sink;
        self.queue.clear();
        self.blocked = false;
        self.stalled = false;
        self.failed = false;
    }

    /// Takes a byte from the guest.
    pub(super) fn push(&mut self, byte: u8) {
        if self.sink.is_none() {
            return;
        }
        if self.queue.len() >= BACKLOG {
            self.make_room();
        }
        self.queue.push_back(byte);
        let line_end = byte == b'\n';
        if self.blocked {
            // The event loop drains when the descriptor is writable; a line end tries as well, for descriptors that
            // cannot be watched.
            if line_end {
                self.drain();
            }
        } else if line_end || self.queue.len() >= BATCH {
            self.drain();
        } else if !self.window_open {
            self.drain();
            self.window_open = self.arm();
        }
    }

    /// The window's timer has fired.
    pub(super) fn close_window(&mut self) {
        let mut expirations = [0; 8];
        // An error means that it was armed again meanwhile; closing early only costs a write.
        let _ = rustix::io::read(&self.timer, &mut expirations);
        self.window_open = false;
        self.drain();
    }

    /// Writes as much of the queue as the descriptor takes.
    pub(super) fn drain(&mut self) {
        while !self.queue.is_empty() {
            let Some(sink) = &self.sink else {
                self.queue.clear();
                return;
            };
            let (head, _) = self.queue.as_slices();
            match sink.write(head) {
                Ok(count) if count > 0 => {
                    self.queue.drain(..count);
                    self.blocked = false;
                    self.stalled = false;
                }
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                    self.fail(&error);
                    return;
                }
                _ => {
                    self.blocked = true;
                    return;
                }
            }
        }
        self.blocked = false;
        if self.dropped > 0 {
            log::warn!(
                "guest's output: {} bytes were dropped, because {} did not keep up",
                self.dropped,
                self.name
            );
            self.dropped = 0;
        }
    }

    fn make_room(&mut self) {
        if !self.stalled {
            self.drain();
            if self.queue.len() >= BACKLOG && self.patient {
                if let Some(sink) = &self.sink {
                    sink.ready(Direction::Output, PATIENCE);
                }
                self.drain();
            }
        }
        if self.queue.len() >= BACKLOG {
            self.stalled = true;
            self.queue.pop_front();
            self.dropped = self.dropped.saturating_add(1);
        }
    }

    fn fail(&mut self, error: &io::Error) {
        self.queue.clear();
        // A client that goes away is no fault, and the event loop sees it go.
        if !self.failed && error.kind() != io::ErrorKind::BrokenPipe {
            log::warn!("guest's output: cannot write to {}: {error}; output is lost", self.name);
        }
        self.failed = true;
    }

    fn arm(&self) -> bool {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let window = Itimerspec { it_interval: zero, it_value: Timespec { tv_sec: 0, tv_nsec: WINDOW_NS } };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &window).is_ok()
    }

    #[cfg(test)]
    pub(super) fn queued(&self) -> usize {
        self.queue.len()
    }
}
