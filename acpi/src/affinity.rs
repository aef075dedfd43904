//! Which processors, memory and devices belong together: the system resource affinity table (ACPI 6.5, section 5.2.16) and the
//! system locality distance table (section 5.2.17).
//!
//! A machine of one node without memory that may be added has neither.

use acpi_tables::sdt::Sdt;

use crate::fixed::{HEADER_LENGTH, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::platform::{MemoryAffinity, NumaDescription};

/// Structures of the affinity table (table 5.59 and those after it).
mod structure {
    pub(super) const LOCAL_APIC: u8 = 0;
    pub(super) const MEMORY: u8 = 1;
    pub(super) const LOCAL_X2APIC: u8 = 2;
    pub(super) const GENERIC_INITIATOR: u8 = 5;
}

const SRAT_REVISION: u8 = 3;
const SLIT_REVISION: u8 = 1;
/// What the table's own revision field must be, for compatibility.
const SRAT_TABLE_REVISION: u32 = 1;
/// Flags of all structures.
const ENABLED: u32 = 1;
/// Flags of memory: it may come later.
const HOT_PLUGGABLE: u32 = 1 << 1;
/// The device handle of a generic initiator is a PCI function (table 5.66).
const HANDLE_PCI: u8 = 1;

/// Distance of a node to itself, as the specification fixes it.
const LOCAL_DISTANCE: u8 = 10;
/// Distance of two nodes of which nothing is said.
const REMOTE_DISTANCE: u8 = 20;

/// The affinity table.
pub(crate) fn srat(numa: &NumaDescription) -> Vec<u8> {
    let mut srat = Sdt::new(*b"SRAT", HEADER_LENGTH, SRAT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    srat.append_slice(&SRAT_TABLE_REVISION.to_le_bytes());
    srat.append_slice(&[0; 8]);
    for &(apic_id, node) in &numa.processors {
        srat.append_slice(&processor(apic_id, node));
    }
    for memory in &numa.memory {
        srat.append_slice(&memory_range(memory));
    }
    for initiator in &numa.initiators {
        let mut bytes = vec![structure::GENERIC_INITIATOR, 32, 0, HANDLE_PCI];
        bytes.extend_from_slice(&initiator.node.to_le_bytes());
        bytes.extend_from_slice(&initiator.segment.to_le_bytes());
        bytes.extend_from_slice(&[initiator.bus, initiator.devfn.bits()]);
        bytes.extend_from_slice(&[0; 12]);
        bytes.extend_from_slice(&ENABLED.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        srat.append_slice(&bytes);
    }
    srat.as_slice().to_vec()
}

fn processor(apic_id: u32, node: u32) -> Vec<u8> {
    let [node0, node1, node2, node3] = node.to_le_bytes();
    // 255 is the broadcast id of an APIC.
    match u8::try_from(apic_id) {
        Ok(apic_id @ ..=254) => {
            let mut bytes = vec![structure::LOCAL_APIC, 16, node0, apic_id];
            bytes.extend_from_slice(&ENABLED.to_le_bytes());
            bytes.extend_from_slice(&[0, node1, node2, node3]);
            bytes.extend_from_slice(&[0; 4]);
            bytes
        }
        _ => {
            let mut bytes = vec![structure::LOCAL_X2APIC, 24, 0, 0];
            for field in [node, apic_id, ENABLED, 0, 0] {
                bytes.extend_from_slice(&field.to_le_bytes());
            }
            bytes
        }
    }
}

fn memory_range(memory: &MemoryAffinity) -> Vec<u8> {
    let flags = if memory.hotplug { ENABLED | HOT_PLUGGABLE } else { ENABLED };
    let mut bytes = vec![structure::MEMORY, 40];
    bytes.extend_from_slice(&memory.node.to_le_bytes());
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&memory.range.base.to_le_bytes());
    bytes.extend_from_slice(&memory.range.size.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&flags.to_le_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes
}

/// The distance table: a row for each node from 0 to the last, as the nodes' numbers are the indices.
pub(crate) fn slit(numa: &NumaDescription) -> Vec<u8> {
    let mut slit = Sdt::new(*b"SLIT", HEADER_LENGTH, SLIT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let count = u32::from(numa.nodes);
    slit.append_slice(&u64::from(count).to_le_bytes());
    for from in 0..count {
        let row: Vec<u8> = (0..count).map(|to| distance(numa, from, to)).collect();
        slit.append_slice(&row);
    }
    slit.as_slice().to_vec()
}

fn distance(numa: &NumaDescription, from: u32, to: u32) -> u8 {
    if from == to {
        return LOCAL_DISTANCE;
    }
    let given = numa.distances.iter().find(|(a, b, _)| (*a, *b) == (from, to));
    given.map_or(REMOTE_DISTANCE, |(_, _, distance)| *distance)
}

#[cfg(test)]
mod tests {
    use pci::DevFn;

    use super::*;
    use crate::platform::{AddressRange, InitiatorAffinity};

    fn two_nodes() -> NumaDescription {
        NumaDescription {
            nodes: 3,
            processors: vec![(0, 0), (300, 0x0102_0304)],
            memory: vec![MemoryAffinity {
                range: AddressRange { base: 0x1_0000_0000, size: 0x800_0000 },
                node: 1,
                hotplug: true,
            }],
            initiators: vec![InitiatorAffinity {
                segment: 0,
                bus: 2,
                devfn: DevFn::from_bits(0x19),
                node: 2,
            }],
            distances: vec![(0, 1, 30), (1, 0, 31)],
            pci_nodes: Vec::new(),
        }
    }

    #[test]
    fn the_affinity_table_has_every_structure_at_its_length() {
        let srat = srat(&two_nodes());
        assert_eq!(srat.len(), 48 + 16 + 24 + 40 + 32);
        assert_eq!(srat.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0, "checksum");
        assert_eq!(srat[36..48], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(srat[48..64], [0, 16, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        // The processor whose id is too large for a byte.
        assert_eq!(srat[64..80], [2, 24, 0, 0, 4, 3, 2, 1, 0x2c, 1, 0, 0, 1, 0, 0, 0]);
        let memory = &srat[88..128];
        assert_eq!(memory[..6], [1, 40, 1, 0, 0, 0]);
        assert_eq!(memory[8..24], [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0]);
        assert_eq!(memory[28..32], [3, 0, 0, 0]);
        let initiator = &srat[128..];
        assert_eq!(initiator[..12], [5, 32, 0, 1, 2, 0, 0, 0, 0, 0, 2, 0x19]);
        assert_eq!(initiator[24..28], [1, 0, 0, 0]);
    }

    #[test]
    fn distances_are_as_given_and_20_where_nothing_is_said() {
        let slit = slit(&two_nodes());
        assert_eq!(slit[36..44], [3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(slit[44..], [10, 30, 20, 31, 10, 20, 20, 20, 10]);
        assert_eq!(slit.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0, "checksum");
    }
}
