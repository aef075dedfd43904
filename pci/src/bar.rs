//! Base address registers: decode and sizing (PCI Local Bus 3.0, section 6.2.5; PCI Express Base 6.0, section 7.5.1.2.1).

use crate::function::{BarIndex, ROM_BAR};
use crate::registers::Registers;
use crate::regs::{BAR0, COMMAND_IO, COMMAND_MEMORY, ROM_ADDRESS};

/// What a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Mem32 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// Memory anywhere; takes two registers.
    Mem64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// The expansion ROM: memory below 4 GiB with an enable bit of its own.
    Rom,
}

impl BarKind {
    /// Whether it decodes memory, not I/O ports.
    pub const fn is_memory(self) -> bool {
        !matches!(self, Self::Io)
    }

    /// The read-only low bits of the register.
    const fn flags(self) -> u32 {
        match self {
            Self::Io => 1,
            Self::Mem32 { prefetchable } => {
                if prefetchable {
                    8
                } else {
                    0
                }
            }
            Self::Mem64 { prefetchable } => {
                if prefetchable {
                    0xc
                } else {
                    4
                }
            }
            Self::Rom => 0,
        }
    }

    /// The smallest and largest size, both powers of two.
    const fn sizes(self) -> (u64, u64) {
        match self {
            // PCI 3.0 stops I/O at 256 bytes, which real devices do not keep to.
            Self::Io => (4, 1 << 16),
            Self::Mem32 { .. } => (16, 1 << 31),
            Self::Mem64 { .. } => (16, 1 << 63),
            Self::Rom => (1 << 11, 1 << 24),
        }
    }
}

/// A BAR that a function cannot have. A mistake of the model's author or an odd physical device, never the guest's doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BarError {
    /// No such register, or no room for the upper half of a 64-bit BAR.
    #[error(
        "BAR {0} does not exist or leaves no room for its upper half; use 0 to 5 (0 to 4 for 64 bits), and 6 for the ROM only"
    )]
    Index(BarIndex),
    /// The register is taken.
    #[error("BAR {0} is already in use")]
    Taken(BarIndex),
    /// The size is impossible.
    #[error("BAR {index} cannot have size {size:#x}; must be a power of two within the limits of its kind")]
    Size {
        /// Which BAR.
        index: BarIndex,
        /// The size asked for, in bytes.
        size: u64,
    },
}

/// One BAR's kind, size and present address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Which BAR.
    pub index: BarIndex,
    /// What it decodes.
    pub kind: BarKind,
    /// Bytes, a power of two.
    pub size: u64,
    /// The address in the register, whether or not it is decoded now. A multiple of `size`.
    pub base: u64,
}

const ROM_ENABLE: u32 = 1;
/// Six BARs, then the ROM's register (which does not follow them in configuration space).
const FILE_LEN: usize = 28;
const ROM_AT: usize = 24;

/// The BARs of a type 0 header: 0x10 to 0x27, and the ROM's at 0x30.
#[derive(Clone, Debug)]
pub struct BarRegisters {
    registers: Registers<FILE_LEN>,
    bars: [Option<(BarKind, u64)>; 7],
}

impl Default for BarRegisters {
    fn default() -> Self {
        Self::new()
    }
}

impl BarRegisters {
    /// No BAR at all: every register reads zero.
    pub const fn new() -> Self {
        Self { registers: Registers::new(), bars: [None; 7] }
    }

    /// Adds a BAR of `size` bytes at address zero. [`ROM_BAR`] goes with [`BarKind::Rom`] and with nothing else.
    pub fn add(&mut self, index: BarIndex, kind: BarKind, size: u64) -> Result<(), BarError> {
        let last = if matches!(kind, BarKind::Mem64 { .. }) { 4 } else { 5 };
        let fits = if kind == BarKind::Rom { index == ROM_BAR } else { index <= last };
        if !fits {
            return Err(BarError::Index(index));
        }
        let slot = usize::from(index);
        let upper = matches!(kind, BarKind::Mem64 { .. }).then_some(slot + 1);
        let is_upper = |slot: usize| {
            (1..6).contains(&slot) && matches!(self.bars[slot - 1], Some((BarKind::Mem64 { .. }, _)))
        };
        if self.bars[slot].is_some()
            || is_upper(slot)
            || upper.is_some_and(|upper| self.bars[upper].is_some())
        {
            return Err(BarError::Taken(index));
        }
        let (smallest, largest) = kind.sizes();
        if !size.is_power_of_two() || !(smallest..=largest).contains(&size) {
            return Err(BarError::Size { index, size });
        }
        self.bars[slot] = Some((kind, size));
        let mask = (!(size - 1)).to_le_bytes();
        let [m0, m1, m2, m3, high @ ..] = mask;
        let enable = if kind == BarKind::Rom { ROM_ENABLE } else { 0 };
        self.registers.set_u32(slot * 4, kind.flags());
        self.registers.allow_u32(slot * 4, u32::from_le_bytes([m0, m1, m2, m3]) | enable);
        if let Some(upper) = upper {
            self.registers.allow_u32(upper * 4, u32::from_le_bytes(high));
        }
        Ok(())
    }

