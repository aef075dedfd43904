//! MSI-X: capability, table and pending bit array (PCI Local Bus 3.0, section 6.8.2; PCI Express Base 6.0, section 7.7.2).
//!
//! [`MsixCapability`] is the pure model; [`MsixVectors`] keeps message vectors in step with it.

use std::ops::Range;
use std::sync::Arc;

use crate::cap::vectors::{Applied, Changes, VectorChange, VectorSet};
use crate::function::BarIndex;
use crate::interrupt::{MsiAllocator, MsiMessage};
use crate::registers::is_natural;

/// Length of the capability in bytes.
pub const LEN: u16 = 12;
/// The most vectors a function can have.
pub const MAX_VECTORS: u16 = 2048;
/// Bytes in a table entry.
pub const ENTRY_LEN: u64 = 16;

const CONTROL_HIGH: usize = 3;
/// Message Control bits 15 and 14, as they stand in its upper byte.
const ENABLE: u8 = 1 << 7;
const FUNCTION_MASK: u8 = 1 << 6;
const BIR_MASK: u32 = 7;

/// What the guest can write in an entry: address (dword aligned), data, and the mask bit of Vector Control.
const ENTRY_WRITABLE: u128 = 0x0000_0001_ffff_ffff_ffff_ffff_ffff_fffc;
const ENTRY_MASKED: u128 = 1 << 96;
const ENTRY_ADDRESS: u128 = 0xffff_ffff_ffff_ffff;

/// Where a function keeps table and pending bits, and how many there are. Fixed for its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixLayout {
    /// Vectors, 1 to 2048.
    pub vectors: u16,
    /// BAR of the table, 0 to 5.
    pub table_bar: BarIndex,
    /// Offset of the table in its BAR, a multiple of 8.
    pub table_offset: u32,
    /// BAR of the pending bit array, 0 to 5.
    pub pba_bar: BarIndex,
    /// Offset of the pending bit array in its BAR, a multiple of 8.
    pub pba_offset: u32,
}

/// An MSI-X layout that no function can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MsixLayoutError {
    /// No vectors, or too many.
    #[error("MSI-X cannot have {0} vectors; 1 to 2048 are possible")]
    Vectors(u16),
    /// A BAR number that is reserved.
    #[error("MSI-X table or pending bits in BAR {0}; a function has only BARs 0 to 5")]
    Bar(BarIndex),
    /// An offset that is not a multiple of 8.
    #[error("MSI-X table or pending bits at offset {0:#x} of their BAR; must be a multiple of 8")]
    Offset(u32),
}

/// What stands at a place in a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsixRegion {
    /// The table, at this offset from its start.
    Table(u64),
    /// The pending bit array, at this offset from its start.
    Pba(u64),
}

impl MsixLayout {
    /// Reads the layout out of a capability's 12 bytes, as a physical function has it.
    pub fn parse(capability: &[u8; LEN as usize]) -> Result<Self, MsixLayoutError> {
        let [_, _, control_low, control_high, table @ .., p0, p1, p2, p3] = *capability;
        let table = u32::from_le_bytes(table);
        let pba = u32::from_le_bytes([p0, p1, p2, p3]);
        let bar = |register: u32| (register & BIR_MASK).to_le_bytes()[0];
        let layout = Self {
            vectors: (u16::from_le_bytes([control_low, control_high]) & 0x7ff) + 1,
            table_bar: bar(table),
            table_offset: table & !BIR_MASK,
            pba_bar: bar(pba),
            pba_offset: pba & !BIR_MASK,
        };
        layout.check().map(|()| layout)
    }

    /// The bytes of the table in [`table_bar`](Self::table_bar).
    pub fn table(&self) -> Range<u64> {
        let start = u64::from(self.table_offset);
        start..start + u64::from(self.vectors) * ENTRY_LEN
    }

    /// The bytes of the pending bit array in [`pba_bar`](Self::pba_bar): whole qwords.
    pub fn pba(&self) -> Range<u64> {
        let start = u64::from(self.pba_offset);
        start..start + u64::from(self.vectors).div_ceil(64) * 8
    }

    /// What an access that starts at `offset` of `bar` finds.
    pub fn region(&self, bar: BarIndex, offset: u64) -> Option<MsixRegion> {
        if bar == self.table_bar && self.table().contains(&offset) {
            Some(MsixRegion::Table(offset - self.table().start))
        } else if bar == self.pba_bar && self.pba().contains(&offset) {
            Some(MsixRegion::Pba(offset - self.pba().start))
        } else {
            None
        }
    }

    fn check(&self) -> Result<(), MsixLayoutError> {
        if !(1..=MAX_VECTORS).contains(&self.vectors) {
            return Err(MsixLayoutError::Vectors(self.vectors));
        }
        if let Some(bar) = [self.table_bar, self.pba_bar].into_iter().find(|&bar| bar > 5) {
            return Err(MsixLayoutError::Bar(bar));
        }
        let misplaced =
            [self.table_offset, self.pba_offset].into_iter().find(|offset| offset & BIR_MASK != 0);
        misplaced.map_or(Ok(()), |offset| Err(MsixLayoutError::Offset(offset)))
    }
}

