//! The register of the generic event device (`ACPI0013`; ACPI 6.5, section 5.6.9), as data.
//!
//! One 32-bit register, EVENTS, says why the interrupt was raised. Reading it clears it. Only aligned 32-bit accesses count;
//! any other reads all ones, and writes are dropped. `_EVT` reads it and turns each bit into a `Notify`.

/// Size of the register block in bytes.
pub const BLOCK_SIZE: u64 = 4;
/// Offset of EVENTS.
pub const EVENTS_OFFSET: u64 = 0;

/// EVENTS bit 0: the power button was pressed.
pub const EVENT_POWER_BUTTON: u32 = 1 << 0;
/// EVENTS bit 1: some WAKE register of the power notification device is not zero.
pub const EVENT_WAKE: u32 = 1 << 1;

/// `Notify` value that asks a device's driver to look at a wake of its device (ACPI 6.5, table 5.168: device wake).
pub const NOTIFY_DEVICE_WAKE: u8 = 0x02;
/// `Notify` value of a pressed power button (ACPI 6.5, table 5.173).
pub const NOTIFY_POWER_BUTTON: u8 = 0x80;

/// Why the event device interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The power button was pressed.
    PowerButton,
    /// The host woke a function that the guest had switched off.
    Wake,
}

impl Event {
    /// The event's bit in EVENTS, as a mask.
    pub const fn mask(self) -> u32 {
        match self {
            Self::PowerButton => EVENT_POWER_BUTTON,
            Self::Wake => EVENT_WAKE,
        }
    }
}

/// Whether an access of `size` bytes at `offset` is one to EVENTS.
pub const fn is_events(offset: u64, size: usize) -> bool {
    offset == EVENTS_OFFSET && size == 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_register_is_events() {
        assert!(is_events(0, 4));
        for (offset, size) in [(0, 1), (0, 2), (0, 8), (1, 4), (4, 4), (u64::MAX, 4)] {
            assert!(!is_events(offset, size), "{offset:#x} {size}");
        }
        assert_eq!(Event::PowerButton.mask() & Event::Wake.mask(), 0);
    }
}
