//! The power notification device's register map, as data.
//!
//! One 4 KiB page of memory-mapped registers joins the power resources' AML methods (`_ON`, `_OFF`, `_STA`; ACPI 6.5,
//! section 7.2) to the VMM. The AML generator and the device that traps the accesses both take their offsets from here, so the
//! two cannot drift apart.
//!
//! Every register is 32 bits wide and dword-aligned. Any other access reads all ones and its writes are dropped.
//!
//! | offset | register | access | meaning |
//! |---|---|---|---|
//! | `0x000` | ID | read | [`ID`]: the bytes `DMPM` |
//! | `0x004` | VERSION | read | [`VERSION`] |
//! | `0x010 + 4*w`, `w` in 0..8 | WAKE\[w\] | read clears | bit `b`: the function of resource `32*w + b` was woken by the host |
//! | `0x100 + 8*i`, `i` in 0..256 | REQUEST\[i\] | write; reads 0 | [`REQUEST_OFF`] or [`REQUEST_ON`]; other values are ignored |
//! | `0x104 + 8*i` | STATUS\[i\] | read | [`STATUS_ON`], [`STATUS_BUSY`], [`STATUS_LOST`] |
//!
//! `_OFF` stores its request and returns. `_ON` stores its request and polls STATUS while it is busy, sleeping between two
//! polls so that neither a vCPU nor the interpreter's lock is held for as long as hardware takes. `_STA` returns bit 0 of STATUS.
//! A resource index that no function or port has reads STATUS 0 and its writes are dropped.

use std::fmt;

/// Size of the register page in bytes.
pub const PAGE_SIZE: u64 = 0x1000;
/// Offset of the identification register.
pub const ID_OFFSET: u64 = 0x000;
/// Offset of the version register.
pub const VERSION_OFFSET: u64 = 0x004;
/// Offset of WAKE\[0\].
pub const WAKE_OFFSET: u64 = 0x010;
/// Offset of REQUEST\[0\]; STATUS\[0\] follows it.
pub const RESOURCE_OFFSET: u64 = 0x100;
/// Distance in bytes from one resource's registers to the next one's.
pub const RESOURCE_STRIDE: u64 = 8;
/// Offset of STATUS within one resource's registers.
pub const STATUS_IN_RESOURCE: u64 = 4;

/// What ID reads: `DMPM`, first letter at the lowest address.
pub const ID: u32 = u32::from_le_bytes(*b"DMPM");
/// What VERSION reads.
pub const VERSION: u32 = 1;

/// REQUEST value of `_OFF`.
pub const REQUEST_OFF: u32 = 0;
/// REQUEST value of `_ON`.
pub const REQUEST_ON: u32 = 1;

/// STATUS bit 0: power is on and what the resource powers is ready. This is what `_STA` returns.
pub const STATUS_ON: u32 = 1 << 0;
/// STATUS bit 1: a request is being carried out.
pub const STATUS_BUSY: u32 = 1 << 1;
/// STATUS bit 2: the device did not come back.
pub const STATUS_LOST: u32 = 1 << 2;

/// How many power resources the page has room for.
pub const RESOURCE_COUNT: usize = 256;
/// How many resources share one WAKE register.
pub const RESOURCES_PER_WAKE_WORD: usize = 32;
/// How many WAKE registers there are.
pub const WAKE_WORD_COUNT: usize = RESOURCE_COUNT / RESOURCES_PER_WAKE_WORD;

/// Names one power resource: that of one function or of one root port. Every value is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ResourceIndex(pub u8);

impl ResourceIndex {
    /// The WAKE register that holds this resource's bit.
    pub const fn wake_word(self) -> WakeWord {
        WakeWord(self.0 / 32)
    }

    /// This resource's bit in its WAKE register, as a mask.
    pub const fn wake_mask(self) -> u32 {
        1 << (self.0 % 32)
    }

