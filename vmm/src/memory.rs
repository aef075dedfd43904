//! Guest RAM: host mappings for the ranges of the guest memory map, registered with KVM, and what is added to it later.
//!
//! ```text
//! zones      which zone of the configuration is where, and where it may grow
//! backing    one mapping: anonymous, shared, of huge pages, of a file; its node and its advice
//! prefault   all pages of a mapping, allocated by several threads
//! growth     RAM that is added to a running machine
//! persistent where files stand that are no RAM
//! numa       what the affinity tables say of it
//! ```

use std::fs::File;
use std::sync::Arc;

use arch::layout::AddressRange;
use devices::virtio::mem::Mem;
use devices::virtio::mem::blocks::Blocks;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionCollectionError, GuestRegionMmap,
};

use crate::config::{HotplugMethod, MemoryConfig, MemoryZoneConfig as ZoneConfig};
use crate::memslot::{Memslot, MemslotError, Memslots};
use crate::snapshot::ram::SavedRange;

mod backing;
pub mod growth;
pub mod numa;
pub mod persistent;
mod prefault;
#[cfg(test)]
mod tests;
mod zones;

pub use backing::BackingError;
pub use zones::{Zone, plan};

/// Why guest RAM could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host does not give the memory.
    #[error(transparent)]
    Backing(#[from] BackingError),
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

/// RAM that is there beyond what the machine was laid out with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Added {
    /// Which zone it is of.
    pub zone: usize,
    /// Where it is.
    pub range: AddressRange,
}

/// Guest RAM and the memory slots that show it to the guest.
#[derive(Debug)]
pub struct GuestRam {
    // Order matters: the slots go before the memory behind them is unmapped.
    slots: Vec<Memslot>,
    space: GuestMemoryAtomic<GuestMemoryMmap>,
    /// What the guest starts with, for those who fill it before.
    boot: Arc<GuestMemoryMmap>,
    zones: Vec<Zone>,
    added: Vec<Added>,
    pluggable: Vec<Arc<Mem>>,
    memslots: Arc<Memslots>,
    content: Option<Content>,
}

/// Where the content of RAM comes from when the guest first touches it: a file that must not change meanwhile.
#[derive(Clone, Debug)]
pub struct Content {
    /// The file.
    pub file: Arc<File>,
    /// What is where.
    pub ranges: Vec<SavedRange>,
}

impl Content {
    /// Where in the file the content of a range is, if it is all there, and in one piece.
    fn offset_of(&self, range: AddressRange) -> Option<u64> {
        crate::snapshot::ram::offset_of(&self.ranges, range.start.0, range.len)
    }
}

impl GuestRam {
    /// Maps the RAM of all zones and registers it, with what of their ranges for growth is to be there from the start. `content`: where that of
    /// private memory is read from when it is first touched.
    pub fn new(
        zones: Vec<Zone>,
        config: &MemoryConfig,
        memslots: &Arc<Memslots>,
        content: Option<Content>,
    ) -> Result<Self, MemoryError> {
        let mut regions = Vec::new();
        for zone in &zones {
            for part in &zone.parts {
                regions.push(Arc::new(backing::map(zone, part.range, part.offset, content.as_ref())?));
            }
        }
        let memory = GuestMemoryMmap::from_arc_regions(regions).map_err(MemoryError::Layout)?;
        let slots = memory.iter().map(|region| slot(memslots, region)).collect::<Result<_, _>>()?;
        let boot = Arc::new(memory);
        let mut ram = Self {
            slots,
            space: GuestMemoryAtomic::from(Arc::clone(&boot)),
            boot,
            zones,
            added: Vec::new(),
            pluggable: Vec::new(),
            memslots: Arc::clone(memslots),
            content,
        };
        if config.hotplug_method == HotplugMethod::VirtioMem {
            ram.add_pluggable()?;
        } else {
            for zone in 0..ram.zones.len() {
                let size = ram.zones[zone].config.hotplugged_size.unwrap_or(0);
                if let Some(range) = ram.room(zone, size).filter(|range| !range.is_empty()) {
                    let region = ram.map(zone, range)?;
                    ram.show(zone, &region)?;
                }
            }
        }
        Ok(ram)
    }

    /// The zone that the RAM at this address is of.
    fn zone_at(&self, address: u64) -> Option<&Zone> {
        let contains = |range: &AddressRange| range.start.0 <= address && address < range.end().0;
        self.zones.iter().find(|zone| {
            zone.parts.iter().any(|part| contains(&part.range)) || zone.hotplug.as_ref().is_some_and(contains)
        })
    }

    /// Whether the RAM at this address is a file of the user's, and what the guest writes is in it.
    pub fn is_users_file(&self, address: u64) -> bool {
        self.zone_at(address).is_some_and(|zone| zone.config.file.is_some() && zone.config.shared)
    }

    /// Whether the RAM at this address has a file of the user's behind it: it need not be all zero when it is new.
    pub fn has_file(&self, address: u64) -> bool {
        self.zone_at(address).is_some_and(|zone| zone.config.file.is_some())
    }

    /// Whether the content of the RAM at this address came with it.
    pub fn has_content(&self, address: u64) -> bool {
        let memory = self.now();
        let region = memory.find_region(GuestAddress(address));
        let file = region.and_then(|region| region.file_offset());
        self.content.as_ref().zip(file).is_some_and(|(content, file)| Arc::ptr_eq(&content.file, file.arc()))
    }

