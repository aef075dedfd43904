//! The registers of memory devices (`PNP0C80`; ACPI 6.5, section 9.11) that are added while the guest runs, as data.
//!
//! There is a fixed number of slots. Each has a block of [`SLOT_SIZE`] bytes, and CHANGED is behind the last one. Registers are
//! 32 bits wide, and only aligned 32-bit accesses count: AML reads the 64-bit ones in two halves. Any other access reads all ones, and
//! writes elsewhere are dropped.
//!
//! | offset | register | access | meaning |
//! |---|---|---|---|
//! | `slot * 0x20 + 0x0` | BASE (64 bits) | read | first address of the memory in the slot |
//! | `slot * 0x20 + 0x8` | LENGTH (64 bits) | read | its length in bytes |
//! | `slot * 0x20 + 0x10` | STATUS | read | what `_STA` returns: 0 as long as the slot is empty |
//! | `slot * 0x20 + 0x14` | DOMAIN | read | what `_PXM` returns |
//! | `slot * 0x20 + 0x18` | ANSWER | write; reads 0 | the status that `_OST` was called with |
//! | `0x100` | CHANGED | read clears | bit `n`: slot `n` has been filled |

/// How many memory devices can be added.
pub const SLOT_COUNT: u8 = 8;
/// Bytes of a slot's registers.
pub const SLOT_SIZE: u64 = 0x20;
/// Offset of BASE in a slot.
pub const BASE_OFFSET: u64 = 0;
/// Offset of LENGTH in a slot.
pub const LENGTH_OFFSET: u64 = 8;
/// Offset of STATUS in a slot.
pub const STATUS_OFFSET: u64 = 0x10;
/// Offset of DOMAIN in a slot.
pub const DOMAIN_OFFSET: u64 = 0x14;
/// Offset of ANSWER in a slot.
pub const ANSWER_OFFSET: u64 = 0x18;
/// Offset of CHANGED.
pub const CHANGED_OFFSET: u64 = SLOT_SIZE * SLOT_COUNT as u64;
/// Size of the whole block in bytes.
pub const BLOCK_SIZE: u64 = CHANGED_OFFSET + 4;

/// STATUS of a filled slot: present, enabled, shown and working (ACPI 6.5, section 6.3.7).
pub const STATUS_FILLED: u32 = 0xf;

/// A register of a slot, or CHANGED.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// The low or the high half of BASE.
    Base(Half),
    /// The low or the high half of LENGTH.
    Length(Half),
    /// What `_STA` returns.
    Status,
    /// What `_PXM` returns.
    Domain,
    /// What the guest says of the slot.
    Answer,
    /// Which slots have been filled; of no slot.
    Changed,
}

/// Which 32 bits of a 64-bit register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// Bits 31:0.
    Low,
    /// Bits 63:32.
    High,
}

impl Half {
    /// These bits of `value`.
    pub const fn of(self, value: u64) -> u32 {
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        match self {
            Self::Low => u32::from_le_bytes([a, b, c, d]),
            Self::High => u32::from_le_bytes([e, f, g, h]),
        }
    }
}

/// The slot (0 for CHANGED) and the register that an access of `size` bytes at `offset` is to; `None` if it is to none.
pub fn decode(offset: u64, size: usize) -> Option<(usize, Register)> {
    if size != 4 {
        return None;
    }
    if offset == CHANGED_OFFSET {
        return Some((0, Register::Changed));
    }
    let slot = usize::try_from(offset / SLOT_SIZE).ok().filter(|slot| *slot < usize::from(SLOT_COUNT))?;
    let register = match offset % SLOT_SIZE {
        BASE_OFFSET => Register::Base(Half::Low),
        0x4 => Register::Base(Half::High),
        LENGTH_OFFSET => Register::Length(Half::Low),
        0xc => Register::Length(Half::High),
        STATUS_OFFSET => Register::Status,
        DOMAIN_OFFSET => Register::Domain,
        ANSWER_OFFSET => Register::Answer,
        _ => return None,
    };
    Some((slot, register))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_registers_of_slots_that_exist_are_decoded() {
        assert_eq!(decode(0, 4), Some((0, Register::Base(Half::Low))));
        assert_eq!(decode(0xe4, 4), Some((7, Register::Base(Half::High))));
        assert_eq!(decode(0x2c, 4), Some((1, Register::Length(Half::High))));
        assert_eq!(decode(0x50, 4), Some((2, Register::Status)));
        assert_eq!(decode(0x74, 4), Some((3, Register::Domain)));
        assert_eq!(decode(0x98, 4), Some((4, Register::Answer)));
        assert_eq!(decode(0x100, 4), Some((0, Register::Changed)));
        for (offset, size) in [(0, 8), (0, 1), (2, 4), (0x1c, 4), (0x104, 4), (0x120, 4), (u64::MAX, 4)] {
            assert_eq!(decode(offset, size), None, "{offset:#x} {size}");
        }
        assert_eq!((Half::Low.of(0x1_0000_0002), Half::High.of(0x1_0000_0002)), (2, 1));
    }
}
