//! Giving guest memory back to the host, and when that must not be: the pages behind what an assigned device may reach are pinned, so the device would
//! go on to use pages that the guest sees no more.
#![allow(unsafe_code)] // madvise takes an address.

use std::io;
use std::sync::{Arc, PoisonError, RwLock};

use log::info;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::mm::{Advice, madvise};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

/// The smallest page.
pub const PAGE_SIZE: u64 = 4096;

/// The one that gives memory back. All devices of a machine share one.
#[derive(Debug, Default)]
pub struct Discarder {
    /// How many reasons there are not to.
    pins: RwLock<usize>,
}

impl Discarder {
    /// Nothing is given back as long as the result lives: a device is about to pin all memory. Waits for what is being given back.
    pub fn pinned(this: &Arc<Self>) -> Pin {
        this.pin();
        Pin(Arc::clone(this))
    }

    fn pin(&self) {
        let mut pins = self.pins.write().unwrap_or_else(PoisonError::into_inner);
        *pins += 1;
        if *pins == 1 {
            info!(
                "the guest's memory is pinned for an assigned device: what the guest gives up stays with it"
            );
        }
    }

    /// One reason less.
    fn unpin(&self) {
        let mut pins = self.pins.write().unwrap_or_else(PoisonError::into_inner);
        *pins = pins.saturating_sub(1);
    }

    /// Whether memory can be given back now.
    pub fn is_allowed(&self) -> bool {
        *self.pins.read().unwrap_or_else(PoisonError::into_inner) == 0
    }

    /// Gives `len` bytes at `address` back to the host; the guest reads zeroes there afterwards. Returns how many bytes that were: none while
    /// memory is pinned. What is not whole pages, or not in memory, is left alone.
    ///
    /// # Errors
    /// The kernel does not do it.
    pub fn discard(&self, memory: &GuestMemoryMmap, address: u64, len: u64) -> io::Result<u64> {
        let pins = self.pins.read().unwrap_or_else(PoisonError::into_inner);
        if *pins > 0 {
            return Ok(0);
        }
        let Some(end) = address.checked_add(len) else { return Ok(0) };
        let (mut next, end) = (address.next_multiple_of(PAGE_SIZE), end / PAGE_SIZE * PAGE_SIZE);
        let mut given = 0;
        while next < end {
            let Some((region, offset)) = memory.to_region_addr(GuestAddress(next)) else { break };
            let count = (end - next).min(region.len().saturating_sub(offset.0));
            discard_in(region, offset, count)?;
            given += count;
            next += count;
        }
        Ok(given)
    }
}

/// Gives whole pages of a region back to the host, whether or not anything is pinned.
pub(super) fn discard_in(
    region: &vm_memory::GuestRegionMmap,
    offset: MemoryRegionAddress,
    count: u64,
) -> io::Result<()> {
    // A file that is only read keeps what it has.
    let is_shared = region.flags() & libc::MAP_SHARED != 0;
    if let Some(file) = region.file_offset().filter(|_| is_shared) {
        // Shared memory is in a file; only a hole in it frees the page for all who map it.
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(file.file(), flags, file.start() + offset.0, count)?;
        return Ok(());
    }
    let length = usize::try_from(count).map_err(io::Error::other)?;
    let slice = region.get_slice(offset, length).map_err(io::Error::other)?;
    let address = slice.ptr_guard_mut().as_ptr();
    // SAFETY: the range is `count` bytes of the region's own mapping, which outlives this call; what is in it the guest has given up, and
    // nothing here holds references into guest memory.
    unsafe { madvise(address.cast(), length, Advice::LinuxDontNeed) }?;
    Ok(())
}

/// Takes all pages of a part of a region from the host now.
pub(super) fn populate_in(
    region: &vm_memory::GuestRegionMmap,
    offset: MemoryRegionAddress,
    count: u64,
) -> io::Result<()> {
    let length = usize::try_from(count).map_err(io::Error::other)?;
    let slice = region.get_slice(offset, length).map_err(io::Error::other)?;
    let address = slice.ptr_guard_mut().as_ptr();
    // SAFETY: the range is `count` bytes of the region's own mapping, which outlives this call; what is in it stays.
    unsafe { madvise(address.cast(), length, Advice::LinuxPopulateWrite) }?;
    Ok(())
}

/// Memory is pinned.
#[derive(Debug)]
pub struct Pin(Arc<Discarder>);

impl Drop for Pin {
    fn drop(&mut self) {
        self.0.unpin();
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn what_is_given_back_reads_as_zero_and_what_is_beside_it_stays() {
        let memory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MIB), (GuestAddress(1 << 20), MIB)]).unwrap();
        let discarder = Discarder::default();
        let edge = 1_u64 << 20;
        memory.write_slice(&[7; 4 * 4096], GuestAddress(edge - 2 * 4096)).unwrap();
        // From the middle of one page to the middle of another, over the edge between two regions.
        let given = discarder.discard(&memory, edge - 2 * 4096 + 100, 3 * 4096).unwrap();
        assert_eq!(given, 2 * 4096);
        let byte = |address: u64| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        assert_eq!(
            [byte(edge - 4097), byte(edge - 4096), byte(edge + 4095), byte(edge + 4096)],
            [7, 0, 0, 7]
        );
    }

    #[test]
    fn while_memory_is_pinned_nothing_is_given_back() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MIB)]).unwrap();
        let discarder = Arc::new(Discarder::default());
        memory.write_obj(9_u8, GuestAddress(8192)).unwrap();
        let pins = [Discarder::pinned(&discarder), Discarder::pinned(&discarder)];
        let [first, second] = pins;
        drop(first);
        assert_eq!(discarder.discard(&memory, 8192, 4096).unwrap(), 0);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(8192)).unwrap(), 9);
        drop(second);
        assert_eq!(discarder.discard(&memory, 8192, 4096).unwrap(), 4096);
    }

    #[test]
    fn what_is_not_there_is_left_alone() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MIB)]).unwrap();
        let discarder = Discarder::default();
        for (address, len) in
            [(1 << 20, 4096), (u64::MAX - 4095, 8192), (0, 0), (1, 4096), (u64::MAX / 4096 * 4096, 4095)]
        {
            assert_eq!(discarder.discard(&memory, address, len).unwrap(), 0, "{address:#x}");
        }
        assert_eq!(discarder.discard(&memory, (1 << 20) - 4096, 1 << 30).unwrap(), 4096);
    }
}