    /// For indexing tables of [`RESOURCE_COUNT`] entries.
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for ResourceIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Number of a WAKE register; always below [`WAKE_WORD_COUNT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WakeWord(u8);

impl WakeWord {
    /// `None` when there is no such register.
    pub const fn new(word: u8) -> Option<Self> {
        if (word as usize) < WAKE_WORD_COUNT { Some(Self(word)) } else { None }
    }

    /// For indexing tables of [`WAKE_WORD_COUNT`] entries.
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }

    /// The resource whose bit is number `bit`; `None` when `bit` is over 31.
    pub const fn resource(self, bit: u8) -> Option<ResourceIndex> {
        if bit < 32 { Some(ResourceIndex(self.0 * 32 + bit)) } else { None }
    }
}

/// A register of the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// Identification.
    Id,
    /// Version of this map.
    Version,
    /// Functions woken by the host; reading clears.
    Wake(WakeWord),
    /// What the guest asks of a resource.
    Request(ResourceIndex),
    /// The state of a resource.
    Status(ResourceIndex),
}

/// Offset of REQUEST\[index\].
pub const fn request_offset(index: ResourceIndex) -> u64 {
    RESOURCE_OFFSET + RESOURCE_STRIDE * index.0 as u64
}

/// Offset of STATUS\[index\].
pub const fn status_offset(index: ResourceIndex) -> u64 {
    request_offset(index) + STATUS_IN_RESOURCE
}

/// Offset of WAKE\[word\].
pub const fn wake_offset(word: WakeWord) -> u64 {
    WAKE_OFFSET + 4 * word.0 as u64
}

/// The register at `offset` into the page; `None` for an offset that is unaligned, past the end or between registers.
pub fn decode(offset: u64) -> Option<Register> {
    if !offset.is_multiple_of(4) {
        return None;
    }
    match offset {
        ID_OFFSET => return Some(Register::Id),
        VERSION_OFFSET => return Some(Register::Version),
        _ => {}
    }
    if let Some(into_resources) = offset.checked_sub(RESOURCE_OFFSET) {
        let index = ResourceIndex(u8::try_from(into_resources / RESOURCE_STRIDE).ok()?);
        return match into_resources % RESOURCE_STRIDE {
            0 => Some(Register::Request(index)),
            _ => Some(Register::Status(index)),
        };
    }
    let word = u8::try_from(offset.checked_sub(WAKE_OFFSET)? / 4).ok()?;
    WakeWord::new(word).map(Register::Wake)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_is_the_documented_one() {
        assert_eq!(ID, 0x4D50_4D44);
        assert_eq!(request_offset(ResourceIndex(0)), 0x100);
        assert_eq!(status_offset(ResourceIndex(255)), 0x8fc);
        assert_eq!(wake_offset(WakeWord::new(7).unwrap()), 0x02c);
        assert_eq!(WakeWord::new(8), None);
        assert_eq!(ResourceIndex(65).wake_word().as_usize(), 2);
        assert_eq!(ResourceIndex(65).wake_mask(), 2);
    }

    #[test]
    fn every_register_decodes_to_itself() {
        for i in 0..=255 {
            let index = ResourceIndex(i);
            assert_eq!(decode(request_offset(index)), Some(Register::Request(index)));
            assert_eq!(decode(status_offset(index)), Some(Register::Status(index)));
            assert_eq!(index.wake_word().resource(i % 32), Some(index));
        }
        for w in 0..8 {
            let word = WakeWord::new(w).unwrap();
            assert_eq!(decode(wake_offset(word)), Some(Register::Wake(word)));
        }
        assert_eq!(decode(0), Some(Register::Id));
        assert_eq!(decode(4), Some(Register::Version));
    }

    #[test]
    fn holes_odd_offsets_and_everything_past_the_registers_decode_to_nothing() {
        for offset in
            [1, 2, 3, 8, 0xc, 0x11, 0x30, 0xfc, 0x101, 0x102, 0x900, 0xffc, 0x1000, u64::MAX, u64::MAX - 3]
        {
            assert_eq!(decode(offset), None, "{offset:#x}");
        }
        let registers = (0..PAGE_SIZE).filter(|offset| decode(*offset).is_some()).count();
        assert_eq!(registers, 2 + WAKE_WORD_COUNT + 2 * RESOURCE_COUNT);
    }
}
