//! The blocks of a region of memory that the guest plugs and unplugs: which it has, what assigned devices reach of them, and what of the host's
//! memory they take.
//!
//! A plugged block is mapped for DMA before the guest hears that it has it, each block by itself: VFIO takes back whole maps only. An unplugged one is
//! given back to the host.

use std::fmt::Debug;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::{error, warn};
use vm_memory::{GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use super::super::discard::{discard_in, populate_in};

/// The smallest block: a transparent huge page.
pub const BLOCK_MIN: u64 = 2 << 20;
/// More blocks than this are not kept for one region: VFIO's maps of one context are 65535 at most.
const BLOCKS_MAX: u64 = 1 << 14;

/// What lets assigned devices reach memory.
pub trait DmaMap: Debug + Send + Sync {
    /// Maps `len` bytes at `offset` of `region`.
    ///
    /// # Errors
    /// The kernel refuses.
    fn map(&self, region: &GuestRegionMmap, offset: u64, len: u64) -> io::Result<()>;

    /// Takes a whole map back.
    ///
    /// # Errors
    /// The kernel refuses, or a device must not see it now.
    fn unmap(&self, region: &GuestRegionMmap, offset: u64, len: u64) -> io::Result<()>;
}

/// The size of the blocks of a region of `size` bytes over pages of `page` bytes.
pub fn block_size(size: u64, page: u64) -> u64 {
    let enough = size.div_ceil(BLOCKS_MAX).checked_next_power_of_two().unwrap_or(1 << 63);
    enough.max(BLOCK_MIN).max(page)
}

/// What the guest has of a range of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plugged {
    /// All of them.
    All,
    /// None of them.
    None,
    /// Some of them.
    Some,
}

/// The blocks of one region.
#[derive(Debug)]
pub struct Blocks {
    state: Mutex<State>,
    region: Arc<GuestRegionMmap>,
    size: u64,
    /// Whether a block's pages are all taken when it is plugged: there may be none left later.
    populate: bool,
}

#[derive(Debug)]
struct State {
    dma: Option<Arc<dyn DmaMap>>,
    plugged: Vec<bool>,
    count: u64,
}

impl Blocks {
    /// None is plugged yet. With `populate` all pages of a block are taken when it is plugged.
    pub fn new(region: Arc<GuestRegionMmap>, page: u64, populate: bool) -> Self {
        let size = block_size(region.len(), page);
        let count = usize::try_from(region.len() / size).unwrap_or(0);
        let state = State { dma: None, plugged: vec![false; count], count: 0 };
        Self { state: Mutex::new(state), region, size, populate }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> u64 {
        self.size
    }

    /// Bytes of all blocks.
    pub fn len(&self) -> u64 {
        u64::try_from(self.state().plugged.len()).unwrap_or(0).saturating_mul(self.size)
    }

    /// Whether there is no block at all.
    pub fn is_empty(&self) -> bool {
        self.state().plugged.is_empty()
    }

    /// The region's first address.
    pub fn start(&self) -> u64 {
        self.region.start_addr().0
    }

    /// Bytes of the region, of which the last may be less than a block.
    pub fn region_len(&self) -> u64 {
        self.region.len()
    }

    /// Bytes that are plugged.
    pub fn plugged_size(&self) -> u64 {
        self.state().count.saturating_mul(self.size)
    }

    /// The numbers of `count` blocks from guest address `address` on; `None` if that are no blocks of the region.
    pub fn range(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.start()).filter(|offset| offset.is_multiple_of(self.size))?;
        let first = usize::try_from(offset / self.size).ok()?;
        let end = first.checked_add(usize::from(count))?;
        (count > 0 && end <= self.state().plugged.len()).then_some(first..end)
    }

    /// What of a range is plugged.
    pub fn look(&self, range: Range<usize>) -> Plugged {
        let state = self.state();
        let blocks = state.plugged.get(range).unwrap_or_default();
        match blocks.iter().filter(|plugged| **plugged).count() {
            0 => Plugged::None,
            count if count == blocks.len() => Plugged::All,
            _ => Plugged::Some,
        }
    }

    fn offset(&self, block: usize) -> u64 {
        u64::try_from(block).unwrap_or(u64::MAX).saturating_mul(self.size)
    }

    /// Plugs blocks that are all unplugged. What fails leaves all as it was.
    ///
    /// # Errors
    /// The host has not the memory, or a device cannot reach it.
    pub fn plug(&self, range: Range<usize>) -> io::Result<()> {
        let mut state = self.state();
        for block in range.clone() {
            if let Err(e) = self.take(&state, block) {
                (range.start..block).for_each(|block| drop(self.give_back(&mut state, block)));
                return Err(e);
            }
            if let Some(plugged) = state.plugged.get_mut(block) {
                *plugged = true;
                state.count += 1;
            }
        }
        Ok(())
    }

