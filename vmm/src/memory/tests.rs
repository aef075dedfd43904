//! Zones in their places, mappings of every kind, and what the affinity tables are told. Memory slots need KVM: the scenarios have them.

use std::fs;
use std::path::PathBuf;

use acpi::platform::{AddressRange as Range, InitiatorAffinity, MemoryAffinity};
use arch::layout::{AddressRange, MemoryMap};
use pci::Bdf;
use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use super::zones::{Part, Zone};
use super::{BackingError, backing, numa, plan};
use crate::config::{MemoryConfig, MemoryZoneConfig, NumaConfig};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn range(start: u64, len: u64) -> AddressRange {
    AddressRange::new(GuestAddress(start), len)
}

fn config(zones: &[&str]) -> MemoryConfig {
    let zones = zones.iter().map(|text| MemoryZoneConfig::parse(text).unwrap()).collect();
    MemoryConfig { size: 0, zones: Some(zones), ..MemoryConfig::default() }
}

fn planned(config: &MemoryConfig, nodes: &[NumaConfig]) -> Vec<Zone> {
    let mut map = MemoryMap::new(config.boot_size(), 46).unwrap();
    plan(config, Some(nodes), &mut map).unwrap()
}

fn nodes(texts: &[&str]) -> Vec<NumaConfig> {
    texts.iter().map(|text| NumaConfig::parse(text).unwrap()).collect()
}

/// One zone of 64 MiB at an address that is not the first.
fn zone(keys: &str) -> Zone {
    let config = MemoryZoneConfig::parse(&format!("id=z,size=64M{keys}")).unwrap();
    Zone { config, thp: true, node: 0, parts: Vec::new(), hotplug: None }
}

fn map(zone: &Zone) -> Result<GuestRegionMmap, BackingError> {
    backing::map(zone, range(GIB, 64 * MIB), 0, None)
}

/// A file of the test's own, which goes away with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str, size: u64) -> Self {
        let path = std::env::temp_dir().join(format!("dormouse-{}-{name}", std::process::id()));
        fs::File::create(&path).unwrap().set_len(size).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn zones_follow_each_other_and_are_cut_where_ram_is() {
    let zones = planned(&config(&["id=a,size=2G", "id=b,size=2G", "id=c,size=1G"]), &[]);
    assert_eq!(zones[0].parts, [Part { range: range(0, 2 * GIB), offset: 0 }]);
    assert_eq!(
        zones[1].parts,
        [Part { range: range(2 * GIB, GIB), offset: 0 }, Part { range: range(4 * GIB, GIB), offset: GIB }]
    );
    assert_eq!(zones[2].parts, [Part { range: range(5 * GIB, GIB), offset: 0 }]);
}

#[test]
fn each_zone_grows_in_a_range_of_its_own_above_all_ram() {
    let zones = planned(
        &config(&["id=a,size=1G,hotplug_size=1G", "id=b,size=1G", "id=c,size=1G,hotplug_size=200M"]),
        &[],
    );
    assert_eq!(zones[0].hotplug, Some(range(4 * GIB, GIB)));
    assert_eq!(zones[1].hotplug, None);
    assert_eq!(zones[2].hotplug, Some(range(5 * GIB, 256 * MIB)));
}

#[test]
fn a_machine_without_zones_has_one_mapping_for_each_ram_range() {
    let plain = MemoryConfig { size: 4 * GIB, ..MemoryConfig::default() };
    let zones = planned(&plain, &[]);
    assert_eq!(zones.len(), 1);
    assert_eq!(
        zones[0].parts.iter().map(|part| part.range).collect::<Vec<_>>(),
        [range(0, 3 * GIB), range(4 * GIB, GIB)]
    );
}

