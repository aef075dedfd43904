//! MSI (PCI Local Bus 3.0, section 6.8.1; PCI Express Base 6.0, section 7.7.1).
//!
//! [`MsiCapability`] is the pure model; [`MsiVectors`] keeps message vectors in step with it.

use std::sync::Arc;

use crate::cap::vectors::{Applied, Changes, VectorChange, VectorSet};
use crate::interrupt::{MsiAllocator, MsiMessage};
use crate::registers::Registers;

const CONTROL: usize = 2;
const ADDRESS: usize = 4;
const ADDRESS_HIGH: usize = 8;

const ENABLE: u16 = 1 << 0;
const CAPABLE_SHIFT: u32 = 1;
const ENABLED_COUNT_MASK: u16 = 7 << 4;
const ENABLED_COUNT_SHIFT: u32 = 4;
const ADDRESS_64: u16 = 1 << 7;
const PER_VECTOR_MASK: u16 = 1 << 8;

/// The longest form: 64-bit address and per-vector masks.
const MAX_LEN: usize = 24;

/// What form of MSI a function has. Fixed for its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiLayout {
    /// Vectors the function asks for: 1, 2, 4, 8, 16 or 32.
    pub vectors: u8,
    /// The message address has 64 bits.
    pub address_64: bool,
    /// Vectors can be masked one by one.
    pub per_vector_mask: bool,
}

/// A number of MSI vectors that no function can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("MSI cannot have {0} vectors; a power of two from 1 to 32 is possible")]
pub struct MsiLayoutError(pub u8);

impl MsiLayout {
    /// Reads the layout out of Message Control (the word at offset 2), as a physical function has it.
    pub fn parse(control: u16) -> Result<Self, MsiLayoutError> {
        // Six and seven are reserved; as powers they stay below 256.
        let vectors = 1u8 << (control >> CAPABLE_SHIFT & 7);
        let layout = Self {
            vectors,
            address_64: control & ADDRESS_64 != 0,
            per_vector_mask: control & PER_VECTOR_MASK != 0,
        };
        layout.check().map(|()| layout)
    }

    /// Length of the capability in bytes: 10, 14, 20 or 24.
    pub const fn capability_len(&self) -> u16 {
        match (self.address_64, self.per_vector_mask) {
            (false, false) => 10,
            (true, false) => 14,
            (false, true) => 20,
            (true, true) => 24,
        }
    }

    fn data_offset(&self) -> usize {
        if self.address_64 { 12 } else { 8 }
    }

    /// Offset of the mask bits; the pending bits are the dword after it.
    fn mask_offset(&self) -> Option<usize> {
        self.per_vector_mask.then(|| self.data_offset() + 4)
    }

    /// One bit for each vector.
    fn vector_bits(&self) -> u32 {
        u32::MAX >> (32 - u32::from(self.vectors))
    }

    fn check(&self) -> Result<(), MsiLayoutError> {
        let possible = self.vectors.is_power_of_two() && self.vectors <= 32;
        possible.then_some(()).ok_or(MsiLayoutError(self.vectors))
    }
}

/// One function's MSI registers.
#[derive(Clone, Debug)]
pub struct MsiCapability {
    layout: MsiLayout,
    registers: Registers<MAX_LEN>,
}

impl MsiCapability {
    /// Disabled, one vector enabled, no address.
    pub fn new(layout: MsiLayout) -> Result<Self, MsiLayoutError> {
        layout.check()?;
        let mut registers = Registers::new();
        let capable = u16::try_from(layout.vectors.trailing_zeros()).unwrap_or(0) << CAPABLE_SHIFT;
        let address_64 = if layout.address_64 { ADDRESS_64 } else { 0 };
        let per_vector_mask = if layout.per_vector_mask { PER_VECTOR_MASK } else { 0 };
        registers.set_u16(CONTROL, capable | address_64 | per_vector_mask);
        registers.allow_u16(CONTROL, ENABLE | ENABLED_COUNT_MASK);
        registers.allow_u32(ADDRESS, !3);
        if layout.address_64 {
            registers.allow_u32(ADDRESS_HIGH, u32::MAX);
        }
        registers.allow_u16(layout.data_offset(), u16::MAX);
        if let Some(mask) = layout.mask_offset() {
            registers.allow_u32(mask, layout.vector_bits());
        }
        Ok(Self { layout, registers })
    }

    /// Which form it has.
    pub const fn layout(&self) -> &MsiLayout {
        &self.layout
    }

    /// MSI Enable.
    pub fn is_enabled(&self) -> bool {
        self.registers.u16(CONTROL) & ENABLE != 0
    }

    /// How many vectors the guest allows; never more than the function asked for.
    pub fn enabled_vectors(&self) -> u8 {
        let exponent = (self.registers.u16(CONTROL) & ENABLED_COUNT_MASK) >> ENABLED_COUNT_SHIFT;
        (1u8 << exponent).min(self.layout.vectors)
    }

