//! The power management timer (ACPI 6.5, section 4.8.3.3): a counter of 32 bits that nobody can stop, at 3.579545 MHz.
//!
//! Firmware built for Cloud Hypervisor measures its delays with it, and hangs without. The tables do not name it: a Linux that knows
//! of one checks its other clocks against it twice a second, and each look would be an exit.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};

/// How many ports it takes: one register of four bytes.
pub const PORTS: u16 = 4;

const HERTZ: u128 = 3_579_545;
const NANOSECONDS: u128 = 1_000_000_000;

/// The timer on the port bus. It starts at zero.
#[derive(Debug)]
pub struct PmTimer {
    start: Instant,
    /// What it had counted before, in nanoseconds: the machine it is in may have begun elsewhere.
    before: AtomicU64,
}

impl Default for PmTimer {
    fn default() -> Self {
        Self::new()
    }
}

impl PmTimer {
    /// A timer that starts now.
    pub fn new() -> Self {
        Self { start: Instant::now(), before: AtomicU64::new(0) }
    }
}

/// The counter's value so long after it was zero; it wraps round every 20 minutes.
impl PmTimer {
    /// For how long it has run, in nanoseconds.
    pub fn save(&self) -> u64 {
        let before = self.before.load(Ordering::Relaxed);
        before.wrapping_add(u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// Goes on from there.
    pub fn restore(&self, saved: u64) {
        let here = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.before.store(saved.wrapping_sub(here), Ordering::Relaxed);
    }
}

fn ticks(nanoseconds: u128) -> [u8; 4] {
    let ticks = nanoseconds * HERTZ / NANOSECONDS;
    let [a, b, c, d, ..] = ticks.to_le_bytes();
    [a, b, c, d]
}

impl DevicePio for PmTimer {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        let ticks = ticks(self.save().into());
        for (byte, at) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = ticks.get(at).copied().unwrap_or(0xff);
        }
    }

    fn pio_write(&self, _base: PioAddress, _offset: PioAddressOffset, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn read(timer: &PmTimer) -> u32 {
        let mut data = [0; 4];
        timer.pio_read(PioAddress(0x608), 0, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn it_counts_at_the_frequency_of_the_specification() {
        assert_eq!(u32::from_le_bytes(ticks(NANOSECONDS)), 3_579_545);
        assert_eq!(ticks(NANOSECONDS * 1200), 0x0007_6d30_u32.to_le_bytes());
        let timer = PmTimer::new();
        let first = read(&timer);
        std::thread::sleep(Duration::from_millis(20));
        let passed = read(&timer).wrapping_sub(first);
        assert!(passed >= 71_590, "{passed} ticks in 20 ms are too few");
    }

    #[test]
    fn writes_change_nothing_and_what_is_not_there_reads_all_ones() {
        let timer = PmTimer::new();
        timer.pio_write(PioAddress(0x608), 0, &[0; 4]);
        let mut data = [0; 8];
        timer.pio_read(PioAddress(0x608), 2, &mut data);
        assert_eq!(data[2..], [0xff; 6]);
    }
}
