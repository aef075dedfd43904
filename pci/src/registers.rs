//! A block of little-endian registers in which each bit is read-only, read-write or write-one-to-clear (RO,
//! RW and RW1C of PCI Express Base 6.0, section 7.4).

use std::fmt;

/// `N` bytes of registers.
///
/// Offsets given by the machine's own code (`set_*`, `allow_*`, `clear_on_one_*`, `u8`..`u32`) must lie inside the block; those are
/// constants. Offsets that come from the guest go to [`read`](Self::read) and [`write`](Self::write), which take any.
#[derive(Clone, PartialEq, Eq)]
pub struct Registers<const N: usize> {
    value: [u8; N],
    writable: [u8; N],
    clear_on_one: [u8; N],
}

impl<const N: usize> Default for Registers<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> Registers<N> {
    /// All zero and read-only.
    pub const fn new() -> Self {
        Self { value: [0; N], writable: [0; N], clear_on_one: [0; N] }
    }

    /// The 8-bit register at `offset`.
    pub fn u8(&self, offset: usize) -> u8 {
        self.value[offset]
    }

    /// The 16-bit register at `offset`.
    pub fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.value[offset], self.value[offset + 1]])
    }

    /// The 32-bit register at `offset`.
    pub fn u32(&self, offset: usize) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset + 2)) << 16
    }

    /// Sets an 8-bit register, whatever its write mask.
    pub fn set_u8(&mut self, offset: usize, value: u8) {
        self.value[offset] = value;
    }

    /// Sets a 16-bit register, whatever its write mask.
    pub fn set_u16(&mut self, offset: usize, value: u16) {
        self.value[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// Sets a 32-bit register, whatever its write mask.
    pub fn set_u32(&mut self, offset: usize, value: u32) {
        self.value[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// Makes the bits of `mask` in an 8-bit register read-write.
    pub fn allow_u8(&mut self, offset: usize, mask: u8) {
        self.writable[offset] = mask;
    }

    /// Makes the bits of `mask` in a 16-bit register read-write.
    pub fn allow_u16(&mut self, offset: usize, mask: u16) {
        self.writable[offset..offset + 2].copy_from_slice(&mask.to_le_bytes());
    }

    /// Makes the bits of `mask` in a 32-bit register read-write.
    pub fn allow_u32(&mut self, offset: usize, mask: u32) {
        self.writable[offset..offset + 4].copy_from_slice(&mask.to_le_bytes());
    }

    /// Makes the bits of `mask` in a 16-bit register write-one-to-clear.
    pub fn clear_on_one_u16(&mut self, offset: usize, mask: u16) {
        self.clear_on_one[offset..offset + 2].copy_from_slice(&mask.to_le_bytes());
    }

    /// Makes the bits of `mask` in a 32-bit register write-one-to-clear.
    pub fn clear_on_one_u32(&mut self, offset: usize, mask: u32) {
        self.clear_on_one[offset..offset + 4].copy_from_slice(&mask.to_le_bytes());
    }

    /// A guest's read. Bytes of `data` that fall outside the block are left alone.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        let registers = self.value.iter().skip(offset);
        data.iter_mut().zip(registers).for_each(|(byte, value)| *byte = *value);
    }

    /// A guest's write. Bytes that fall outside the block are dropped.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (index, &byte) in (offset..N).zip(data) {
            let writable = self.writable[index];
            let kept = self.value[index] & !(byte & self.clear_on_one[index]);
            self.value[index] = kept & !writable | byte & writable;
        }
    }
}

impl<const N: usize> fmt::Debug for Registers<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Registers(")?;
        self.value.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        write!(f, ")")
    }
}

/// Whether a guest's access has one of the sizes a CPU can make (1, 2, 4, 8 bytes) and is naturally aligned.
pub(crate) fn is_natural(offset: u64, len: usize) -> bool {
    matches!(len, 1 | 2 | 4 | 8) && offset.trailing_zeros() >= len.trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bit_obeys_its_own_kind() {
        let mut registers = Registers::<4>::new();
        registers.set_u16(0, 0xf0f0);
        registers.allow_u16(0, 0x000f);
        registers.clear_on_one_u16(0, 0x8000);
        registers.write(0, &[0xff, 0x7f]);
        assert_eq!(registers.u16(0), 0xf0ff);
        registers.write(1, &[0x80]);
        assert_eq!(registers.u16(0), 0x70ff);
    }

    #[test]
    fn accesses_past_the_end_touch_nothing() {
        let mut registers = Registers::<4>::new();
        registers.allow_u32(0, u32::MAX);
        registers.write(3, &[1, 2, 3]);
        registers.write(usize::MAX, &[9, 9]);
        assert_eq!(registers.u32(0), 0x0100_0000);
        let mut data = [0xaa; 3];
        registers.read(3, &mut data);
        assert_eq!(data, [1, 0xaa, 0xaa]);
        registers.read(usize::MAX, &mut data);
        assert_eq!(data, [1, 0xaa, 0xaa]);
    }

    #[test]
    fn only_aligned_powers_of_two_are_natural() {
        assert!(is_natural(0, 8) && is_natural(8, 8) && is_natural(4, 4) && is_natural(7, 1));
        assert!(
            !is_natural(4, 8)
                && !is_natural(1, 2)
                && !is_natural(0, 3)
                && !is_natural(0, 0)
                && !is_natural(0, 16)
        );
    }
}
