//! Guest RAM in the IOMMU: what the assigned functions may reach by DMA.
//!
//! All of guest RAM is mapped before the guest has it and stays so until it ends: a map can then not fail in the
//! guest's hands, and nothing is unmapped while a function with an address translation cache is asleep.
#![allow(unsafe_code)] // DMA maps hand host addresses to the kernel.

use log::error;
use pci::Bdf;
use vfio_ioctls::VfioError;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::check::MEMLOCK_MARGIN;
use super::open::IommuContext;

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
        DmaError { bdf: first, gpa, size, cause: e.to_string(), hint }
    })
}

/// Takes a region away again that no function has been told to reach.
pub fn unmap_region(context: &IommuContext, region: &GuestRegionMmap) {
    let (gpa, size) = (region.start_addr().raw_value(), region.len());
    let length = usize::try_from(size).unwrap_or(usize::MAX);
    if let Err(e) = context.ops().vfio_dma_unmap(gpa, length) {
        error!("guest memory at {gpa:#x} ({size:#x} bytes) stays mapped for DMA: {e}");
    }
}
