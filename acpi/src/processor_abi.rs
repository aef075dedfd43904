//! The registers through which processors come and go, as data (ACPI 6.5, section 8.4: processor devices).
//!
//! The AML of the processors' nodes (`processors`) and the device that traps the accesses both take their
//! offsets from here. Every register is 32 bits wide; any other access reads all ones, and its writes are dropped. Processor `p` has
//! bit `p % 32` of word `p / 32`.
//!
//! | offset | register | access | meaning |
//! |---|---|---|---|
//! | `0x00 + 4*w`, `w` in 0..8 | PRESENT\[w\] | read | the processors that there are; `_STA` returns this |
//! | `0x20 + 4*w` | ADDED\[w\] | read clears | the processors that are new |
//! | `0x40 + 4*w` | LEAVING\[w\] | read clears | the processors that are to go |
//! | `0x60` | EJECT | write; reads 0 | the number of the processor that the guest has let go of (`_EJ0`) |
//! | `0x64` | STATUS | write; reads 0 | a [`status`]: what the guest says of an event (`_OST`) |

/// Size of the register block in bytes.
pub const BLOCK_SIZE: u64 = 0x68;
/// Offset of PRESENT\[0\].
pub const PRESENT_OFFSET: u64 = 0x00;
/// Offset of ADDED\[0\].
pub const ADDED_OFFSET: u64 = 0x20;
/// Offset of LEAVING\[0\].
pub const LEAVING_OFFSET: u64 = 0x40;
/// Offset of EJECT.
pub const EJECT_OFFSET: u64 = 0x60;
/// Offset of STATUS.
pub const STATUS_OFFSET: u64 = 0x64;

/// How many words a set of processors has.
pub const WORD_COUNT: usize = 8;
/// How many processors the registers can name.
pub const PROCESSOR_COUNT: usize = 32 * WORD_COUNT;

/// `_OST` status: the ejection has begun and will end later (ACPI 6.5, table 6.49).
pub const OST_EJECTION_IN_PROGRESS: u8 = 0x84;

/// A register of the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// A word of the processors that there are.
    Present(usize),
    /// A word of the new ones.
    Added(usize),
    /// A word of those that are to go.
    Leaving(usize),
    /// The guest has let go of one.
    Eject,
    /// What the guest says of an event.
    Status,
}

/// The register that an access of `size` bytes at `offset` is to; `None` if it is to none. A word is below [`WORD_COUNT`].
pub fn decode(offset: u64, size: usize) -> Option<Register> {
    if size != 4 || !offset.is_multiple_of(4) {
        return None;
    }
    let word = usize::try_from(offset % 0x20 / 4).ok()?;
    match offset & !0x1f {
        PRESENT_OFFSET => Some(Register::Present(word)),
        ADDED_OFFSET => Some(Register::Added(word)),
        LEAVING_OFFSET => Some(Register::Leaving(word)),
        _ if offset == EJECT_OFFSET => Some(Register::Eject),
        _ if offset == STATUS_OFFSET => Some(Register::Status),
        _ => None,
    }
}

/// The word and the bit, as a mask, of a processor.
pub fn position(processor: u8) -> (usize, u32) {
    (usize::from(processor / 32), 1 << (processor % 32))
}

/// What a value written to STATUS says: the processor in bits 7:0, the event (the `Notify` value) in bits 15:8, the status in bits
/// 23:16.
pub const fn status(value: u32) -> (u8, u8, u8) {
    let [processor, event, status, _] = value.to_le_bytes();
    (processor, event, status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_of_the_block_is_a_register_and_nothing_else_is() {
        let all: Vec<_> = (0..0x1000).filter_map(|offset| decode(offset, 4).map(|r| (offset, r))).collect();
        assert_eq!(all.len(), 3 * WORD_COUNT + 2);
        assert!(all.iter().all(|(offset, _)| *offset < BLOCK_SIZE));
        assert_eq!(decode(0x1c, 4), Some(Register::Present(7)));
        assert_eq!(decode(0x20, 4), Some(Register::Added(0)));
        assert_eq!(decode(0x44, 4), Some(Register::Leaving(1)));
        assert_eq!(decode(EJECT_OFFSET, 4), Some(Register::Eject));
        assert_eq!(decode(STATUS_OFFSET, 4), Some(Register::Status));
        for (offset, size) in [(0, 1), (0, 2), (0, 8), (1, 4), (0x68, 4), (0x80, 4), (u64::MAX - 3, 4)] {
            assert_eq!(decode(offset, size), None, "{offset:#x} {size}");
        }
    }

    #[test]
    fn each_processor_has_a_bit_of_its_own() {
        assert_eq!((position(0), position(31), position(32)), ((0, 1), (0, 1 << 31), (1, 1)));
        assert_eq!(position(255), (7, 1 << 31));
        assert_eq!(status(0xff84_0302), (2, 3, 0x84));
    }
}
