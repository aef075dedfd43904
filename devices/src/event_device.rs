//! The trap half of the ACPI generic event device (`ACPI0013`; ACPI 6.5, section 5.6.9).
//!
//! The registers and their bits are [`acpi::event_abi`]'s, which the AML is generated from too. An event sets its bit and
//! signals the interrupt; the guest's `_EVT` reads the register, which clears it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{fmt, io};

use acpi::event_abi::{Event, OST_SUCCESS, PLACE_COUNT, PlaceAddress, Register, decode, release};
use serde::{Deserialize, Serialize};
use vfio_pm::WakeSink;
use vm_device::DeviceMmio;
use vm_device::bus::{MmioAddress, MmioAddressOffset};
use vmm_sys_util::eventfd::EventFd;

/// Hears what the guest says of a function that is to go. Called from vCPU threads, as often as the guest likes: it must not block.
pub trait ReleaseSink: Send + Sync {
    /// The guest has let go of the function in this place, or says why it does not (the status of `_OST`).
    fn released(&self, place: PlaceAddress, result: Result<(), u8>);
}

/// The event device on the MMIO bus.
pub struct EventDevice {
    events: AtomicU32,
    segments: Vec<Places>,
    interrupt: EventFd,
    releases: Arc<dyn ReleaseSink>,
}

/// The places of a PCI segment, one bit each.
#[derive(Default)]
struct Places {
    added: AtomicU32,
    leaving: AtomicU32,
}

impl fmt::Debug for EventDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventDevice").field("events", &self.events).finish_non_exhaustive()
    }
}

/// What is saved of it: what the guest has not read yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventState {
    events: u32,
    /// ADDED and LEAVING of each segment.
    segments: Vec<(u32, u32)>,
}

impl EventDevice {
    /// A device without pending events, for a machine of one PCI segment. `interrupt` is signalled for each event (edge); it should be an irqfd.
    pub fn new(interrupt: EventFd, releases: Arc<dyn ReleaseSink>) -> Self {
        let segments = vec![Places::default()];
        Self { events: AtomicU32::new(0), segments, interrupt, releases }
    }

    /// The same for a machine of so many segments.
    #[must_use]
    pub fn with_segments(mut self, count: u16) -> Self {
        self.segments = (0..count).map(|_| Places::default()).collect();
        self
    }

    fn places(&self, segment: u16) -> Option<&Places> {
        self.segments.get(usize::from(segment))
    }

    /// Tells the guest that there is a function in this place now.
    pub fn function_added(&self, place: PlaceAddress) {
        let Some(places) = self.places(place.segment) else { return };
        places.leaving.fetch_and(!mask(place), Ordering::SeqCst);
        places.added.fetch_or(mask(place), Ordering::SeqCst);
        self.raise(Event::Places);
    }

    /// Asks the guest to let go of the function in this place.
    pub fn function_leaving(&self, place: PlaceAddress) {
        let Some(places) = self.places(place.segment) else { return };
        places.leaving.fetch_or(mask(place), Ordering::SeqCst);
        self.raise(Event::Places);
    }

    /// Tells the guest. Events that it has not looked at yet are told again.
    pub fn raise(&self, event: Event) {
        // The bit first: the guest may read the register as soon as the interrupt is signalled.
        self.events.fetch_or(event.mask(), Ordering::SeqCst);
        if let Err(error) = self.interrupt.write(1)
            && error.kind() != io::ErrorKind::WouldBlock
        {
            log::error!("event device: the guest does not hear of {event:?}: {error}");
        }
    }
}

impl EventDevice {
    /// What must go on elsewhere as it is here.
    pub fn save(&self) -> EventState {
        let load = |bits: &AtomicU32| bits.load(Ordering::SeqCst);
        let segments = self.segments.iter().map(|places| (load(&places.added), load(&places.leaving)));
        EventState { events: load(&self.events), segments: segments.collect() }
    }

    /// Goes on as saved. A guest that was interrupted and has not looked yet is interrupted again.
    pub fn restore(&self, saved: &EventState) {
        for (places, (added, leaving)) in self.segments.iter().zip(&saved.segments) {
            places.added.store(*added, Ordering::SeqCst);
            places.leaving.store(*leaving, Ordering::SeqCst);
        }
        self.events.store(saved.events, Ordering::SeqCst);
        if saved.events != 0 {
            // It can only fail when the interrupt is pending already.
            let _ = self.interrupt.write(1);
        }
    }
}

impl WakeSink for EventDevice {
    fn notify(&self) {
        self.raise(Event::Wake);
    }
}

impl DeviceMmio for EventDevice {
    fn mmio_read(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        let register = match decode(offset, data.len()) {
            Some(Register::Events) => Some(&self.events),
            Some(Register::Added(segment)) => self.places(segment).map(|places| &places.added),
            Some(Register::Leaving(segment)) => self.places(segment).map(|places| &places.leaving),
            Some(Register::Released) => return data.fill(0),
            None => None,
        };
        match register {
            Some(register) => data.copy_from_slice(&register.swap(0, Ordering::SeqCst).to_le_bytes()),
            None => data.fill(0xff),
        }
    }

    fn mmio_write(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        let (Some(Register::Released), &[a, b, c, d]) = (decode(offset, data.len()), data) else { return };
        let (place, status) = release(u32::from_le_bytes([a, b, c, d]));
        if place.device < PLACE_COUNT && self.places(place.segment).is_some() {
            self.releases.released(place, if status == OST_SUCCESS { Ok(()) } else { Err(status) });
        }
    }
}

