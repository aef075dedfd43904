//! BARs of an assigned function: which parts the guest may reach directly, and the host mappings behind them.
//!
//! A BAR is mapped into this process once, when the function is opened. Whether the guest sees it is decided by
//! memory slots, made and dropped with [`GuestMapper`] as the guest moves BARs, switches memory decode, changes
//! the power state or cuts the power. The MSI-X table is never mapped: the VMM answers it.
#![allow(unsafe_code)] // mmap and munmap of the device file.

use std::ffi::c_void;
use std::fmt::Debug;
use std::io;
use std::os::fd::AsFd;
use std::ptr;

use pci::function::BarIndex;
use rustix::mm::{MapFlags, ProtFlags};

use super::open::{Handle, Region};

/// Memory slots can only hold whole pages.
pub const PAGE_SIZE: u64 = 4096;

/// Shows host memory to the guest. `vmm` implements it on KVM's memory slots.
pub trait GuestMapper: Debug + Send + Sync {
    /// Maps `area` at guest address `gpa` (page aligned) until the result is dropped.
    fn map(&self, gpa: u64, area: &MappedArea) -> io::Result<Box<dyn Mapping>>;
}

/// A standing guest mapping. When its drop returns, the guest can no longer reach the memory.
pub trait Mapping: Debug + Send + Sync {}

/// A part of a BAR that is mapped into this process.
#[derive(Debug)]
pub struct MappedArea {
    offset: u64,
    size: u64,
    address: *mut c_void,
}

// SAFETY: the address names device memory that this process never dereferences; it is only handed to KVM.
unsafe impl Send for MappedArea {}
// SAFETY: as above; all fields are read-only after construction.
unsafe impl Sync for MappedArea {}

impl MappedArea {
    /// Maps `size` bytes at `offset` of `region`.
    fn new(handle: &Handle, region: &Region, offset: u64, size: u64) -> io::Result<Self> {
        let length = usize::try_from(size).map_err(io::Error::other)?;
        // SAFETY: a fresh mapping, placed where the kernel likes; nothing else is touched.
        let address = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                handle.as_fd(),
                region.offset + offset,
            )
        }?;
        Ok(Self { offset, size, address })
    }

    /// Offset within the BAR, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where it stands in this process.
    pub fn host_address(&self) -> u64 {
        self.address as u64
    }
}

impl Drop for MappedArea {
    fn drop(&mut self) {
        // `new` took the size from a usize.
        let length = usize::try_from(self.size).unwrap_or(0);
        // SAFETY: the mapping is ours, and the guest mappings over it were dropped before (the function owns both
        // and drops them in that order).
        if let Err(e) = unsafe { rustix::mm::munmap(self.address, length) } {
            log::error!("a BAR mapping cannot be removed: {e}");
        }
    }
}

/// One BAR or the ROM of an opened function.
#[derive(Debug)]
pub struct Bar {
    /// Which one.
    pub index: BarIndex,
    /// As the kernel describes it.
    pub region: Region,
    /// What of it may stand in the guest directly.
    pub areas: Vec<MappedArea>,
}

impl Bar {
    /// Maps what of the BAR can be mapped, less the pages that hold any of `trapped` (offset, size).
    ///
    /// A BAR that cannot be mapped is served by trapping its accesses: slower, and the same to the guest.
    pub fn new(handle: &Handle, index: BarIndex, region: Region, trapped: &[(u64, u64)]) -> Self {
        let mut areas = Vec::new();
        for (offset, size) in direct_ranges(&region, trapped) {
            match MappedArea::new(handle, &region, offset, size) {
                Ok(area) => areas.push(area),
                Err(e) => log::warn!(
                    "device {}: BAR {index} at {offset:#x} cannot be mapped ({e}); its accesses are trapped",
                    handle.name()
                ),
            }
        }
        Self { index, region, areas }
    }
}

/// The page-aligned parts of what the kernel lets us map that hold nothing of `trapped`.
fn direct_ranges(region: &Region, trapped: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = region
        .mappable
        .iter()
        .map(|&(offset, size)| (offset.next_multiple_of(PAGE_SIZE), (offset + size) / PAGE_SIZE * PAGE_SIZE))
        .collect();
    for &(offset, size) in trapped {
        let (hole_start, hole_end) =
            (offset / PAGE_SIZE * PAGE_SIZE, (offset + size).next_multiple_of(PAGE_SIZE));
        ranges = ranges
            .into_iter()
            .flat_map(|(start, end)| [(start, end.min(hole_start)), (start.max(hole_end), end)])
            .collect();
    }
    ranges.retain(|(start, end)| start < end);
    ranges.into_iter().map(|(start, end)| (start, end - start)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(size: u64) -> Region {
        Region { size, offset: 0, readable: true, mappable: vec![(0, size)] }
    }

    #[test]
    fn the_pages_of_the_msix_table_are_left_out() {
        assert_eq!(direct_ranges(&region(0x4000), &[(0x1800, 0x100)]), vec![(0, 0x1000), (0x2000, 0x2000)]);
        assert_eq!(direct_ranges(&region(0x4000), &[(0, 0x40), (0x3000, 8)]), vec![(0x1000, 0x2000)]);
    }

    #[test]
    fn a_bar_that_is_all_table_has_nothing_to_map() {
        assert_eq!(direct_ranges(&region(0x1000), &[(0, 0x100)]), vec![]);
    }

    #[test]
    fn a_bar_smaller_than_a_page_is_trapped() {
        assert_eq!(direct_ranges(&region(0x100), &[]), vec![]);
    }

    #[test]
    fn sparse_areas_are_kept_apart() {
        let sparse = Region { mappable: vec![(0, 0x1000), (0x3000, 0x1000)], ..region(0x4000) };
        assert_eq!(direct_ranges(&sparse, &[]), vec![(0, 0x1000), (0x3000, 0x1000)]);
    }
}