    fn take(&self, state: &State, block: usize) -> io::Result<()> {
        let offset = self.offset(block);
        if self.populate {
            populate_in(&self.region, MemoryRegionAddress(offset), self.size)?;
        }
        if let Some(dma) = &state.dma
            && let Err(e) = dma.map(&self.region, offset, self.size)
        {
            self.discard(offset);
            return Err(e);
        }
        Ok(())
    }

    /// Unplugs blocks that are all plugged. Those before one that fails are unplugged.
    ///
    /// # Errors
    /// A device goes on to reach them.
    pub fn unplug(&self, range: Range<usize>) -> io::Result<()> {
        let mut state = self.state();
        range.into_iter().try_for_each(|block| self.give_back(&mut state, block))
    }

    /// Unplugs all there are.
    ///
    /// # Errors
    /// See [`Self::unplug`].
    pub fn unplug_all(&self) -> io::Result<()> {
        let mut state = self.state();
        let all = 0..state.plugged.len();
        all.into_iter().try_for_each(|block| self.give_back(&mut state, block))
    }

    fn give_back(&self, state: &mut State, block: usize) -> io::Result<()> {
        if !state.plugged.get(block).is_some_and(|plugged| *plugged) {
            return Ok(());
        }
        let offset = self.offset(block);
        if let Some(dma) = &state.dma {
            dma.unmap(&self.region, offset, self.size)?;
        }
        self.discard(offset);
        if let Some(plugged) = state.plugged.get_mut(block) {
            *plugged = false;
            state.count = state.count.saturating_sub(1);
        }
        Ok(())
    }

    /// No device reaches the block, so its pages are nobody's.
    fn discard(&self, offset: u64) {
        if let Err(e) = discard_in(&self.region, MemoryRegionAddress(offset), self.size) {
            warn!("memory that the guest has unplugged cannot be given to the host: {e}");
        }
    }

    /// Lets devices reach what is plugged now and what will be.
    ///
    /// # Errors
    /// The kernel refuses; then they reach none of it.
    pub fn attach(&self, dma: &Arc<dyn DmaMap>) -> io::Result<()> {
        let mut state = self.state();
        let plugged = |block: &usize| state.plugged.get(*block).is_some_and(|plugged| *plugged);
        for block in (0..state.plugged.len()).filter(plugged) {
            if let Err(e) = dma.map(&self.region, self.offset(block), self.size) {
                for mapped in (0..block).filter(plugged) {
                    if let Err(e) = dma.unmap(&self.region, self.offset(mapped), self.size) {
                        error!("a block of guest memory stays mapped for DMA: {e}");
                    }
                }
                return Err(e);
            }
        }
        state.dma = Some(Arc::clone(dma));
        Ok(())
    }

    /// There are no devices any more, and with them their maps have gone.
    pub fn detach(&self) {
        self.state().dma = None;
    }