#[test]
fn the_affinity_tables_name_all_memory_and_a_device_that_is_there() {
    let nodes = nodes(&[
        "guest_numa_id=0,cpus=[0],memory_zones=[a],distances=[1@30],pci_segments=[0]",
        "guest_numa_id=1,cpus=[1],memory_zones=[b]",
        "guest_numa_id=4,device_id=gpu",
        "guest_numa_id=5,device_id=gone",
    ]);
    let zones = planned(&config(&["id=a,size=1G", "id=b,size=1G,hotplug_size=1G"]), &nodes);
    let gpu: Bdf = "0000:01:00.0".parse().unwrap();
    let numa = numa::describe(Some(&nodes), &zones, &[0, 8], |id| (id == "gpu").then_some(gpu)).unwrap();
    let memory = |base, node, hotplug| MemoryAffinity { range: Range { base, size: GIB }, node, hotplug };
    assert_eq!(numa.memory, [memory(0, 0, false), memory(GIB, 1, false), memory(4 * GIB, 1, true)]);
    assert_eq!(numa.processors, [(0, 0), (8, 1)]);
    assert_eq!(numa.distances, [(0, 1, 30)]);
    assert_eq!(numa.initiators, [InitiatorAffinity { segment: 0, bus: 1, devfn: gpu.devfn, node: 4 }]);
    assert_eq!((numa.nodes, numa.pci_nodes), (6, vec![(0, 0)]));
}

#[test]
fn a_machine_that_can_grow_has_one_node_and_one_that_cannot_has_no_tables() {
    let fixed = planned(&config(&["id=a,size=1G"]), &[]);
    assert_eq!(numa::describe(None, &fixed, &[0], |_| None), None);
    let growing = planned(&config(&["id=a,size=1G,hotplug_size=1G"]), &[]);
    let numa = numa::describe(None, &growing, &[0], |_| None).unwrap();
    assert_eq!((numa.nodes, numa.processors, numa.memory.len()), (1, vec![(0, 0)], 2));
}

#[test]
fn shared_memory_has_a_file_that_others_can_map_and_private_memory_has_none() {
    let shared = map(&zone(",shared=on")).unwrap();
    let file = shared.file_offset().expect("a file");
    assert_eq!((file.start(), file.file().metadata().unwrap().len()), (0, 64 * MIB));
    assert!(map(&zone("")).unwrap().file_offset().is_none());
}

#[test]
fn a_shared_file_gets_what_the_guest_writes_and_a_private_one_does_not() {
    for (shared, found) in [("on", 7), ("off", 0)] {
        let file = Scratch::new(&format!("file-{shared}"), 65 * MIB);
        let zone = zone(&format!(",file={},shared={shared}", file.0.display()));
        // A mebibyte into the file, as the second piece of a zone is.
        let region = backing::map(&zone, range(GIB, 64 * MIB), MIB, None).unwrap();
        region.write_obj(7_u8, MemoryRegionAddress(5)).unwrap();
        assert_eq!(fs::read(&file.0).unwrap()[0x10_0005], found, "shared={shared}");
    }
}

#[test]
fn files_that_cannot_be_used_are_refused_with_the_zone_and_the_remedy() {
    let short = Scratch::new("short", 4096);
    for (file, words) in [
        ("/no/such/file".to_owned(), &["zone z", "/no/such/file", "No such file", "truncate"][..]),
        (std::env::temp_dir().display().to_string(), &["zone z", "directory"]),
        (short.0.display().to_string(), &["zone z", "4096 bytes", "67108864", "truncate"]),
    ] {
        let message = map(&zone(&format!(",file={file},shared=on"))).unwrap_err().to_string();
        assert!(words.iter().all(|word| message.contains(word)), "{words:?}: {message}");
    }
}

#[test]
fn huge_pages_that_the_host_does_not_have_are_refused() {
    let message = map(&zone(",hugepages=on,hugepage_size=64K")).unwrap_err().to_string();
    assert!(message.contains("zone z") && message.contains("65536"), "{message}");
}

#[test]
fn a_node_that_the_host_does_not_have_is_refused() {
    for node in [1000, 5000] {
        let message = map(&zone(&format!(",host_numa_node={node}"))).unwrap_err().to_string();
        assert!(message.contains(&format!("host_numa_node={node}")), "{message}");
    }
}

#[test]
fn the_hosts_first_node_gives_memory_and_all_of_it_at_once_if_wanted() {
    let region = map(&zone(",host_numa_node=0,prefault=on,mergeable=on,reserve=on")).unwrap();
    assert_eq!(region.len(), 64 * MIB);
    let policies = fs::read_to_string("/proc/self/numa_maps").unwrap();
    let address = format!("{:x} ", region.as_ptr() as usize);
    let line = policies.lines().find(|line| line.starts_with(&address)).expect("its mapping");
    assert!(line.contains("bind:0") || line.contains("bind=static:0"), "{line}");
}