    /// The message of a vector, if it is to be delivered now: MSI enabled, the vector allowed and not masked.
    pub fn message(&self, vector: u16) -> Option<MsiMessage> {
        let count = u16::from(self.enabled_vectors());
        let masks = self.layout.mask_offset().map_or(0, |offset| self.registers.u32(offset));
        if !self.is_enabled() || vector >= count || masks >> vector & 1 != 0 {
            return None;
        }
        let high = if self.layout.address_64 { self.registers.u32(ADDRESS_HIGH) } else { 0 };
        let address = u64::from(high) << 32 | u64::from(self.registers.u32(ADDRESS));
        // The function replaces the low bits of the data by the vector's number (section 6.8.1.6).
        let data = self.registers.u16(self.layout.data_offset()) & !(count - 1) | vector;
        Some(MsiMessage { address, data: u32::from(data) })
    }

    /// The guest's read at `offset` in the capability.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let (own, at) = self.own_bytes(offset, data.len());
        if let Some(own) = data.get_mut(own) {
            self.registers.read(at, own);
        }
    }

    /// The guest's write at `offset` in the capability; any size.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Changes {
        let (own, at) = self.own_bytes(offset, data.len());
        let Some(data) = data.get(own) else { return Changes::default() };
        self.change(|registers| registers.write(at, data))
    }

    /// Sets or clears a vector's pending bit, where there are per-vector masks.
    pub fn set_pending(&mut self, vector: u16, pending: bool) {
        let Some(offset) = self.layout.mask_offset().map(|offset| offset + 4) else { return };
        let bit = 1u32.checked_shl(u32::from(vector)).unwrap_or(0) & self.layout.vector_bits();
        let bits = self.registers.u32(offset);
        self.registers.set_u32(offset, if pending { bits | bit } else { bits & !bit });
    }

    /// Back to disabled, as after a reset of the function.
    pub fn reset(&mut self) -> Changes {
        let fresh = Self::new(self.layout).map(|fresh| fresh.registers);
        self.change(|registers| {
            if let Ok(fresh) = fresh {
                *registers = fresh;
            }
        })
    }

    /// The part of an access that falls in this capability behind its two header bytes, and where it starts in it.
    fn own_bytes(&self, offset: u16, len: usize) -> (std::ops::Range<usize>, usize) {
        let offset = usize::from(offset);
        let end = usize::from(self.layout.capability_len()).saturating_sub(offset).min(len);
        let start = CONTROL.saturating_sub(offset).min(end);
        (start..end, offset + start)
    }

    fn change(&mut self, change: impl FnOnce(&mut Registers<MAX_LEN>)) -> Changes {
        let enabled = self.is_enabled();
        let all = 0..u16::from(self.layout.vectors);
        let before: Vec<_> = all.clone().map(|vector| self.message(vector)).collect();
        change(&mut self.registers);
        let now = all.map(|vector| VectorChange { vector, message: self.message(vector) });
        let vectors = now.zip(before).filter(|(now, before)| now.message != *before).map(|(now, _)| now);
        let vectors = vectors.collect();
        Changes { enabled: (self.is_enabled() != enabled).then_some(!enabled), vectors }
    }
}

/// A function's MSI registers with message vectors behind them, allocated as the guest enables them.
#[derive(Debug)]
pub struct MsiVectors {
    capability: MsiCapability,
    vectors: VectorSet,
}

impl MsiVectors {
    /// Puts vectors from `allocator` behind `capability`.
    pub fn new(capability: MsiCapability, allocator: Arc<dyn MsiAllocator>) -> Self {
        Self { capability, vectors: VectorSet::new(allocator) }
    }

    /// The registers, for reading.
    pub const fn capability(&self) -> &MsiCapability {
        &self.capability
    }

    /// The vectors made so far and their eventfds.
    pub const fn vectors(&self) -> &VectorSet {
        &self.vectors
    }

    /// Makes the vectors that the guest has enabled and returns how many that are. See [`VectorSet::reserve`].
    pub fn reserve_enabled(&mut self) -> u16 {
        let count =
            if self.capability.is_enabled() { u16::from(self.capability.enabled_vectors()) } else { 0 };
        (0..count).for_each(|vector| self.vectors.reserve(vector, self.capability.message(vector)));
        count
    }

    /// See [`MsiCapability::read`]; the pending bits are brought up to date first.
    pub fn read(&mut self, offset: u16, data: &mut [u8]) {
        if self.capability.layout.per_vector_mask {
            for vector in 0..u16::from(self.capability.layout.vectors) {
                let pending = self.capability.is_enabled()
                    && self.capability.message(vector).is_none()
                    && self.vectors.is_waiting(vector);
                self.capability.set_pending(vector, pending);
            }
        }
        self.capability.read(offset, data);
    }

    /// See [`MsiCapability::write`].
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Applied {
        let changes = self.capability.write(offset, data);
        self.vectors.apply(&changes)
    }

    /// Signals a vector from a device model: delivered now, or when the guest unmasks it. Without MSI enabled it is lost. A vector
    /// that the guest did not allow shares the last one that it did.
    pub fn signal(&mut self, vector: u16) {
        if self.capability.is_enabled() {
            self.vectors.signal(vector.min(u16::from(self.capability.enabled_vectors()) - 1));
        }
    }

    /// Back to disabled; gives every vector back.
    pub fn reset(&mut self) -> Applied {
        let changes = self.capability.reset();
        self.vectors.clear();
        Applied { enabled: changes.enabled, allocated: Vec::new() }
    }
}

#[cfg(test)]
mod tests;
