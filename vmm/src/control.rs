//! Stop requests: from the guest, from a signal, or from a vCPU that cannot go on. The first one counts, except that
//! a reset gives way to any other.

use std::io;
use std::sync::{Mutex, PoisonError};

use devices::reset::MachineControl;
use log::error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why the machine stops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset, or crashed in a way that resets a PC (triple fault).
    Reset,
    /// The VMM was asked to end (signal number).
    Signal(i32),
    /// The machine cannot go on.
    Fault(String),
}

/// Takes stop requests from any thread and wakes the main loop.
#[derive(Debug)]
pub struct Control {
    event: EventFd,
    reason: Mutex<Option<StopReason>>,
}

impl Control {
    /// No request yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self { event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?, reason: Mutex::new(None) })
    }

    /// Readable once a request is there.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Asks for a stop.
    pub fn stop(&self, reason: StopReason) {
        let mut noted = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        // A reset builds the machine anew, so it must not hide that the VMM is to end.
        if noted.is_none() || *noted == Some(StopReason::Reset) {
            *noted = Some(reason);
        }
        drop(noted);
        if let Err(e) = self.event.write(1) {
            error!("the main loop cannot be woken: {e}");
        }
    }

    /// The first request, if there was one.
    pub fn reason(&self) -> Option<StopReason> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl MachineControl for Control {
    fn power_off(&self) {
        self.stop(StopReason::PowerOff);
    }

    fn reset(&self) {
        self.stop(StopReason::Reset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_not_lost_behind_a_reset_and_the_first_end_counts() {
        let control = Control::new().unwrap();
        control.stop(StopReason::Reset);
        control.stop(StopReason::Signal(15));
        control.stop(StopReason::PowerOff);
        control.stop(StopReason::Reset);
        assert_eq!(control.reason(), Some(StopReason::Signal(15)));
        assert!(control.event().read().is_ok());
    }
}
