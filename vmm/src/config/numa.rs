//! Nodes of the guest: which processors, memory zones and devices belong together, and how far they are from each other.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::VmConfig;
use super::option_parser::{IntegerList, Key, OptionError, OptionValue, Options, StringList, Tuples};

use Key::Value;

/// The largest number of a node: the distance table has a row for each up to it.
const LAST_NODE: u32 = 254;
/// Distance of a node to itself (ACPI 6.5, section 5.2.17).
const LOCAL_DISTANCE: u8 = 10;

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumaConfig {
    /// Its number.
    pub guest_numa_id: u32,
    /// Its vCPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<Vec<u32>>,
    /// Distances to other nodes; 20 where nothing is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distances: Option<Vec<NumaDistance>>,
    /// The assigned device that is this node, alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_id: Option<String>,
    /// Its memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_zones: Option<Vec<String>>,
    /// PCI segments that are near it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci_segments: Option<Vec<u16>>,
}

/// How far a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumaDistance {
    /// The other node.
    pub destination: u32,
    /// The distance, where 10 is that of a node to itself.
    pub distance: u8,
}

/// What is wrong with the nodes of a configuration.
#[derive(Debug, Error)]
pub enum NumaError {
    /// One number twice.
    #[error("--numa guest_numa_id={id} is given twice; give each node its own number")]
    SameNode {
        /// The number.
        id: u32,
    },
    /// A number out of reach.
    #[error("--numa guest_numa_id={id} is not possible; use 0 to {LAST_NODE}")]
    NodeNumber {
        /// The number.
        id: u32,
    },
    /// A zone that there is not.
    #[error("--numa guest_numa_id={id}: there is no memory zone {zone:?}; there is {known}")]
    UnknownZone {
        /// The node.
        id: u32,
        /// The zone.
        zone: String,
        /// Those there are.
        known: String,
    },
    /// A zone of two nodes.
    #[error("--numa guest_numa_id={id}: memory zone {zone:?} belongs to another node already; name it once")]
    SameZone {
        /// The node.
        id: u32,
        /// The zone.
        zone: String,
    },
    /// A vCPU that there is not.
    #[error("--numa guest_numa_id={id}: there is no vCPU {cpu}; there are 0 to {last}, as --cpus says")]
    UnknownCpu {
        /// The node.
        id: u32,
        /// The vCPU.
        cpu: u32,
        /// The last one.
        last: u32,
    },
    /// A vCPU of two nodes.
    #[error("--numa guest_numa_id={id}: vCPU {cpu} belongs to another node already; name it once")]
    SameCpu {
        /// The node.
        id: u32,
        /// The vCPU.
        cpu: u32,
    },
    /// A distance to nowhere.
    #[error(
        "--numa guest_numa_id={id}: distances name node {destination}, which there is not; add --numa guest_numa_id={destination}"
    )]
    UnknownDestination {
        /// The node.
        id: u32,
        /// The other.
        destination: u32,
    },
    /// A distance that makes the guest distrust them all.
    #[error(
        "--numa guest_numa_id={id}: distance {destination}@{distance} is not possible; it is 10 to the node itself, and more to any other"
    )]
    Distance {
        /// The node.
        id: u32,
        /// The other.
        destination: u32,
        /// How far.
        distance: u8,
    },
    /// A device with company.
    #[error(
        "--numa guest_numa_id={id}: a node of a device has neither cpus nor memory_zones; give them a node of their own"
    )]
    DeviceWithOthers {
        /// The node.
        id: u32,
    },
    /// A device that there is not.
    #[error(
        "--numa guest_numa_id={id}: there is no assigned device {device:?}; write --device path=...,id={device}"
    )]
    UnknownDevice {
        /// The node.
        id: u32,
        /// The device.
        device: String,
    },
    /// A segment that there is not.
    #[error(
        "--numa guest_numa_id={id}: there is no PCI segment {segment}; there are 0 to {last}, as --platform num_pci_segments says"
    )]
    UnknownSegment {
        /// The node.
        id: u32,
        /// The segment.
        segment: u16,
        /// The last one.
        last: u16,
    },
    /// Segment 0 is where everything is by default.
    #[error("--numa guest_numa_id={id}: PCI segment 0 can only belong to node 0")]
    DefaultSegment {
        /// The node.
        id: u32,
    },
}

