//! The registers of the generic event device (`ACPI0013`; ACPI 6.5, section 5.6.9), as data.
//!
//! Each is 32 bits wide. Only aligned 32-bit accesses count; any other reads all ones, and writes elsewhere are dropped.
//!
//! | offset | register | access | meaning |
//! |---|---|---|---|
//! | `0x0` | EVENTS | read clears | why the interrupt was raised; `_EVT` turns each bit into a `Notify` |
//! | `0x4` | ADDED | read clears | bit `d`: there is a new function in place `d` |
//! | `0x8` | LEAVING | read clears | bit `d`: the function in place `d` is to go |
//! | `0xc` | RELEASED | write; reads 0 | a [`release`]: what the guest says of a function that was to go |
//! | `0x8 + 8*s` | ADDED of segment `s`, from 1 on | read clears | as ADDED, which is that of segment 0 |
//! | `0xc + 8*s` | LEAVING of segment `s`, from 1 on | read clears | as LEAVING |
//!
//! A place is a device number of bus 0 of a segment: that of the function itself, or that of the root port above it.

/// PCI segments that there can be.
pub const SEGMENT_COUNT: u16 = 96;

/// Size in bytes of the register block of a machine with so many segments.
pub const fn block_size(segments: usize) -> u64 {
    (segments as u64).saturating_add(1).saturating_mul(8)
}

/// A place for functions that come and go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PlaceAddress {
    /// PCI segment.
    pub segment: u16,
    /// Device number on bus 0.
    pub device: u8,
}

impl PlaceAddress {
    /// The form in RELEASED: the segment in bits 23:16, the device number in bits 7:0.
    pub const fn bits(self) -> u32 {
        ((self.segment & 0xff) as u32) << 16 | self.device as u32
    }
}

/// Offset of EVENTS.
pub const EVENTS_OFFSET: u64 = 0;
/// Offset of ADDED.
pub const ADDED_OFFSET: u64 = 4;
/// Offset of LEAVING.
pub const LEAVING_OFFSET: u64 = 8;
/// Offset of RELEASED.
pub const RELEASED_OFFSET: u64 = 12;
/// Offset of ADDED of segment 1; LEAVING of it follows, and the other segments.
pub const ADDED_OFFSET_OF_OTHERS: u64 = 16;

/// EVENTS bit 0: the power button was pressed.
pub const EVENT_POWER_BUTTON: u32 = 1 << 0;
/// EVENTS bit 1: some WAKE register of the power notification device is not zero.
pub const EVENT_WAKE: u32 = 1 << 1;

/// EVENTS bit 2: ADDED or LEAVING is not zero.
pub const EVENT_PLACES: u32 = 1 << 2;
/// EVENTS bit 3: CHANGED of the memory slots ([`memory_abi`](crate::memory_abi)) is not zero.
pub const EVENT_MEMORY: u32 = 1 << 3;

/// EVENTS bit 4: the registers of the processors ([`processor_abi`](crate::processor_abi)) have something new.
pub const EVENT_PROCESSORS: u32 = 1 << 4;

/// `Notify` value of a device that is new (ACPI 6.5, table 5.168: device check).
pub const NOTIFY_DEVICE_CHECK: u8 = 0x01;
/// `Notify` value of a device that is to go (ACPI 6.5, table 5.168: eject request).
pub const NOTIFY_EJECT_REQUEST: u8 = 0x03;
/// `_OST` status of an event that was handled (ACPI 6.5, table 6.48).
pub const OST_SUCCESS: u8 = 0;
/// Places that there can be in a segment.
pub const PLACE_COUNT: u8 = 32;

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
    /// A function is new or is to go.
    Places,
    /// A processor is new or is to go.
    Processors,
    /// Memory has been added.
    Memory,
}

impl Event {
    /// The event's bit in EVENTS, as a mask.
    pub const fn mask(self) -> u32 {
        match self {
            Self::PowerButton => EVENT_POWER_BUTTON,
            Self::Wake => EVENT_WAKE,
            Self::Places => EVENT_PLACES,
            Self::Processors => EVENT_PROCESSORS,
            Self::Memory => EVENT_MEMORY,
        }
    }
}

/// A register of the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// Why the interrupt was raised.
    Events,
    /// New functions in this segment.
    Added(u16),
    /// Functions in this segment that are to go.
    Leaving(u16),
    /// The guest's answer.
    Released,
}

/// The register that an access of `size` bytes at `offset` is to; `None` if it is to none.
pub const fn decode(offset: u64, size: usize) -> Option<Register> {
    if size != 4 {
        return None;
    }
    match offset {
        EVENTS_OFFSET => Some(Register::Events),
        ADDED_OFFSET => Some(Register::Added(0)),
        LEAVING_OFFSET => Some(Register::Leaving(0)),
        RELEASED_OFFSET => Some(Register::Released),
        ADDED_OFFSET_OF_OTHERS.. if offset < block_size(SEGMENT_COUNT as usize) => {
            // Below 96, so it is all in the lowest byte.
            let [segment, ..] = (offset / 8 - 1).to_le_bytes();
            let segment = segment as u16;
            match offset % 8 {
                0 => Some(Register::Added(segment)),
                4 => Some(Register::Leaving(segment)),
                _ => None,
            }
        }
        _ => None,
    }
}

/// What a value written to RELEASED says: the place as [`PlaceAddress::bits`], and the status of `_OST` in bits 15:8.
pub const fn release(value: u32) -> (PlaceAddress, u8) {
    let [device, status, segment, _] = value.to_le_bytes();
    (PlaceAddress { segment: segment as u16, device }, status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_registers_are_decoded() {
        assert_eq!(decode(0, 4), Some(Register::Events));
        assert_eq!(decode(12, 4), Some(Register::Released));
        assert_eq!(decode(16, 4), Some(Register::Added(1)));
        assert_eq!(decode(20, 4), Some(Register::Leaving(1)));
        assert_eq!(decode(block_size(96) - 4, 4), Some(Register::Leaving(95)));
        assert_eq!((block_size(1), block_size(2)), (16, 24));
        for (offset, size) in [(0, 1), (0, 2), (0, 8), (1, 4), (18, 4), (16, 8), (776, 4), (u64::MAX, 4)] {
            assert_eq!(decode(offset, size), None, "{offset:#x} {size}");
        }
        assert_eq!(Event::PowerButton.mask() | Event::Wake.mask() | Event::Places.mask(), 7);
        let place = PlaceAddress { segment: 0x5f, device: 3 };
        assert_eq!((release(0xff5f_0203), place.bits()), ((place, 2), 0x5f_0003));
    }
}
