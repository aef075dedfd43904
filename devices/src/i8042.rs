//! What is left of the keyboard controller: the reset line behind port 0x64; and of the system control port 0x61 between its
//! registers: that no bus reports an error.
//!
//! The status reads "output buffer full, input buffer empty" for ever. A driver that looks for a controller drains the buffer,
//! sees that it never empties, and concludes within a millisecond that there is none; a kernel that reboots through the
//! controller sees that it takes commands. (Linux: `drivers/input/serio/i8042.c`, `arch/x86/kernel/reboot.c`.)
//!
//! A guest that gets a non-maskable interrupt asks port 0x61 for the reason (Linux: `arch/x86/kernel/nmi.c`). Only when that names none is it
//! the unknown one for which an administrator can have the guest's kernel panic and dump.

use std::convert::Infallible;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vm_superio::{I8042Device, Trigger};

use crate::reset::MachineControl;

/// How many ports there are from the data register to the command and status register, four behind it; those between belong
/// to others and read all ones.
pub const PORTS: u16 = 5;

const DATA: PioAddressOffset = 0;
const SYSTEM_CONTROL: PioAddressOffset = 1;
const STATUS: PioAddressOffset = 4;
/// The output of timer 2. Who waits for it is not kept waiting.
const TIMER_2_OUTPUT: u8 = 1 << 5;
const OUTPUT_BUFFER_FULL: u8 = 1 << 0;

struct Reset(Arc<dyn MachineControl>);

impl Trigger for Reset {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.reset();
        Ok(())
    }
}

/// The controller on the port bus.
pub struct I8042(Mutex<I8042Device<Reset>>);

impl fmt::Debug for I8042 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("I8042").finish_non_exhaustive()
    }
}

impl I8042 {
    /// A controller whose reset line goes to `control`.
    pub fn new(control: Arc<dyn MachineControl>) -> Self {
        Self(Mutex::new(I8042Device::new(Reset(control))))
    }
}

impl DevicePio for I8042 {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        match (offset, &mut *data) {
            (STATUS, [value]) => *value = OUTPUT_BUFFER_FULL,
            (DATA, [value]) => *value = 0,
            (SYSTEM_CONTROL, [value]) => *value = TIMER_2_OUTPUT,
            (_, data) => data.fill(0xff),
        }
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        if let (&[value], Ok(offset)) = (data, u8::try_from(offset)) {
            let mut device = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let Ok(()) = device.write(offset, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reset::fake::Recorder;

    const BASE: PioAddress = PioAddress(0x60);

    #[test]
    fn the_reset_command_resets_once_and_other_bytes_do_not() {
        let machine = Arc::new(Recorder::default());
        let device = I8042::new(machine.clone());
        for (offset, data) in
            [(4, &[0xaa][..]), (0, &[0xfe]), (4, &[0xfe, 0xfe]), (2, &[0xfe]), (u16::MAX, &[0xfe]), (4, &[])]
        {
            device.pio_write(BASE, offset, data);
        }
        assert_eq!(machine.taken(), (0, 0));
        device.pio_write(BASE, 4, &[0xfe]);
        assert_eq!(machine.taken(), (0, 1));
    }

    #[test]
    fn a_driver_finds_a_buffer_that_never_empties_an_input_that_is_free_and_no_bus_error() {
        let device = I8042::new(Arc::new(Recorder::default()));
        for _ in 0..100 {
            let mut status = [0xff];
            device.pio_read(BASE, 4, &mut status);
            assert_eq!(status, [0x01]);
        }
        let mut control = [0xff];
        device.pio_read(BASE, 1, &mut control);
        assert_eq!(control, [0x20], "neither SERR (bit 7) nor IOCHK (bit 6)");
        let mut other = [0; 4];
        device.pio_read(BASE, 1, &mut other);
        assert_eq!(other, [0xff; 4]);
    }
}
