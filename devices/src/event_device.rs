//! The trap half of the ACPI generic event device (`ACPI0013`; ACPI 6.5, section 5.6.9).
//!
//! The register and its bits are [`acpi::event_abi`]'s, which the AML is generated from too. An event sets its bit and
//! signals the interrupt; the guest's `_EVT` reads the register, which clears it.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use acpi::event_abi::{Event, is_events};
use vfio_pm::WakeSink;
use vm_device::DeviceMmio;
use vm_device::bus::{MmioAddress, MmioAddressOffset};
use vmm_sys_util::eventfd::EventFd;

/// The event device on the MMIO bus.
#[derive(Debug)]
pub struct EventDevice {
    events: AtomicU32,
    interrupt: EventFd,
}

impl EventDevice {
    /// A device without pending events. `interrupt` is signalled for each event (edge); it should be an irqfd.
    pub fn new(interrupt: EventFd) -> Self {
        Self { events: AtomicU32::new(0), interrupt }
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

impl WakeSink for EventDevice {
    fn notify(&self) {
        self.raise(Event::Wake);
    }
}

impl DeviceMmio for EventDevice {
    fn mmio_read(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        if is_events(offset, data.len()) {
            let events = self.events.swap(0, Ordering::SeqCst);
            data.copy_from_slice(&events.to_le_bytes());
        } else {
            data.fill(0xff);
        }
    }

    fn mmio_write(&self, _base: MmioAddress, _offset: MmioAddressOffset, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use acpi::event_abi::{EVENT_POWER_BUTTON, EVENT_WAKE};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    const BASE: MmioAddress = MmioAddress(0xfed0_1000);

    fn device() -> (EventDevice, EventFd) {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        (EventDevice::new(interrupt.try_clone().unwrap()), interrupt)
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
        for (offset, size) in [(0, 1), (0, 2), (0, 8), (1, 4), (4, 4), (u64::MAX, 4)] {
            let mut data = vec![0; size];
            device.mmio_read(BASE, offset, &mut data);
            assert_eq!(data, vec![0xff; size]);
        }
        device.mmio_write(BASE, 0, &[0; 4]);
        assert_eq!(events(&device), EVENT_WAKE);
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