    /// Which blocks are plugged, as pairs of first block and count.
    pub fn runs(&self) -> Vec<(usize, usize)> {
        let state = self.state();
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for (block, _) in state.plugged.iter().enumerate().filter(|(_, plugged)| **plugged) {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == block => *count += 1,
                _ => runs.push((block, 1)),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, MmapRegion};

    use super::*;

    const MIB: u64 = 1 << 20;
    const START: u64 = 1 << 32;

    fn region(blocks: u64) -> Arc<GuestRegionMmap> {
        let mapping = MmapRegion::new(usize::try_from(blocks * BLOCK_MIN).unwrap()).unwrap();
        Arc::new(GuestRegionMmap::new(mapping, GuestAddress(START)).unwrap())
    }

    /// Notes what is mapped, and refuses more than `limit` blocks.
    #[derive(Debug, Default)]
    struct Maps {
        mapped: Mutex<Vec<u64>>,
        limit: usize,
        stuck: bool,
    }

    impl DmaMap for Maps {
        fn map(&self, _region: &GuestRegionMmap, offset: u64, len: u64) -> io::Result<()> {
            assert_eq!(len, BLOCK_MIN);
            let mut mapped = self.mapped.lock().unwrap();
            assert!(!mapped.contains(&offset), "mapped twice");
            if mapped.len() >= self.limit {
                return Err(io::Error::from_raw_os_error(libc::ENOMEM));
            }
            mapped.push(offset);
            Ok(())
        }

        fn unmap(&self, _region: &GuestRegionMmap, offset: u64, _len: u64) -> io::Result<()> {
            if self.stuck {
                return Err(io::Error::from_raw_os_error(libc::EBUSY));
            }
            let mut mapped = self.mapped.lock().unwrap();
            let at = mapped.iter().position(|known| *known == offset).expect("unmapped what was not mapped");
            mapped.remove(at);
            Ok(())
        }
    }

    #[test]
    fn blocks_grow_with_the_region_and_are_no_smaller_than_its_pages() {
        assert_eq!(block_size(512 * MIB, 4096), 2 * MIB);
        assert_eq!(block_size(32 << 30, 4096), 2 * MIB);
        assert_eq!(block_size((32 << 30) + 1, 4096), 4 * MIB);
        assert_eq!(block_size(8 << 30, 1 << 30), 1 << 30);
    }

    #[test]
    fn only_whole_blocks_of_the_region_are_a_range() {
        let blocks = Blocks::new(region(8), 4096, false);
        assert_eq!(blocks.range(START, 8), Some(0..8));
        assert_eq!(blocks.range(START + 6 * BLOCK_MIN, 2), Some(6..8));
        for (address, count) in [
            (START, 0),
            (START, 9),
            (START - BLOCK_MIN, 1),
            (START + 4096, 1),
            (START + 8 * BLOCK_MIN, 1),
            (START + 7 * BLOCK_MIN, 2),
            (0, 1),
            (u64::MAX, u16::MAX),
        ] {
            assert_eq!(blocks.range(address, count), None, "{address:#x} {count}");
        }
    }

    #[test]
    fn what_is_unplugged_is_given_back_and_what_is_plugged_stays() {
        let region = region(4);
        let blocks = Blocks::new(Arc::clone(&region), 4096, true);
        blocks.plug(0..3).unwrap();
        let at = |block: u64| MemoryRegionAddress(block * BLOCK_MIN + 77);
        (0..3).for_each(|block| region.write_obj(5_u8, at(block)).unwrap());
        assert_eq!((blocks.plugged_size(), blocks.runs()), (3 * BLOCK_MIN, vec![(0, 3)]));
        blocks.unplug(1..2).unwrap();
        let read: Vec<u8> = (0..3).map(|block| region.read_obj(at(block)).unwrap()).collect();
        assert_eq!(read, [5, 0, 5]);
        assert_eq!(blocks.runs(), [(0, 1), (2, 1)]);
        assert_eq!(
            (blocks.look(0..1), blocks.look(0..2), blocks.look(3..4)),
            (Plugged::All, Plugged::Some, Plugged::None)
        );
        blocks.unplug_all().unwrap();
        assert_eq!((blocks.plugged_size(), blocks.look(0..4)), (0, Plugged::None));
    }

    #[test]
    fn devices_reach_exactly_what_is_plugged() {
        let blocks = Blocks::new(region(8), 4096, false);
        blocks.plug(2..4).unwrap();
        let maps = Arc::new(Maps { limit: 5, ..Maps::default() });
        let mapped = || maps.mapped.lock().unwrap().iter().map(|at| at / BLOCK_MIN).collect::<Vec<_>>();
        blocks.attach(&(Arc::clone(&maps) as _)).unwrap();
        assert_eq!(mapped(), [2, 3]);
        blocks.plug(6..8).unwrap();
        blocks.unplug(2..3).unwrap();
        assert_eq!(mapped(), [3, 6, 7]);
        // The kernel has no more than five: nothing is left of what was begun.
        assert!(blocks.plug(0..3).is_err());
        assert_eq!((mapped(), blocks.plugged_size()), (vec![3, 6, 7], 3 * BLOCK_MIN));
        blocks.detach();
        blocks.plug(0..3).unwrap();
        assert_eq!(mapped(), [3, 6, 7]);
        let few = Arc::new(Maps { limit: 2, ..Maps::default() });
        assert!(blocks.attach(&(Arc::clone(&few) as _)).is_err());
        assert!(few.mapped.lock().unwrap().is_empty());
    }

    #[test]
    fn a_block_that_a_device_goes_on_to_reach_stays_plugged_with_what_is_in_it() {
        let region = region(2);
        let blocks = Blocks::new(Arc::clone(&region), 4096, false);
        blocks.attach(&(Arc::new(Maps { limit: 9, stuck: true, ..Maps::default() }) as _)).unwrap();
        blocks.plug(0..2).unwrap();
        region.write_obj(5_u8, MemoryRegionAddress(0)).unwrap();
        assert!(blocks.unplug(0..2).is_err() && blocks.unplug_all().is_err());
        assert_eq!(
            (blocks.plugged_size(), region.read_obj(MemoryRegionAddress(0)).unwrap()),
            (2 * BLOCK_MIN, 5_u8)
        );
    }
}
