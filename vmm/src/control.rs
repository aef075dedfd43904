//! What wakes the main loop of a machine. Stop requests: from the guest, from a signal, or from a vCPU that cannot go on; the first one
//! counts, except that a reset gives way to any other. And what the guest says of devices that it is to let go of.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use acpi::event_abi::{PLACE_COUNT, PlaceAddress, SEGMENT_COUNT, release};
use devices::event_device::ReleaseSink;
use devices::processors::ProcessorSink;
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
    /// Places that the guest has let go of, one bit each, by segment.
    released: [AtomicU32; SEGMENT_COUNT as usize],
    /// What the guest said last of a place that it does not let go of: the place and the status, above a bit that says so.
    refused: AtomicU32,
    /// Whether the guest has said something of processors that are to go.
    processors: AtomicBool,
}

/// Set in `Control::refused` when there is something.
const REFUSED: u32 = 1 << 24;

impl Control {
    /// No request yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            reason: Mutex::new(None),
            released: [const { AtomicU32::new(0) }; SEGMENT_COUNT as usize],
            refused: AtomicU32::new(0),
            processors: AtomicBool::new(false),
        })
    }

    /// What the guest has said of places since the last look: those that it has let go of, and the last one that it does not, with its
    /// status.
    pub fn take_releases(&self) -> (Vec<PlaceAddress>, Option<(PlaceAddress, u8)>) {
        let refused = self.refused.swap(0, Ordering::SeqCst);
        let places = (0..).zip(&self.released).flat_map(|(segment, released)| {
            let released = released.swap(0, Ordering::SeqCst);
            let devices = (0..PLACE_COUNT).filter(move |device| released & 1 << device != 0);
            devices.map(move |device| PlaceAddress { segment, device })
        });
        (places.collect(), (refused & REFUSED != 0).then_some(release(refused)))
    }

    fn has_releases(&self) -> bool {
        self.released.iter().any(|released| released.load(Ordering::SeqCst) != 0)
            || self.refused.load(Ordering::SeqCst) != 0
    }

    /// Whether the main loop has anything to look at but a stop; clears the descriptor if so.
    pub fn wants_attention(&self) -> bool {
        let wants = self.has_releases() | self.processors.swap(false, Ordering::SeqCst);
        if wants {
            // A stop request is looked at first, and stays in `reason`.
            let _ = self.event.read();
        }
        wants
    }

    fn wake(&self) {
        if let Err(e) = self.event.write(1)
            && e.kind() != io::ErrorKind::WouldBlock
        {
            error!("the main loop cannot be woken: {e}");
        }
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
        self.wake();
    }

    /// The first request, if there was one.
    pub fn reason(&self) -> Option<StopReason> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl ReleaseSink for Control {
    fn released(&self, place: PlaceAddress, result: Result<(), u8>) {
        match result {
            Ok(()) => {
                if let Some(released) = self.released.get(usize::from(place.segment)) {
                    let bit = 1_u32.checked_shl(u32::from(place.device)).unwrap_or(0);
                    released.fetch_or(bit, Ordering::SeqCst);
                }
            }
            Err(status) => {
                let said = REFUSED | u32::from(status) << 8 | place.bits();
                self.refused.store(said, Ordering::SeqCst);
            }
        }
        self.wake();
    }
}

impl ProcessorSink for Control {
    fn processors_answered(&self) {
        self.processors.store(true, Ordering::SeqCst);
        self.wake();
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
    fn what_the_guest_says_of_places_takes_no_more_room_the_more_it_says() {
        let control = Control::new().unwrap();
        assert!(!control.wants_attention());
        let at = |segment, device| PlaceAddress { segment, device };
        for _ in 0..1000 {
            control.released(at(0, 3), Ok(()));
            control.released(at(95, 31), Ok(()));
            control.released(at(1, 5), Err(0x82));
            control.released(at(96, 1), Ok(()));
        }
        assert!(control.wants_attention() && control.event().read().is_err());
        assert_eq!(control.take_releases(), (vec![at(0, 3), at(95, 31)], Some((at(1, 5), 0x82))));
        assert_eq!(control.take_releases(), (vec![], None));
        assert!(!control.wants_attention());
    }

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