/// A place's bit in ADDED and LEAVING.
fn mask(place: PlaceAddress) -> u32 {
    1_u32.checked_shl(u32::from(place.device)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use acpi::event_abi::{EVENT_PLACES, EVENT_POWER_BUTTON, EVENT_WAKE};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    const BASE: MmioAddress = MmioAddress(0xfed0_1000);

    #[derive(Default)]
    struct Releases(Mutex<Vec<(PlaceAddress, Result<(), u8>)>>);

    impl ReleaseSink for Releases {
        fn released(&self, place: PlaceAddress, result: Result<(), u8>) {
            self.0.lock().unwrap().push((place, result));
        }
    }

    fn at(segment: u16, device: u8) -> PlaceAddress {
        PlaceAddress { segment, device }
    }

    fn device() -> (EventDevice, EventFd) {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        (EventDevice::new(interrupt.try_clone().unwrap(), Arc::new(Releases::default())), interrupt)
    }

    fn events(device: &EventDevice) -> u32 {
        let mut data = [0; 4];
        device.mmio_read(BASE, 0, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_read_returns_what_happened_and_clears_it() {
        let (device, interrupt) = device();
        assert_eq!(events(&device), 0);
        device.raise(Event::PowerButton);
        device.notify();
        assert_eq!(interrupt.read().unwrap(), 2);
        assert_eq!(events(&device), EVENT_POWER_BUTTON | EVENT_WAKE);
        assert_eq!(events(&device), 0);
    }

    #[test]
    fn odd_accesses_read_all_ones_and_lose_no_event() {
        let (device, _interrupt) = device();
        device.notify();
        for (offset, size) in [(0, 1), (0, 2), (0, 8), (1, 4), (16, 4), (u64::MAX, 4)] {
            let mut data = vec![0; size];
            device.mmio_read(BASE, offset, &mut data);
            assert_eq!(data, vec![0xff; size]);
        }
        device.mmio_write(BASE, 0, &[0; 4]);
        assert_eq!(events(&device), EVENT_WAKE);
    }

    #[test]
    fn functions_that_come_and_go_are_named_once_and_the_guests_answer_is_passed_on() {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let releases = Arc::new(Releases::default());
        let device = EventDevice::new(interrupt.try_clone().unwrap(), Arc::clone(&releases) as _);
        let read = |offset| {
            let mut data = [0; 4];
            device.mmio_read(BASE, offset, &mut data);
            u32::from_le_bytes(data)
        };
        device.function_added(at(0, 5));
        device.function_leaving(at(0, 31));
        assert_eq!(interrupt.read().unwrap(), 2);
        assert_eq!((read(0), read(4), read(8)), (EVENT_PLACES, 1 << 5, 1 << 31));
        assert_eq!((read(0), read(4), read(8), read(12)), (0, 0, 0, 0));
        for value in [31_u32, 0x8205, 32, 0x1_0003, u32::MAX] {
            device.mmio_write(BASE, 12, &value.to_le_bytes());
        }
        device.mmio_write(BASE, 12, &[1]);
        assert_eq!(*releases.0.lock().unwrap(), [(at(0, 31), Ok(())), (at(0, 5), Err(0x82))]);
    }

    #[test]
    fn a_function_that_is_new_is_not_leaving_any_more() {
        let (device, _interrupt) = device();
        device.function_leaving(at(0, 3));
        device.function_added(at(0, 3));
        let mut data = [0; 4];
        device.mmio_read(BASE, 8, &mut data);
        assert_eq!(data, [0; 4]);
    }

    #[test]
    fn each_segment_has_places_of_its_own_and_there_are_no_more_than_the_machine_has() {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let releases = Arc::new(Releases::default());
        let device =
            EventDevice::new(interrupt.try_clone().unwrap(), Arc::clone(&releases) as _).with_segments(3);
        let read = |offset| {
            let mut data = [0; 4];
            device.mmio_read(BASE, offset, &mut data);
            u32::from_le_bytes(data)
        };
        device.function_added(at(1, 5));
        device.function_leaving(at(2, 31));
        device.function_added(at(3, 1));
        assert_eq!(interrupt.read().unwrap(), 2, "there is no segment 3");
        assert_eq!((read(0), read(4), read(8)), (EVENT_PLACES, 0, 0));
        assert_eq!((read(16), read(20), read(24), read(28)), (1 << 5, 0, 0, 1 << 31));
        assert_eq!((read(16), read(28), read(32), read(36)), (0, 0, u32::MAX, u32::MAX));
        for value in [0x2_001f_u32, 0x3_0001, 0xff_0001] {
            device.mmio_write(BASE, 12, &value.to_le_bytes());
        }
        assert_eq!(*releases.0.lock().unwrap(), [(at(2, 31), Ok(()))]);
    }

    #[test]
    fn an_event_during_the_readout_interrupts_again() {
        let (device, interrupt) = device();
        device.notify();
        assert_eq!(interrupt.read().unwrap(), 1);
        assert_eq!(events(&device), EVENT_WAKE);
        device.notify();
        assert_eq!(interrupt.read().unwrap(), 1);
    }

    #[test]
    fn a_guest_that_never_listens_does_not_stop_the_host() {
        let (device, interrupt) = device();
        interrupt.write(u64::MAX - 1).unwrap();
        device.notify();
        assert_eq!(events(&device), EVENT_WAKE);
    }
}
