//! Guest RAM in the IOMMU: what the assigned functions may reach by DMA.
//!
//! All of guest RAM is mapped before the guest has it and stays so until it ends: a map can then not fail in the
//! guest's hands, and nothing is unmapped while a function with an address translation cache is asleep. Memory that the guest plugs and
//! unplugs is mapped in blocks, which are plugged ones only (`BlockMaps`).
#![allow(unsafe_code)] // DMA maps hand host addresses to the kernel.

use std::io;
use std::sync::Arc;

use log::error;
use pci::Bdf;
use vfio_ioctls::VfioError;
use vm_memory::{
    Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
};

use super::check::MEMLOCK_MARGIN;
use super::open::IommuContext;
use crate::virtio::mem::Mem;
use crate::virtio::mem::blocks::DmaMap;

/// A map that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("device {bdf}: guest memory at {gpa:#x} ({size:#x} bytes) cannot be mapped for DMA: {cause}{hint}")]
pub struct DmaError {
    bdf: Bdf,
    gpa: u64,
    size: u64,
    cause: String,
    hint: String,
}

/// Maps all of `memory` at its guest addresses. `first` names the device in the error message.
pub fn map_guest_memory(
    context: &IommuContext,
    memory: &GuestMemoryMmap,
    first: Bdf,
) -> Result<(), DmaError> {
    let total = memory.iter().map(GuestMemoryRegion::len).sum();
    memory.iter().try_for_each(|region| map_region(context, region, total, first))
}

/// Maps one region of guest memory; `total` is how much there is of it in all.
pub fn map_region(
    context: &IommuContext,
    region: &GuestRegionMmap,
    total: u64,
    first: Bdf,
) -> Result<(), DmaError> {
    let (gpa, size) = (region.start_addr().raw_value(), region.len());
    let length = usize::try_from(size).unwrap_or(usize::MAX);
    // SAFETY: `region` is a live mapping of `length` bytes that the machine keeps until after the context is
    // gone, and guest memory is only ever used through volatile accesses and system calls.
    unsafe { context.ops().vfio_dma_map(gpa, length, region.as_ptr()) }.map_err(|e| {
        let errno = match &e {
            VfioError::IommuDmaMap(e) => e.errno(),
            _ => 0,
        };
        refused(first, gpa, size, total, errno, e.to_string())
    })
}

/// The error of a map that the kernel refused with `errno`.
fn refused(first: Bdf, gpa: u64, size: u64, total: u64, errno: i32, cause: String) -> DmaError {
    let hint = match errno {
        libc::ENOMEM => format!(
            "; RLIMIT_MEMLOCK is too low or the host has too little memory: raise it to at least {} KiB \
             ('ulimit -l', or LimitMEMLOCK= in a service)",
            (total + MEMLOCK_MARGIN).div_ceil(1024)
        ),
        libc::EEXIST => {
            "; another mapping stands there already: this is a defect, please report it".to_owned()
        }
        _ => "; the host's kernel log (dmesg) may say more".to_owned(),
    };
    DmaError { bdf: first, gpa, size, cause, hint }
}

/// Takes a region away again that no function has been told to reach.
pub fn unmap_region(context: &IommuContext, region: &GuestRegionMmap) {
    let (gpa, size) = (region.start_addr().raw_value(), region.len());
    let length = usize::try_from(size).unwrap_or(usize::MAX);
    if let Err(e) = context.ops().vfio_dma_unmap(gpa, length) {
        error!("guest memory at {gpa:#x} ({size:#x} bytes) stays mapped for DMA: {e}");
    }
}

/// Lets the functions of a context reach blocks of memory that the guest plugs.
#[derive(Debug)]
struct BlockMaps {
    context: Arc<IommuContext>,
    gate: Arc<dyn UnmapGate>,
}

/// Whether something may be unmapped now. A function that has no power cannot be told to forget a translation, and the host's IOMMU would
/// wait for it to.
pub trait UnmapGate: std::fmt::Debug + Send + Sync {
    /// The function that is in the way.
    fn asleep_with_translations(&self) -> Option<Bdf>;
}

impl DmaMap for BlockMaps {
    fn map(&self, region: &GuestRegionMmap, offset: u64, len: u64) -> io::Result<()> {
        let gpa = region.start_addr().raw_value().saturating_add(offset);
        let length = usize::try_from(len).map_err(io::Error::other)?;
        let slice = region.get_slice(MemoryRegionAddress(offset), length).map_err(io::Error::other)?;
        let address = slice.ptr_guard_mut().as_ptr();
        // SAFETY: as in `map_region`; the slice is `length` bytes of the region.
        unsafe { self.context.ops().vfio_dma_map(gpa, length, address) }.map_err(|e| match e {
            VfioError::IommuDmaMap(e) => io::Error::from_raw_os_error(e.errno()),
            e => io::Error::other(e.to_string()),
        })
    }

    fn unmap(&self, region: &GuestRegionMmap, offset: u64, len: u64) -> io::Result<()> {
        if let Some(bdf) = self.gate.asleep_with_translations() {
            return Err(io::Error::other(format!("device {bdf} is asleep and may know the address (ATS)")));
        }
        let gpa = region.start_addr().raw_value().saturating_add(offset);
        let length = usize::try_from(len).map_err(io::Error::other)?;
        let unmapped = self.context.ops().vfio_dma_unmap(gpa, length);
        unmapped.map_err(|e| io::Error::other(e.to_string()))
    }
}

/// Lets the functions of `context` reach what the guest has plugged of `all`, and what it will. `first` names the device in the error message.
///
/// # Errors
/// The kernel refuses.
pub fn attach_pluggable(
    context: &Arc<IommuContext>,
    all: &[Arc<Mem>],
    gate: &Arc<dyn UnmapGate>,
    first: Bdf,
) -> Result<(), DmaError> {
    for mem in all {
        let blocks = mem.blocks();
        let maps = BlockMaps { context: Arc::clone(context), gate: Arc::clone(gate) };
        blocks.attach(&(Arc::new(maps) as _)).map_err(|e| {
            let size = blocks.plugged_size();
            refused(first, blocks.start(), size, size, e.raw_os_error().unwrap_or(0), e.to_string())
        })?;
    }
    Ok(())
}