impl NumaConfig {
    /// From one value of `--numa`.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        const KEYS: &[Key] = &[
            Value("guest_numa_id"),
            Value("cpus"),
            Value("distances"),
            Value("device_id"),
            Value("memory_zones"),
            Value("pci_segments"),
        ];
        const OPTION: &str = "--numa";
        let options = Options::parse(OPTION, text, KEYS)?;
        let distances = options.get::<Tuples<u32, u8>>("distances")?.map(|tuples| {
            let distances = tuples.0.into_iter();
            distances.map(|(destination, distance)| NumaDistance { destination, distance }).collect()
        });
        let missing = OptionError::MissingValue { option: OPTION, key: "guest_numa_id" };
        Ok(Self {
            guest_numa_id: options.get("guest_numa_id")?.ok_or(missing)?,
            cpus: options.get::<Numbers<u32>>("cpus")?.map(|list| list.0),
            distances,
            device_id: options.get("device_id")?,
            memory_zones: options.get::<StringList>("memory_zones")?.map(|list| list.0),
            pci_segments: options.get::<Numbers<u16>>("pci_segments")?.map(|list| list.0),
        })
    }

    fn zones(&self) -> &[String] {
        self.memory_zones.as_deref().unwrap_or_default()
    }

    fn cpus(&self) -> &[u32] {
        self.cpus.as_deref().unwrap_or_default()
    }
}

/// The node that a memory zone belongs to: that which names it, or the first that is not a device's.
pub fn node_of_zone(nodes: &[NumaConfig], zone: &str) -> u32 {
    node_that(nodes, |node| node.zones().iter().any(|name| name == zone))
}

/// The node that a vCPU belongs to, likewise.
pub fn node_of_cpu(nodes: &[NumaConfig], cpu: u32) -> u32 {
    node_that(nodes, |node| node.cpus().contains(&cpu))
}

fn node_that(nodes: &[NumaConfig], has: impl Fn(&NumaConfig) -> bool) -> u32 {
    let of_others =
        || nodes.iter().filter(|node| node.device_id.is_none()).map(|node| node.guest_numa_id).min();
    nodes.iter().find(|node| has(node)).map(|node| node.guest_numa_id).or_else(of_others).unwrap_or(0)
}

/// Checks the nodes against the rest of the configuration.
///
/// # Errors
/// The first thing that is wrong.
pub(super) fn validate(config: &VmConfig) -> Result<(), NumaError> {
    let nodes = config.numa.as_deref().unwrap_or_default();
    if nodes.is_empty() {
        return Ok(());
    }
    let zones: Vec<String> = config.memory.effective_zones().into_iter().map(|zone| zone.id).collect();
    let mut named = config.clone();
    named.name_devices();
    let devices: Vec<_> = named.devices.iter().flatten().filter_map(|device| device.id.clone()).collect();
    let last = config.cpus.max_vcpus.saturating_sub(1);
    let (mut ids, mut used_zones, mut used_cpus) = (HashSet::new(), HashSet::new(), HashSet::new());
    for node in nodes {
        let id = node.guest_numa_id;
        if id > LAST_NODE {
            return Err(NumaError::NodeNumber { id });
        }
        if !ids.insert(id) {
            return Err(NumaError::SameNode { id });
        }
        for zone in node.zones() {
            let zone = || zone.clone();
            if !zones.contains(&zone()) {
                return Err(NumaError::UnknownZone { id, zone: zone(), known: zones.join(", ") });
            }
            if !used_zones.insert(zone()) {
                return Err(NumaError::SameZone { id, zone: zone() });
            }
        }
        for &cpu in node.cpus() {
            if cpu > last {
                return Err(NumaError::UnknownCpu { id, cpu, last });
            }
            if !used_cpus.insert(cpu) {
                return Err(NumaError::SameCpu { id, cpu });
            }
        }
        if let Some(device) = &node.device_id {
            if !node.cpus().is_empty() || !node.zones().is_empty() {
                return Err(NumaError::DeviceWithOthers { id });
            }
            if !devices.contains(device) {
                return Err(NumaError::UnknownDevice { id, device: device.clone() });
            }
        }
        let segments = config.segment_count();
        for &segment in node.pci_segments.iter().flatten() {
            if segment >= segments {
                return Err(NumaError::UnknownSegment { id, segment, last: segments.saturating_sub(1) });
            }
            if segment == 0 && id != 0 {
                return Err(NumaError::DefaultSegment { id });
            }
        }
    }
    for node in nodes {
        let id = node.guest_numa_id;
        for &NumaDistance { destination, distance } in node.distances.iter().flatten() {
            if !ids.contains(&destination) {
                return Err(NumaError::UnknownDestination { id, destination });
            }
            let possible =
                if id == destination { distance == LOCAL_DISTANCE } else { distance > LOCAL_DISTANCE };
            if !possible {
                return Err(NumaError::Distance { id, destination, distance });
            }
        }
    }
    Ok(())
}

/// Integers of a smaller type.
struct Numbers<T>(Vec<T>);

impl<T: TryFrom<u64>> OptionValue for Numbers<T> {
    const EXPECTED: &'static str = IntegerList::EXPECTED;

