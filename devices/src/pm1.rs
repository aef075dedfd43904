//! The trap half of the PM1 blocks (ACPI 6.5, section 4.8.3; the register model is [`acpi::pm1`]).
//!
//! It is what lets the clock wake a guest out of suspend-to-idle: Linux arms the fixed RTC event for that, not the
//! clock's own interrupt.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use acpi::pm1::{CONTROL_BLOCK_SIZE, EVENT_BLOCK_SIZE, EVENT_RTC, Effect, Pm1, Pm1Registers};
use serde::{Deserialize, Serialize};
use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vmm_sys_util::eventfd::EventFd;

use crate::reset::MachineControl;

/// What firmware built for Cloud Hypervisor writes, as one byte, to the first port to switch the machine off: that VMM has a sleep control
/// register there (ACPI 6.5, section 4.8.3.7), SLP_EN with type 5. An operating system writes the status register here in words.
const FIRMWARE_POWER_OFF: u8 = 1 << 5 | 5 << 2;

/// How many ports both blocks take.
pub const PORTS: u16 = EVENT_BLOCK_SIZE as u16 + CONTROL_BLOCK_SIZE as u16;

/// Both blocks, the event block first, at consecutive ports.
pub struct Pm1Device {
    model: Mutex<Pm1>,
    interrupt: EventFd,
    control: Arc<dyn MachineControl>,
}

impl fmt::Debug for Pm1Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pm1Device").field("model", &self.model).finish_non_exhaustive()
    }
}

/// What is saved of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pm1State {
    status: u16,
    enable: u16,
    sleep_type: u16,
}

impl Pm1Device {
    /// `interrupt`: the system control interrupt, an edge. Soft-off goes to `control`.
    pub fn new(interrupt: EventFd, control: Arc<dyn MachineControl>) -> Self {
        Self { model: Mutex::new(Pm1::new()), interrupt, control }
    }

    /// The clock's alarm went off.
    pub fn clock_alarm(&self) {
        let interrupt = self.model().raise(EVENT_RTC);
        self.act(Effect { interrupt, power_off: false });
    }

    /// What must go on elsewhere as it is here.
    pub fn save(&self) -> Pm1State {
        let Pm1Registers { status, enable, sleep_type } = self.model().registers();
        Pm1State { status, enable, sleep_type }
    }

    /// Goes on as saved. An interrupt that is wanted is given once more: the guest looks at the registers for the reason.
    pub fn restore(&self, saved: &Pm1State) {
        let Pm1State { status, enable, sleep_type } = *saved;
        let mut model = self.model();
        *model = Pm1::from(Pm1Registers { status, enable, sleep_type });
        let interrupt = model.interrupt_wanted();
        drop(model);
        self.act(Effect { interrupt, power_off: false });
    }

    fn model(&self) -> MutexGuard<'_, Pm1> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn act(&self, effect: Effect) {
        if effect.interrupt {
            // It can only fail when the interrupt is pending already.
            let _ = self.interrupt.write(1);
        }
        if effect.power_off {
            self.control.power_off();
        }
    }
}

impl DevicePio for Pm1Device {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        let event = u16::from(EVENT_BLOCK_SIZE);
        match offset.checked_sub(event) {
            None => self.model().read_event(u64::from(offset), data),
            Some(offset) => self.model().read_control(u64::from(offset), data),
        }
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        if let (0, &[FIRMWARE_POWER_OFF]) = (offset, data) {
            return self.control.power_off();
        }
        let event = u16::from(EVENT_BLOCK_SIZE);
        let effect = match offset.checked_sub(event) {
            None => self.model().write_event(u64::from(offset), data),
            Some(offset) => self.model().write_control(u64::from(offset), data),
        };
        self.act(effect);
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[derive(Default)]
    struct Off(Mutex<u32>);

    impl MachineControl for Off {
        fn power_off(&self) {
            *self.0.lock().unwrap() += 1;
        }

        fn reset(&self) {}
    }

    fn device() -> (Pm1Device, EventFd, Arc<Off>) {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let seen = interrupt.try_clone().unwrap();
        let off = Arc::new(Off::default());
        (Pm1Device::new(interrupt, off.clone()), seen, off)
    }

    fn write(device: &Pm1Device, offset: u16, value: u16) {
        device.pio_write(PioAddress(0x600), offset, &value.to_le_bytes());
    }

    #[test]
    fn an_alarm_interrupts_only_once_the_guest_has_enabled_the_event() {
        let (device, interrupt, _) = device();
        device.clock_alarm();
        assert!(interrupt.read().is_err());
        write(&device, 2, EVENT_RTC);
        assert!(interrupt.read().is_ok(), "the status was set before");
        write(&device, 0, EVENT_RTC);
        device.clock_alarm();
        assert!(interrupt.read().is_ok());
    }

    #[test]
    fn a_firmwares_byte_powers_the_machine_off_and_a_systems_word_does_not() {
        let (device, _, off) = device();
        write(&device, 0, 0x34);
        device.pio_write(PioAddress(0x600), 0, &[0x20]);
        assert_eq!(*off.0.lock().unwrap(), 0);
        device.pio_write(PioAddress(0x600), 0, &[0x34]);
        assert_eq!(*off.0.lock().unwrap(), 1);
    }

    #[test]
    fn soft_off_powers_the_machine_off() {
        let (device, _, off) = device();
        write(&device, 4, 1 << 13 | 4 << 10);
        assert_eq!(*off.0.lock().unwrap(), 0, "not a state of this machine");
        write(&device, 4, 1 << 13 | 5 << 10);
        assert_eq!(*off.0.lock().unwrap(), 1);
    }
}
