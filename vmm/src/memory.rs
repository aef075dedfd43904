//! Guest RAM: host mappings for the ranges of the guest memory map, registered with KVM.

use std::fs::File;
use std::io;
use std::sync::Arc;

use devices::virtio::Memory;
use rustix::fs::MemfdFlags;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionCollectionError, GuestRegionMmap, MmapRegion, VolatileMemory,
};

use crate::config::MemoryConfig;
use crate::memslot::{Memslot, MemslotError, Memslots};
use crate::remedy::remedy;

/// Why guest RAM could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// `mmap` refused.
    #[error(
        "cannot map {size} bytes of guest memory: {source}; lower --memory size= or free memory on the host"
    )]
    Map {
        /// Bytes asked for.
        size: u64,
        /// What the kernel said.
        source: MmapRegionError,
    },
    /// The file behind shared memory could not be made.
    #[error("cannot create the file behind shared guest memory: {source}; {}", remedy(source))]
    Memfd {
        /// What the kernel said.
        source: io::Error,
    },
    /// KVM refused the slot.
    #[error(
        "cannot give guest memory at {gpa:#x} to KVM: {source}; the host's kernel log (dmesg) may say more"
    )]
    Slot {
        /// Guest address.
        gpa: u64,
        /// What KVM said.
        source: MemslotError,
    },
    /// Regions do not fit together.
    #[error("guest memory ranges do not fit together: {0}; this is a defect, please report it")]
    Layout(#[source] GuestRegionCollectionError),
}

/// Guest RAM and the memory slots that show it to the guest.
#[derive(Debug)]
pub struct GuestRam {
    // Order matters: the slots go before the memory behind them is unmapped.
    _slots: Vec<Memslot>,
    memory: GuestMemoryMmap,
    space: Memory,
}

impl GuestRam {
    /// Maps `ranges` (`(start, size)`) and registers them.
    pub fn new(
        config: &MemoryConfig,
        ranges: &[(GuestAddress, u64)],
        memslots: &Arc<Memslots>,
    ) -> Result<Self, MemoryError> {
        let regions = ranges
            .iter()
            .map(|&(start, size)| Ok(Arc::new(map_region(config, start, size)?)))
            .collect::<Result<Vec<_>, MemoryError>>()?;
        let memory = GuestMemoryMmap::from_arc_regions(regions).map_err(MemoryError::Layout)?;
        let slots = memory
            .iter()
            .map(|region| {
                let gpa = region.start_addr().0;
                memslots
                    .add(gpa, region.as_ptr() as u64, region.len())
                    .map_err(|source| MemoryError::Slot { gpa, source })
            })
            .collect::<Result<_, _>>()?;
        let space = Memory::new(memory.clone());
        Ok(Self { _slots: slots, memory, space })
    }

    /// The memory itself.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The memory as devices hold it, with what is added later.
    pub fn space(&self) -> &Memory {
        &self.space
    }
}

fn map_region(config: &MemoryConfig, start: GuestAddress, size: u64) -> Result<GuestRegionMmap, MemoryError> {
    let map_error = |source| MemoryError::Map { size, source };
    let length = usize::try_from(size).map_err(|_| map_error(MmapRegionError::InvalidPointer))?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let mut builder = MmapRegionBuilder::new(length).with_mmap_prot(protection);
    let mut flags = libc::MAP_NORESERVE;
    if config.shared {
        let file = rustix::fs::memfd_create("dormouse-ram", MemfdFlags::CLOEXEC)
            .map(File::from)
            .map_err(|e| MemoryError::Memfd { source: e.into() })?;
        file.set_len(size).map_err(|source| MemoryError::Memfd { source })?;
        flags |= libc::MAP_SHARED;
        builder = builder.with_file_offset(FileOffset::new(file, 0));
    } else {
        flags |= libc::MAP_ANONYMOUS | libc::MAP_PRIVATE;
    }
    if config.prefault {
        flags |= libc::MAP_POPULATE;
    }
    let region = builder.with_mmap_flags(flags).build().map_err(map_error)?;
    if start.0 == 0 {
        // The first 2 MiB hold boot structures of a few pages. A huge page there would be cleared in whole before the guest's
        // first instruction, which takes longer than all the rest of the start. One small page keeps it away; advice for
        // these 2 MiB alone would split the mapping for good.
        advise(&region, false);
        if let Ok(first) = region.get_ref::<u8>(0) {
            first.store(0);
        }
    }
    advise(&region, config.thp);
    GuestRegionMmap::new(region, start).ok_or(MemoryError::Layout(GuestRegionCollectionError::NoMemoryRegion))
}

/// Says whether transparent huge pages are wanted behind the region.
#[allow(unsafe_code)] // madvise takes an address.
fn advise(region: &MmapRegion, huge: bool) {
    use rustix::mm::{Advice, madvise};
    let advice = if huge { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
    // SAFETY: the range is the mapping just made; the advice changes how it is backed, not what it holds.
    if let Err(e) = unsafe { madvise(region.as_ptr().cast(), region.size(), advice) } {
        log::debug!("guest memory is backed by pages as the host likes: {e}");
    }
}