    /// Whether an access at `offset` of configuration space falls in these registers.
    pub const fn covers(offset: u16) -> bool {
        matches!(offset, 0x10..0x28 | 0x30..0x34)
    }

    /// The guest's read at `offset` of configuration space. Bytes outside these registers are left alone.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(usize::from(offset)..) {
            if let Some(at) = file_offset(at) {
                *byte = self.registers.u8(at);
            }
        }
    }

    /// The guest's write at `offset` of configuration space. Returns whether a register changed; a sizing pattern counts.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> bool {
        let before = self.registers.clone();
        for (byte, at) in data.iter().zip(usize::from(offset)..) {
            if let Some(at) = file_offset(at) {
                self.registers.write(at, &[*byte]);
            }
        }
        self.registers != before
    }

    /// One BAR; `None` if there is none of that number.
    pub fn get(&self, index: BarIndex) -> Option<Bar> {
        let slot = usize::from(index);
        let (kind, size) = (*self.bars.get(slot)?)?;
        let low = u64::from(self.registers.u32(slot * 4));
        let high = match kind {
            BarKind::Mem64 { .. } => u64::from(self.registers.u32(slot * 4 + 4)) << 32,
            _ => 0,
        };
        Some(Bar { index, kind, size, base: (high | low) & !(size - 1) })
    }

    /// All BARs, by number.
    pub fn iter(&self) -> impl Iterator<Item = Bar> + '_ {
        (0..=ROM_BAR).filter_map(|index| self.get(index))
    }

    /// The BARs that decode now, given the command register: its I/O and memory bits, and the ROM's own enable bit.
    ///
    /// Whether the address is a possible one is for the window to say in which it is placed.
    pub fn decoded(&self, command: u16) -> impl Iterator<Item = Bar> + '_ {
        let rom_enabled = self.registers.u32(ROM_AT) & ROM_ENABLE != 0;
        self.iter().filter(move |bar| match bar.kind {
            BarKind::Io => command & COMMAND_IO != 0,
            BarKind::Rom => command & COMMAND_MEMORY != 0 && rom_enabled,
            _ => command & COMMAND_MEMORY != 0,
        })
    }

    /// Every address back to zero and the ROM disabled, as after a reset of the function.
    pub fn reset(&mut self) {
        for slot in 0..7 {
            let flags = self.bars[slot].map_or(0, |(kind, _)| kind.flags());
            self.registers.set_u32(slot * 4, flags);
        }
    }
}