/// One function's MSI-X registers.
#[derive(Clone, Debug)]
pub struct MsixCapability {
    layout: MsixLayout,
    enabled: bool,
    function_mask: bool,
    /// Entries as the little-endian number their 16 bytes make.
    table: Vec<u128>,
    pending: Vec<u64>,
}

impl MsixCapability {
    /// Disabled, every vector masked, nothing pending.
    pub fn new(layout: MsixLayout) -> Result<Self, MsixLayoutError> {
        layout.check()?;
        Ok(Self {
            layout,
            enabled: false,
            function_mask: false,
            table: vec![ENTRY_MASKED; usize::from(layout.vectors)],
            pending: vec![0; usize::from(layout.vectors).div_ceil(64)],
        })
    }

    /// Where table and pending bits are.
    pub const fn layout(&self) -> &MsixLayout {
        &self.layout
    }

    /// MSI-X Enable.
    pub const fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Function Mask.
    pub const fn is_function_masked(&self) -> bool {
        self.function_mask
    }

    /// The message of a vector, if it is to be delivered now: MSI-X enabled, neither function nor vector masked.
    pub fn message(&self, vector: u16) -> Option<MsiMessage> {
        let delivering = self.enabled && !self.function_mask;
        self.table.get(usize::from(vector)).filter(|_| delivering).and_then(|&entry| entry_message(entry))
    }

    /// The guest's read at `offset` in the capability.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let control = self.layout.vectors.wrapping_sub(1).to_le_bytes();
        let flags =
            if self.enabled { ENABLE } else { 0 } | if self.function_mask { FUNCTION_MASK } else { 0 };
        let mut bytes = [0; LEN as usize];
        bytes[2] = control[0];
        bytes[CONTROL_HIGH] = control[1] | flags;
        bytes[4..8]
            .copy_from_slice(&(self.layout.table_offset | u32::from(self.layout.table_bar)).to_le_bytes());
        bytes[8..].copy_from_slice(&(self.layout.pba_offset | u32::from(self.layout.pba_bar)).to_le_bytes());
        for (at, byte) in (usize::from(offset)..).zip(data).filter(|(at, _)| *at >= 2) {
            if let Some(value) = bytes.get(at) {
                *byte = *value;
            }
        }
    }

    /// The guest's write at `offset` in the capability; any size.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Changes {
        let at = CONTROL_HIGH.checked_sub(usize::from(offset));
        let Some(&byte) = at.and_then(|at| data.get(at)) else { return Changes::default() };
        self.control(byte & ENABLE != 0, byte & FUNCTION_MASK != 0)
    }

    /// The guest's read at `offset` in the table. What is not a naturally aligned access inside it reads all ones.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        match self.entry_at(offset, data.len()) {
            Some((index, at)) => data.copy_from_slice(&self.table[index].to_le_bytes()[at..at + data.len()]),
            None => data.fill(0xff),
        }
    }

    /// The guest's write at `offset` in the table. What is not a naturally aligned access inside it is dropped.
    pub fn table_write(&mut self, offset: u64, data: &[u8]) -> Changes {
        let Some((index, at)) = self.entry_at(offset, data.len()) else { return Changes::default() };
        let Ok(vector) = u16::try_from(index) else { return Changes::default() };
        let before = self.message(vector);
        let mut bytes = self.table[index].to_le_bytes();
        bytes[at..at + data.len()].copy_from_slice(data);
        self.table[index] = u128::from_le_bytes(bytes) & ENTRY_WRITABLE;
        let message = self.message(vector);
        let changed = (message != before).then_some(VectorChange { vector, message });
        Changes { enabled: None, vectors: changed.into_iter().collect() }
    }

    /// The guest's read at `offset` in the pending bit array. What is not a naturally aligned access inside it reads all ones. Writes do nothing.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if !is_natural(offset, data.len()) {
            return;
        }
        let Some(word) = usize::try_from(offset / 8).ok().and_then(|index| self.pending.get(index)) else {
            return;
        };
        let bytes = word.to_le_bytes().into_iter().zip(0u64..).filter(|(_, at)| *at >= offset % 8);
        data.iter_mut().zip(bytes).for_each(|(byte, (value, _))| *byte = value);
    }

    /// Sets or clears a vector's pending bit; a vector that does not exist has none.
    pub fn set_pending(&mut self, vector: u16, pending: bool) {
        if vector >= self.layout.vectors {
            return;
        }
        let word = &mut self.pending[usize::from(vector / 64)];
        let bit = 1u64 << (vector % 64);
        *word = if pending { *word | bit } else { *word & !bit };
    }

    /// Back to disabled and masked, as after a reset of the function.
    pub fn reset(&mut self) -> Changes {
        let changes = self.control(false, false);
        self.table.fill(ENTRY_MASKED);
        self.pending.fill(0);
        changes
    }

    fn control(&mut self, enabled: bool, function_mask: bool) -> Changes {
        let delivered = self.enabled && !self.function_mask;
        let mut changes =
            Changes { enabled: (enabled != self.enabled).then_some(enabled), vectors: Vec::new() };
        self.enabled = enabled;
        self.function_mask = function_mask;
        let deliver = enabled && !function_mask;
        if deliver != delivered {
            let unmasked = (0u16..)
                .zip(&self.table)
                .filter_map(|(vector, &entry)| Some((vector, entry_message(entry)?)));
            let change =
                |(vector, message)| VectorChange { vector, message: Some(message).filter(|_| deliver) };
            changes.vectors = unmasked.map(change).collect();
        }
        changes
    }

    /// Entry and offset in it of an access to the table.
    fn entry_at(&self, offset: u64, len: usize) -> Option<(usize, usize)> {
        if !is_natural(offset, len) {
            return None;
        }
        let index = usize::try_from(offset / ENTRY_LEN).ok().filter(|&index| index < self.table.len())?;
        Some((index, usize::try_from(offset % ENTRY_LEN).ok()?))
    }
}

