//! The registers by which a guest resets the machine: that of ACPI, and port 0xCF9. (Soft-off is in [`pm1`](crate::pm1).)
//!
//! ACPI 6.5, section 4.8.3.6 (reset register).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_device::bus::{MmioAddress, MmioAddressOffset, PioAddress, PioAddressOffset};
use vm_device::{DeviceMmio, DevicePio};

/// What a device may ask of the machine it is in. Called from vCPU threads; must not wait for them.
pub trait MachineControl: Send + Sync {
    /// The guest wants to be switched off.
    fn power_off(&self);
    /// The guest wants a reset.
    fn reset(&self);
}

/// What to write to the ACPI reset register.
pub const RESET_VALUE: u8 = 1;

/// The reset register of ACPI: one byte of memory space.
pub struct ResetRegister {
    control: Arc<dyn MachineControl>,
}

impl fmt::Debug for ResetRegister {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResetRegister").finish_non_exhaustive()
    }
}

impl ResetRegister {
    /// A register that acts on `control`.
    pub fn new(control: Arc<dyn MachineControl>) -> Self {
        Self { control }
    }
}

impl DeviceMmio for ResetRegister {
    fn mmio_read(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        match (offset, &mut *data) {
            (0, [value]) => *value = 0,
            (_, data) => data.fill(0xff),
        }
    }

    fn mmio_write(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        if let (0, &[RESET_VALUE]) = (offset, data) {
            self.control.reset();
        }
    }
}

/// The reset control register of PC chipsets, at port 0xCF9 (Intel ICH9 data sheet, section 13.7.5): setting bit 2 resets.
///
/// The port lies inside the window of PCI configuration mechanism 1 (0xCF8 to 0xCFF). A bus without overlapping ranges gives
/// those ports to that device, which passes byte accesses to 0xCF9 on to this one.
pub struct ResetControl {
    control: Arc<dyn MachineControl>,
    value: AtomicU8,
}

impl fmt::Debug for ResetControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResetControl").finish_non_exhaustive()
    }
}

const RESET_CPU: u8 = 1 << 2;
/// System reset and full reset; the bits that can be read back.
const RESET_KIND: u8 = 1 << 1 | 1 << 3;

impl ResetControl {
    /// A register that acts on `control`.
    pub fn new(control: Arc<dyn MachineControl>) -> Self {
        Self { control, value: AtomicU8::new(0) }
    }
}

impl DevicePio for ResetControl {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        match (offset, &mut *data) {
            (0, [value]) => *value = self.value.load(Ordering::Relaxed),
            (_, data) => data.fill(0xff),
        }
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        if let (0, &[value]) = (offset, data) {
            self.value.store(value & RESET_KIND, Ordering::Relaxed);
            if value & RESET_CPU != 0 {
                self.control.reset();
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod fake {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::MachineControl;

    /// Counts what it is asked for.
    #[derive(Debug, Default)]
    pub(crate) struct Recorder {
        power_offs: AtomicU32,
        resets: AtomicU32,
    }

    impl Recorder {
        /// Power-offs and resets so far.
        pub(crate) fn taken(&self) -> (u32, u32) {
            (self.power_offs.load(Ordering::SeqCst), self.resets.load(Ordering::SeqCst))
        }
    }

    impl MachineControl for Recorder {
        fn power_off(&self) {
            self.power_offs.fetch_add(1, Ordering::SeqCst);
        }

        fn reset(&self) {
            self.resets.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fake::Recorder;
    use super::*;

    const BASE: MmioAddress = MmioAddress(0xfed0_0000);

    #[test]
    fn only_the_reset_value_resets() {
        let machine = Arc::new(Recorder::default());
        let register = ResetRegister::new(machine.clone());
        for value in (0..=u8::MAX).filter(|value| *value != RESET_VALUE) {
            register.mmio_write(BASE, 0, &[value]);
        }
        for (offset, data) in
            [(1, &[RESET_VALUE][..]), (u64::MAX, &[RESET_VALUE]), (0, &[RESET_VALUE, 0]), (0, &[])]
        {
            register.mmio_write(BASE, offset, data);
        }
        assert_eq!(machine.taken(), (0, 0));
        register.mmio_write(BASE, 0, &[RESET_VALUE]);
        assert_eq!(machine.taken(), (0, 1));
    }

    #[test]
    fn the_register_reads_zero_and_odd_accesses_all_ones() {
        let register = ResetRegister::new(Arc::new(Recorder::default()));
        let mut byte = [0x55];
        register.mmio_read(BASE, 0, &mut byte);
        assert_eq!(byte, [0]);
        let mut wide = [0; 4];
        register.mmio_read(BASE, 0, &mut wide);
        assert_eq!(wide, [0xff; 4]);
        let mut outside = [0];
        register.mmio_read(BASE, 1, &mut outside);
        assert_eq!(outside, [0xff]);
    }

    #[test]
    fn linux_resets_through_cf9_with_its_second_write() {
        let machine = Arc::new(Recorder::default());
        let device = ResetControl::new(machine.clone());
        let base = PioAddress(0xcf9);
        device.pio_write(base, 0, &[0x02]);
        let mut value = [0];
        device.pio_read(base, 0, &mut value);
        assert_eq!((value, machine.taken()), ([0x02], (0, 0)));
        device.pio_write(base, 0, &[0x06]);
        device.pio_write(base, 0, &[0x06, 0, 0, 0]);
        assert_eq!(machine.taken(), (0, 1));
    }
}