/// Where a byte of configuration space stands in the register file.
fn file_offset(at: usize) -> Option<usize> {
    match at {
        BAR0..0x28 => Some(at - BAR0),
        ROM_ADDRESS..0x34 => Some(at - ROM_ADDRESS + ROM_AT),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: u16 = COMMAND_IO | COMMAND_MEMORY;

    fn dword(bars: &BarRegisters, offset: u16) -> u32 {
        let mut data = [0; 4];
        bars.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn put(bars: &mut BarRegisters, offset: u16, value: u32) -> bool {
        bars.write(offset, &value.to_le_bytes())
    }

    fn sample() -> BarRegisters {
        let mut bars = BarRegisters::new();
        bars.add(0, BarKind::Mem32 { prefetchable: false }, 0x2_0000).unwrap();
        bars.add(1, BarKind::Mem64 { prefetchable: true }, 16 << 30).unwrap();
        bars.add(3, BarKind::Io, 32).unwrap();
        bars.add(ROM_BAR, BarKind::Rom, 0x1_0000).unwrap();
        bars
    }

    #[test]
    fn the_sizing_pattern_reads_back_size_and_kind() {
        let mut bars = sample();
        for offset in [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24] {
            put(&mut bars, offset, u32::MAX);
        }
        put(&mut bars, 0x30, 0xffff_f800);
        let read = [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x30].map(|offset| dword(&bars, offset));
        assert_eq!(read, [0xfffe_0000, 0x0000_000c, 0xffff_fffc, 0xffff_ffe1, 0, 0, 0xffff_0000]);
    }

    #[test]
    fn a_64_bit_bar_takes_an_address_in_two_halves() {
        let mut bars = sample();
        assert!(put(&mut bars, 0x18, 0x12));
        assert_eq!(bars.get(1).unwrap().base, 0x10_0000_0000, "the bits below its size stay zero");
        assert!(!put(&mut bars, 0x14, 0x2000_0000), "the low half lies below its size");
        put(&mut bars, 0x18, u32::MAX);
        assert_eq!(bars.get(1).unwrap().base, 0xffff_fffc_0000_0000);
    }

    #[test]
    fn byte_and_word_writes_reach_their_byte_only() {
        let mut bars = sample();
        put(&mut bars, 0x10, 0xc012_3456);
        assert_eq!(bars.get(0).unwrap().base, 0xc012_0000);
        assert!(bars.write(0x13, &[0xd0]));
        assert!(bars.write(0x12, &[0x34, 0xe1]));
        assert_eq!(bars.get(0).unwrap().base, 0xe134_0000);
        assert!(!bars.write(0x10, &[0xff]));
        assert!(!bars.write(0xf, &[0xff]), "not ours");
        assert!(
            !bars.write(0x28, &[0xff; 8]),
            "between BARs and ROM, and the ROM's read-only low bytes are not reached"
        );
    }

    #[test]
    fn a_write_over_everything_reaches_the_rom_too() {
        let mut bars = sample();
        assert!(bars.write(0, &[0xff; 64]));
        assert_eq!(dword(&bars, 0x30), 0xffff_0001);
        let mut data = [0xaa; 64];
        bars.read(0, &mut data);
        assert_eq!(data[0x0f], 0xaa);
        assert_eq!(data[0x28..0x30], [0xaa; 8]);
        assert_eq!(data[0x34], 0xaa);
        bars.read(u16::MAX, &mut data);
    }

    #[test]
    fn only_what_the_command_register_and_the_roms_bit_allow_is_decoded() {
        let mut bars = sample();
        let decoded =
            |bars: &BarRegisters, command| bars.decoded(command).map(|bar| bar.index).collect::<Vec<_>>();
        assert_eq!(decoded(&bars, 0), []);
        assert_eq!(decoded(&bars, COMMAND_IO), [3]);
        assert_eq!(decoded(&bars, COMMAND_MEMORY), [0, 1]);
        put(&mut bars, 0x30, 0xc000_0001);
        assert_eq!(decoded(&bars, BOTH), [0, 1, 3, 6]);
        bars.reset();
        assert_eq!(decoded(&bars, BOTH), [0, 1, 3]);
        assert!(bars.iter().all(|bar| bar.base == 0));
        assert_eq!(dword(&bars, 0x14), 0xc, "the kind survives");
    }

    #[test]
    fn impossible_bars_are_refused() {
        let mut bars = sample();
        let mem32 = BarKind::Mem32 { prefetchable: false };
        let mem64 = BarKind::Mem64 { prefetchable: false };
        for (index, kind, size, error) in [
            (6, mem32, 0x1000, BarError::Index(6)),
            (5, mem64, 0x1000, BarError::Index(5)),
            (0, BarKind::Rom, 0x1000, BarError::Index(0)),
            (200, mem32, 0x1000, BarError::Index(200)),
            (0, mem32, 0x1000, BarError::Taken(0)),
            (2, mem32, 0x1000, BarError::Taken(2)),
            (4, mem32, 0, BarError::Size { index: 4, size: 0 }),
            (4, mem32, 0x1001, BarError::Size { index: 4, size: 0x1001 }),
            (4, mem32, 1 << 32, BarError::Size { index: 4, size: 1 << 32 }),
            (4, BarKind::Io, 1 << 17, BarError::Size { index: 4, size: 1 << 17 }),
        ] {
            assert_eq!(bars.add(index, kind, size), Err(error));
        }
        assert_eq!(bars.add(4, BarKind::Mem64 { prefetchable: true }, 1 << 63), Ok(()));
        let mut bars = BarRegisters::new();
        bars.add(1, mem32, 0x1000).unwrap();
        assert_eq!(bars.add(0, mem64, 0x1000), Err(BarError::Taken(0)));
    }
}
