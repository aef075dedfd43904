//! RAM that is added to a running machine as an ACPI memory device: mapped, shown to assigned devices, to KVM and to the VMM's own, and
//! then to the guest. What fails is taken back, and the guest hears of nothing.

use arch::layout::HOTPLUG_ALIGN;
use devices::memory_slots::MemoryInSlot;
use devices::vfio::dma::DmaError;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use super::{GuestRam, MemoryError};
use crate::machine::Machine;

/// Why RAM cannot be added.
#[derive(Debug, thiserror::Error)]
pub enum GrowthError {
    /// No such zone.
    #[error("there is no memory zone {id:?}; there is {known}")]
    UnknownZone {
        /// The name asked for.
        id: String,
        /// Those there are.
        known: String,
    },
    /// The machine was not made for it.
    #[error("memory zone {zone} was given no hotplug_size; shut the VM down, resize it, and boot it")]
    NoRoom {
        /// The zone.
        zone: String,
    },
    /// Linux adds whole blocks.
    #[error("memory zone {zone}: {by} bytes more are no multiple of 128 MiB, in which memory is added")]
    NotBlocks {
        /// The zone.
        zone: String,
        /// How much is to be added.
        by: u64,
    },
    /// More than there may be.
    #[error("memory zone {zone}: {by} bytes more are more than the {left} that hotplug_size leaves")]
    Full {
        /// The zone.
        zone: String,
        /// How much is to be added.
        by: u64,
        /// How much can be.
        left: u64,
    },
    /// All devices are there.
    #[error("memory zone {zone}: memory can be added eight times; reboot the guest to add more")]
    Slots {
        /// The zone.
        zone: String,
    },
    /// The host.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// An assigned device cannot reach it.
    #[error(transparent)]
    Dma(#[from] DmaError),
}

/// The zone with this name.
pub fn find_zone(ram: &GuestRam, id: &str) -> Result<usize, GrowthError> {
    ram.zones().iter().position(|zone| zone.config.id == id).ok_or_else(|| GrowthError::UnknownZone {
        id: id.to_owned(),
        known: ram.zones().iter().map(|zone| zone.config.id.as_str()).collect::<Vec<_>>().join(", "),
    })
}

/// Adds `by` bytes to a zone of the machine.
///
/// # Errors
/// Then all is as it was before.
pub fn grow(machine: &mut Machine, zone: usize, by: u64) -> Result<(), GrowthError> {
    let name = || machine.ram.zones().get(zone).map_or_else(String::new, |zone| zone.config.id.clone());
    let Some(slots) = machine.memory_slots.clone() else { return Err(GrowthError::NoRoom { zone: name() }) };
    let Some(limit) = machine.ram.zones().get(zone).and_then(|zone| zone.config.hotplug_size) else {
        return Err(GrowthError::NoRoom { zone: name() });
    };
    if !by.is_multiple_of(HOTPLUG_ALIGN) {
        return Err(GrowthError::NotBlocks { zone: name(), by });
    }
    let Some(range) = machine.ram.room(zone, by) else {
        let boot = machine.ram.zones().get(zone).map_or(0, |zone| zone.config.size);
        let left = limit.saturating_sub(machine.ram.size(zone).saturating_sub(boot));
        return Err(GrowthError::Full { zone: name(), by, left });
    };
    if slots.free() == 0 {
        return Err(GrowthError::Slots { zone: name() });
    }
    let node = machine.ram.zones().get(zone).map_or(0, |zone| zone.node);
    let region = machine.ram.map(zone, range)?;
    // Before the guest can have a device reach it.
    machine.assigned.map_memory(&region, total(&machine.ram, &region))?;
    if let Err(e) = machine.ram.show(zone, &region) {
        machine.assigned.unmap_memory(&region);
        return Err(e.into());
    }
    // Those in other processes are told where the memory is before the guest puts anything there.
    machine.assigned.emulated().for_each(|function| function.memory_changed());
    slots.add(MemoryInSlot { base: range.start.0, size: range.len, node });
    Ok(())
}

fn total(ram: &GuestRam, more: &GuestRegionMmap) -> u64 {
    let now: u64 = (0..ram.zones().len()).map(|zone| ram.size(zone)).sum();
    now.saturating_add(more.len())
}