/// The message of an entry whose own mask bit is clear.
fn entry_message(entry: u128) -> Option<MsiMessage> {
    let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, ..] = entry.to_le_bytes();
    let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
    (entry & ENTRY_MASKED == 0).then_some(MsiMessage { address, data: u32::from_le_bytes([d0, d1, d2, d3]) })
}

/// A function's MSI-X registers with message vectors behind them, allocated as the guest unmasks them.
#[derive(Debug)]
pub struct MsixVectors {
    capability: MsixCapability,
    vectors: VectorSet,
}

impl MsixVectors {
    /// Puts vectors from `allocator` behind `capability`.
    pub fn new(capability: MsixCapability, allocator: Arc<dyn MsiAllocator>) -> Self {
        Self { capability, vectors: VectorSet::new(allocator) }
    }

    /// The registers, for reading.
    pub const fn capability(&self) -> &MsixCapability {
        &self.capability
    }

    /// The vectors made so far and their eventfds.
    pub const fn vectors(&self) -> &VectorSet {
        &self.vectors
    }

    /// Makes the vectors of all entries up to the last one that the guest has given an address: it will unmask them
    /// soon. Returns how many that are. See [`VectorSet::reserve`].
    pub fn reserve_programmed(&mut self) -> u16 {
        let programmed = |entry: &u128| *entry & ENTRY_ADDRESS != 0;
        let last = self.capability.table.iter().rposition(programmed);
        let count = last.and_then(|last| u16::try_from(last + 1).ok()).unwrap_or(0);
        (0..count).for_each(|vector| self.vectors.reserve(vector, self.capability.message(vector)));
        count
    }

    /// Makes a vector that exists ahead of its first unmask, so that its eventfd can be given away. See [`VectorSet::reserve`].
    pub fn reserve(&mut self, vector: u16) {
        if vector < self.capability.layout.vectors {
            self.vectors.reserve(vector, self.capability.message(vector));
        }
    }

    /// See [`MsixCapability::read`].
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        self.capability.read(offset, data);
    }

    /// See [`MsixCapability::write`].
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Applied {
        let changes = self.capability.write(offset, data);
        self.vectors.apply(&changes)
    }

    /// See [`MsixCapability::table_read`].
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        self.capability.table_read(offset, data);
    }

    /// See [`MsixCapability::table_write`].
    pub fn table_write(&mut self, offset: u64, data: &[u8]) -> Applied {
        let changes = self.capability.table_write(offset, data);
        self.vectors.apply(&changes)
    }

    /// See [`MsixCapability::pba_read`]; the pending bits are brought up to date first.
    pub fn pba_read(&mut self, offset: u64, data: &mut [u8]) {
        // An offset far past the end has no vectors: their numbers would not even fit in 64 bits.
        let first = (offset / 8).saturating_mul(64);
        for vector in (first..first.saturating_add(64)).filter_map(|vector| u16::try_from(vector).ok()) {
            let pending = self.capability.is_enabled()
                && self.capability.message(vector).is_none()
                && self.vectors.is_waiting(vector);
            self.capability.set_pending(vector, pending);
        }
        self.capability.pba_read(offset, data);
    }

    /// Signals a vector from a device model: delivered now, or when the guest unmasks it. Without MSI-X enabled it is lost.
    pub fn signal(&mut self, vector: u16) {
        if self.capability.is_enabled() && vector < self.capability.layout.vectors {
            self.vectors.signal(vector);
        }
    }

    /// Back to disabled and masked; gives every vector back.
    pub fn reset(&mut self) -> Applied {
        let changes = self.capability.reset();
        self.vectors.clear();
        Applied { enabled: changes.enabled, allocated: Vec::new() }
    }
}

#[cfg(test)]
mod tests;
