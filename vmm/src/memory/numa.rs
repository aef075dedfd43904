//! What the affinity tables say: the nodes of processors, memory and devices.

use acpi::platform::{AddressRange, InitiatorAffinity, MemoryAffinity, NumaDescription};
use log::warn;
use pci::Bdf;

use super::Zone;
use crate::config::{NumaConfig, node_of_cpu};

/// Describes the nodes, if there are several or memory may be added: a guest without these tables takes all addresses that it may ever
/// have for those it has at boot. `apic_ids` are those of the vCPUs in their order; `device` says where a device is in the guest.
pub fn describe(
    nodes: Option<&[NumaConfig]>,
    zones: &[Zone],
    apic_ids: &[u32],
    device: impl Fn(&str) -> Option<Bdf>,
) -> Option<NumaDescription> {
    let nodes = nodes.unwrap_or_default();
    if nodes.is_empty() && zones.iter().all(|zone| zone.hotplug.is_none()) {
        return None;
    }
    let last = nodes.iter().map(|node| node.guest_numa_id).max().unwrap_or(0);
    let range = |range: arch::layout::AddressRange| AddressRange { base: range.start.0, size: range.len };
    let at_boot = zones.iter().flat_map(|zone| {
        zone.parts.iter().map(|part| MemoryAffinity {
            range: range(part.range),
            node: zone.node,
            hotplug: false,
        })
    });
    let later = zones.iter().filter_map(|zone| {
        Some(MemoryAffinity { range: range(zone.hotplug?), node: zone.node, hotplug: true })
    });
    let initiators = nodes.iter().filter_map(|node| {
        let id = node.device_id.as_deref()?;
        let Some(Bdf { segment, bus, devfn }) = device(id) else {
            warn!("device {id} is not there: the guest does not hear of its node {}", node.guest_numa_id);
            return None;
        };
        Some(InitiatorAffinity { segment, bus, devfn, node: node.guest_numa_id })
    });
    let distances = nodes.iter().flat_map(|node| {
        let to = node.distances.iter().flatten();
        to.map(|to| (node.guest_numa_id, to.destination, to.distance))
    });
    let segments = |node: &NumaConfig| node.pci_segments.clone().unwrap_or_default();
    Some(NumaDescription {
        nodes: u16::try_from(last).unwrap_or(u16::MAX).saturating_add(1),
        processors: (0..).zip(apic_ids).map(|(cpu, id)| (*id, node_of_cpu(nodes, cpu))).collect(),
        memory: at_boot.chain(later).collect(),
        initiators: initiators.collect(),
        distances: distances.collect(),
        pci_nodes: nodes
            .iter()
            .flat_map(|node| segments(node).into_iter().map(|segment| (segment, node.guest_numa_id)))
            .collect(),
    })
}