    fn parse(text: &str) -> Option<Self> {
        IntegerList::parse(text)?.0.into_iter().map(|n| n.try_into().ok()).collect::<Option<_>>().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{CpusConfig, MemoryConfig, MemoryZoneConfig};
    use super::*;

    fn config(nodes: &[&str]) -> VmConfig {
        VmConfig {
            cpus: CpusConfig { boot_vcpus: 4, max_vcpus: 4, ..CpusConfig::default() },
            memory: MemoryConfig {
                size: 0,
                zones: Some(vec![
                    MemoryZoneConfig::parse("id=a").unwrap(),
                    MemoryZoneConfig::parse("id=b").unwrap(),
                ]),
                ..MemoryConfig::default()
            },
            devices: Some(vec![super::super::DeviceConfig::default()]),
            numa: Some(nodes.iter().map(|text| NumaConfig::parse(text).unwrap()).collect()),
            ..VmConfig::default()
        }
    }

    #[test]
    fn a_node_is_read_with_all_its_keys() {
        let node = NumaConfig::parse(
            "guest_numa_id=1,cpus=[0,2-3],distances=[0@20,2@30],memory_zones=[a,b],pci_segments=[0]",
        );
        let distance = |destination, distance| NumaDistance { destination, distance };
        let expected = NumaConfig {
            guest_numa_id: 1,
            cpus: Some(vec![0, 2, 3]),
            distances: Some(vec![distance(0, 20), distance(2, 30)]),
            device_id: None,
            memory_zones: Some(vec!["a".to_owned(), "b".to_owned()]),
            pci_segments: Some(vec![0]),
        };
        assert_eq!(node.unwrap(), expected);
        assert_eq!(
            NumaConfig::parse("guest_numa_id=2,device_id=gpu").unwrap().device_id.as_deref(),
            Some("gpu")
        );
        assert!(NumaConfig::parse("cpus=[0]").is_err());
        let text =
            r#"{"guest_numa_id":0,"distances":[{"destination":1,"distance":20}],"memory_zones":["a"]}"#;
        let json: NumaConfig = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&json).unwrap(), text);
    }

    #[test]
    fn what_no_node_names_belongs_to_the_first_that_is_not_a_devices() {
        let config = config(&[
            "guest_numa_id=0,device_id=_vfio0",
            "guest_numa_id=2,cpus=[1],memory_zones=b",
            "guest_numa_id=1",
        ]);
        assert!(validate(&config).is_ok());
        let nodes = config.numa.unwrap();
        assert_eq!((node_of_zone(&nodes, "b"), node_of_zone(&nodes, "a")), (2, 1));
        assert_eq!((node_of_cpu(&nodes, 1), node_of_cpu(&nodes, 0)), (2, 1));
        assert_eq!((node_of_cpu(&[], 1), node_of_zone(&[], "mem0")), (0, 0));
    }

    #[test]
    fn a_node_can_have_every_segment_that_there_is_but_the_first() {
        let mut config = config(&["guest_numa_id=0,pci_segments=[0]", "guest_numa_id=1,pci_segments=[1-2]"]);
        assert!(validate(&config).unwrap_err().to_string().contains("segment 1; there are 0 to 0"));
        config.platform = Some(super::super::PlatformConfig::parse("num_pci_segments=3").unwrap());
        assert!(validate(&config).is_ok());
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_the_node_and_the_remedy() {
        for (nodes, words) in [
            (&["guest_numa_id=0", "guest_numa_id=0"][..], &["guest_numa_id=0", "twice"][..]),
            (&["guest_numa_id=255"], &["255", "0 to 254"]),
            (&["guest_numa_id=0,memory_zones=[a,none]"], &["none", "a, b"]),
            (
                &["guest_numa_id=0,memory_zones=[a]", "guest_numa_id=1,memory_zones=[a]"],
                &["guest_numa_id=1", "once"],
            ),
            (&["guest_numa_id=0,cpus=[4]"], &["vCPU 4", "0 to 3"]),
            (&["guest_numa_id=0,cpus=[1]", "guest_numa_id=1,cpus=[1]"], &["vCPU 1", "once"]),
            (&["guest_numa_id=0,distances=[1@20]"], &["--numa guest_numa_id=1"]),
            (&["guest_numa_id=0,distances=[1@10]", "guest_numa_id=1"], &["1@10"]),
            (&["guest_numa_id=0,distances=[0@20]"], &["0@20"]),
            (&["guest_numa_id=0,device_id=_vfio0,cpus=[0]"], &["neither cpus"]),
            (&["guest_numa_id=0,device_id=gpu"], &["gpu", "id=gpu"]),
            (&["guest_numa_id=0,pci_segments=[1]"], &["segment 1"]),
            (&["guest_numa_id=1,pci_segments=[0]"], &["node 0"]),
        ] {
            let message = validate(&config(nodes)).unwrap_err().to_string();
            assert!(words.iter().all(|word| message.contains(word)), "{words:?}: {message}");
        }
    }
}
