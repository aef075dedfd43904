//! Where the zones of the configuration are in the guest: one after the other in its RAM ranges, and each with a range above all RAM
//! where it may grow.

use arch::layout::{AddressRange, LayoutError, MemoryMap};
use devices::virtio::mem::blocks::block_size;
use vm_memory::GuestAddress;

use crate::config::{HotplugMethod, MemoryConfig, MemoryZoneConfig, NumaConfig, node_of_zone};

/// A piece of a zone: one mapping, one memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where it is in the guest.
    pub range: AddressRange,
    /// How far into the zone.
    pub offset: u64,
}

/// A zone in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Zone {
    /// What the user says of it.
    pub config: MemoryZoneConfig,
    /// Whether transparent huge pages are asked for.
    pub thp: bool,
    /// The guest's node that it belongs to.
    pub node: u32,
    /// Its RAM at boot.
    pub parts: Vec<Part>,
    /// Where it may grow.
    pub hotplug: Option<AddressRange>,
}

impl Zone {
    /// Whether its RAM is memory that nobody else has and no file is behind.
    pub fn is_private(&self) -> bool {
        !self.config.shared && !self.config.hugepages && self.config.file.is_none()
    }
}

/// Puts all zones in their places, and keeps the ranges where they may grow free in `map`.
///
/// # Errors
/// [`LayoutError::NoRoomToGrow`].
pub fn plan(
    config: &MemoryConfig,
    nodes: Option<&[NumaConfig]>,
    map: &mut MemoryMap,
) -> Result<Vec<Zone>, LayoutError> {
    let mut ranges = map.ram().to_vec().into_iter();
    let mut free = ranges.next();
    let mut zones = Vec::new();
    for zone in config.effective_zones() {
        let (mut parts, mut offset) = (Vec::new(), 0);
        while offset < zone.size {
            let Some(range) = free else { break };
            let len = range.len.min(zone.size - offset);
            parts.push(Part { range: AddressRange::new(range.start, len), offset });
            offset += len;
            let rest = AddressRange::between(GuestAddress(range.start.0 + len), range.end());
            free = if rest.is_empty() { ranges.next() } else { Some(rest) };
        }
        zones.push(Zone {
            thp: config.thp,
            node: node_of_zone(nodes.unwrap_or_default(), &zone.id),
            parts,
            hotplug: None,
            config: zone,
        });
    }
    for zone in &mut zones {
        if let Some(size) = zone.config.hotplug_size {
            let mut align = zone.config.hugepage_size.unwrap_or(0);
            if config.hotplug_method == HotplugMethod::VirtioMem {
                align = block_size(size, align);
            }
            zone.hotplug = Some(map.reserve_hotplug(size, align)?);
        }
    }
    Ok(zones)
}