    /// What the guest starts with: for what is put there before it runs.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.boot
    }

    /// All RAM there is now and will be. A clone of it sees what is added later.
    pub fn space(&self) -> &GuestMemoryAtomic<GuestMemoryMmap> {
        &self.space
    }

    /// All RAM there is now.
    pub fn now(&self) -> Arc<GuestMemoryMmap> {
        self.space().memory().into_inner()
    }

    /// The zones, with their ranges for growth.
    pub fn zones(&self) -> &[Zone] {
        &self.zones
    }

    /// RAM that is there beyond what the machine was laid out with, in the order in which it came.
    pub fn added(&self) -> &[Added] {
        &self.added
    }

    /// RAM of a zone, in bytes.
    pub fn size(&self, zone: usize) -> u64 {
        let added = self.added.iter().filter(|added| added.zone == zone);
        let boot = self.zones.get(zone).map_or(0, |zone| zone.config.size);
        added.fold(boot, |sum, added| sum.saturating_add(added.range.len))
    }

    /// The next `size` bytes of the range where the zone may grow, if there is room for them.
    pub fn room(&self, zone: usize, size: u64) -> Option<AddressRange> {
        let range = self.zones.get(zone)?.hotplug?;
        let used: u64 =
            self.added.iter().filter(|added| added.zone == zone).map(|added| added.range.len).sum();
        let limit = self.zones.get(zone)?.config.hotplug_size?;
        let start = range.start.0.checked_add(used)?;
        (used.checked_add(size)? <= limit).then(|| AddressRange::new(GuestAddress(start), size))
    }

    /// Maps memory of a zone for `range`, which is in its range for growth. The guest does not have it yet.
    pub fn map(&self, zone: usize, range: AddressRange) -> Result<Arc<GuestRegionMmap>, MemoryError> {
        let Some(zone) = self.zones.get(zone) else {
            return Err(MemoryError::Layout(GuestRegionCollectionError::NoMemoryRegion));
        };
        let start = zone.hotplug.map_or(range.start.0, |hotplug| hotplug.start.0);
        let offset = zone.config.size.saturating_add(range.start.0.saturating_sub(start));
        Ok(Arc::new(backing::map(zone, range, offset, self.content.as_ref())?))
    }

    /// Gives mapped memory of a zone to the guest: a memory slot, and a place in the space that devices see. Nothing is left of it if it
    /// fails.
    pub fn show(&mut self, zone: usize, region: &Arc<GuestRegionMmap>) -> Result<(), MemoryError> {
        self.insert(region)?;
        self.added.push(Added { zone, range: AddressRange::new(region.start_addr(), region.len()) });
        Ok(())
    }

    fn insert(&mut self, region: &Arc<GuestRegionMmap>) -> Result<(), MemoryError> {
        let larger = self.now().insert_region(Arc::clone(region)).map_err(MemoryError::Layout)?;
        let slot = slot(&self.memslots, region)?;
        self.slots.push(slot);
        self.space.lock().unwrap_or_else(std::sync::PoisonError::into_inner).replace(larger);
        Ok(())
    }

    /// Makes the ranges where zones may grow memory that the guest plugs (virtio-mem). All of them are there as mapping and memory slot,
    /// and nothing of them takes memory yet.
    fn add_pluggable(&mut self) -> Result<(), MemoryError> {
        for zone in self.zones.clone() {
            let Some(range) = zone.hotplug else { continue };
            let page = backing::page_size(&zone)?;
            let region = Arc::new(backing::map_sparse(&zone, range, zone.config.size)?);
            self.insert(&region)?;
            let ZoneConfig { id, hugepages, prefault, reserve, hotplugged_size, .. } = &zone.config;
            // A page that is not there when the guest touches it would end the VM.
            let blocks = Blocks::new(region, page, *hugepages || *prefault || *reserve);
            let mem = Mem::new(id, zone.node, blocks, hotplugged_size.unwrap_or(0));
            self.pluggable.push(Arc::new(mem));
        }
        Ok(())
    }

    /// The devices through which the guest plugs memory: one for each zone that may grow so.
    pub fn pluggable(&self) -> &[Arc<Mem>] {
        &self.pluggable
    }

    /// RAM that is the guest's whether it plugs it or not.
    ///
    /// # Errors
    /// Regions do not fit together, which cannot be.
    pub fn fixed(&self) -> Result<GuestMemoryMmap, MemoryError> {
        let mut memory = GuestMemoryMmap::clone(&self.now());
        for blocks in self.pluggable.iter().map(|mem| mem.blocks()) {
            let (start, size) = (GuestAddress(blocks.start()), blocks.region_len());
            (memory, _) = memory.remove_region(start, size).map_err(MemoryError::Layout)?;
        }
        Ok(memory)
    }
}

/// A memory slot over a region, which must outlive it.
fn slot(memslots: &Arc<Memslots>, region: &GuestRegionMmap) -> Result<Memslot, MemoryError> {
    let gpa = region.start_addr().0;
    memslots
        .add(gpa, region.as_ptr() as u64, region.len())
        .map_err(|source| MemoryError::Slot { gpa, source })
}
