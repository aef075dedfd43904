//! Memory in its parts: zones, what of them may be added later, and whether all of it makes sense together.
//!
//! Names, defaults and rules are Cloud Hypervisor's, except that a zone may grow by ACPI too.

use std::collections::HashSet;
use std::path::PathBuf;

use arch::layout::{HOTPLUG_ALIGN, MIN_RAM};
use devices::virtio::mem::blocks::BLOCK_MIN;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::option_parser::{ByteSized, Key, OptionError, Options};
use super::{ConfigError, HotplugMethod, MemoryConfig};

use Key::Value;

/// The zone of a machine whose memory is described by its size alone.
pub const DEFAULT_ZONE: &str = "mem0";

const PAGE: u64 = 4096;

/// A part of memory with properties of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryZoneConfig {
    /// Its name.
    pub id: String,
    /// RAM at boot, in bytes.
    pub size: u64,
    /// The file behind it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Whether other processes can map it.
    #[serde(default)]
    pub shared: bool,
    /// Whether it comes from the host's pool of huge pages.
    #[serde(default)]
    pub hugepages: bool,
    /// Size of those pages, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// The host's node that it is taken from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_numa_node: Option<u32>,
    /// How much can be added later, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// How much of that is there at boot, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplugged_size: Option<u64>,
    /// Whether all of it is allocated before the guest starts.
    #[serde(default)]
    pub prefault: bool,
    /// Whether swap space is reserved for it.
    #[serde(default)]
    pub reserve: bool,
    /// Whether the host may merge equal pages.
    #[serde(default)]
    pub mergeable: bool,
}

/// What is wrong with the memory of a configuration.
#[derive(Debug, Error)]
pub enum MemoryConfigError {
    /// Two descriptions of the same.
    #[error(
        "--memory size={size} and --memory-zone are both given; write --memory size=0 and give each zone its size"
    )]
    SizeAndZones {
        /// The size.
        size: u64,
    },
    /// A zone without memory.
    #[error("--memory-zone id={id}: a zone needs a size; write size=SIZE")]
    EmptyZone {
        /// The zone.
        id: String,
    },
    /// One name twice.
    #[error("--memory-zone id={id} is given twice; give each zone its own name")]
    SameZone {
        /// The name.
        id: String,
    },
    /// A size that is no number of pages.
    #[error("{option}: size={size} is not a whole number of {page} byte pages; round it up")]
    NotPages {
        /// The option, with the zone.
        option: String,
        /// The size.
        size: u64,
        /// The page.
        page: u64,
    },
    /// Huge pages of an impossible size.
    #[error(
        "{option}: hugepage_size={size} is not possible; use 2M or 1G, as /sys/kernel/mm/hugepages lists them"
    )]
    PageSize {
        /// The option, with the zone.
        option: String,
        /// The size.
        size: u64,
    },
    /// A page size without pages.
    #[error("{option}: hugepage_size says nothing without hugepages=on; add it, or leave hugepage_size out")]
    PageSizeAlone {
        /// The option, with the zone.
        option: String,
    },
    /// More at boot than there may be.
    #[error(
        "{option}: hotplugged_size={size} is more than hotplug_size={limit}; lower one or raise the other"
    )]
    TooMuchHotplugged {
        /// The option, with the zone.
        option: String,
        /// How much is there at boot.
        size: u64,
        /// How much there may be.
        limit: u64,
    },
    /// What is added by ACPI comes in blocks.
    #[error("{option}: hotplugged_size={size} is not a multiple of 128M, in which memory is added by ACPI")]
    NotBlocks {
        /// The option, with the zone.
        option: String,
        /// The size.
        size: u64,
    },
    /// What is plugged by virtio-mem comes in blocks too.
    #[error(
        "{option}: {key}={size} is not a multiple of {unit}, as hotplug_method=virtio-mem needs it; round it"
    )]
    NotPluggable {
        /// The option, with the zone.
        option: String,
        /// The key.
        key: &'static str,
        /// The size.
        size: u64,
        /// What it must be a multiple of.
        unit: &'static str,
    },
    /// A policy that a file of the page cache does not have.
    #[error(
        "--memory-zone id={id}: host_numa_node has no effect on a file that others map too; leave it out, or write shared=off"
    )]
    NodeOfSharedFile {
        /// The zone.
        id: String,
    },
}

impl MemoryZoneConfig {
    /// From one value of `--memory-zone`.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        const KEYS: &[Key] = &[
            Value("id"),
            Value("size"),
            Value("file"),
            Value("shared"),
            Value("hugepages"),
            Value("hugepage_size"),
            Value("host_numa_node"),
            Value("hotplug_size"),
            Value("hotplugged_size"),
            Value("prefault"),
            Value("reserve"),
            Value("mergeable"),
        ];
        const OPTION: &str = "--memory-zone";
        let options = Options::parse(OPTION, text, KEYS)?;
        let size = |key| Ok::<_, OptionError>(options.get::<ByteSized>(key)?.map(|size| size.0));
        Ok(Self {
            id: options.get("id")?.ok_or(OptionError::MissingValue { option: OPTION, key: "id" })?,
            size: size("size")?.unwrap_or(MemoryConfig::default().size),
            file: options.get("file")?,
            shared: options.toggle("shared", false)?,
            hugepages: options.toggle("hugepages", false)?,
            hugepage_size: size("hugepage_size")?,
            host_numa_node: options.get("host_numa_node")?,
            hotplug_size: size("hotplug_size")?,
            hotplugged_size: size("hotplugged_size")?,
            prefault: options.toggle("prefault", false)?,
            reserve: options.toggle("reserve", false)?,
            mergeable: options.toggle("mergeable", false)?,
        })
    }
}

impl MemoryConfig {
    /// The zones, of which a machine without any has one.
    pub fn effective_zones(&self) -> Vec<MemoryZoneConfig> {
        let some = |size: Option<u64>| size.filter(|size| *size > 0);
        if let Some(zones) = self.zones.as_ref().filter(|zones| !zones.is_empty()) {
            let zones = zones.iter().cloned();
            return zones
                .map(|zone| MemoryZoneConfig { hotplug_size: some(zone.hotplug_size), ..zone })
                .collect();
        }
        vec![MemoryZoneConfig {
            id: DEFAULT_ZONE.to_owned(),
            size: self.size,
            file: None,
            shared: self.shared,
            hugepages: self.hugepages,
            hugepage_size: self.hugepage_size,
            host_numa_node: None,
            hotplug_size: some(self.hotplug_size),
            hotplugged_size: self.hotplugged_size,
            prefault: self.prefault,
            reserve: self.reserve,
            mergeable: self.mergeable,
        }]
    }

    /// RAM that the guest starts with, without what is added to it.
    pub fn boot_size(&self) -> u64 {
        self.effective_zones().iter().fold(0, |sum, zone| sum.saturating_add(zone.size))
    }

    /// All RAM that there is to be: what the guest starts with and what has been added.
    pub fn total_size(&self) -> u64 {
        let zones = self.effective_zones();
        let added = zones.iter().filter_map(|zone| zone.hotplugged_size);
        added.fold(self.boot_size(), u64::saturating_add)
    }

    /// Zones of which the guest plugs and unplugs memory: each has a device, which is called as the zone is.
    pub fn pluggable_zones(&self) -> Vec<String> {
        if self.hotplug_method != HotplugMethod::VirtioMem {
            return Vec::new();
        }
        let zones = self.effective_zones().into_iter();
        zones.filter(|zone| zone.hotplug_size.is_some()).map(|zone| zone.id).collect()
    }

    /// Whether the zones are the user's own.
    pub fn has_zones(&self) -> bool {
        self.zones.as_ref().is_some_and(|zones| !zones.is_empty())
    }

    /// Whether all of it makes sense.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.has_zones() && self.size != 0 {
            return Err(MemoryConfigError::SizeAndZones { size: self.size }.into());
        }
        let mut names = HashSet::new();
        for zone in self.effective_zones() {
            self.validate_zone(&zone)?;
            if !names.insert(zone.id.clone()) {
                return Err(MemoryConfigError::SameZone { id: zone.id }.into());
            }
        }
        let size = self.boot_size();
        if size < MIN_RAM {
            return Err(ConfigError::MemoryTooSmall { size });
        }
        Ok(())
    }

    fn validate_zone(&self, zone: &MemoryZoneConfig) -> Result<(), MemoryConfigError> {
        type E = MemoryConfigError;
        let name = || {
            if self.has_zones() { format!("--memory-zone id={}", zone.id) } else { "--memory".to_owned() }
        };
        let id = || zone.id.clone();
        if self.has_zones() && zone.size == 0 {
            return Err(E::EmptyZone { id: id() });
        }
        match zone.hugepage_size {
            Some(_) if !zone.hugepages => return Err(E::PageSizeAlone { option: name() }),
            Some(size) if !size.is_power_of_two() || size <= PAGE => {
                return Err(E::PageSize { option: name(), size });
            }
            _ => {}
        }
        let page = zone.hugepage_size.unwrap_or(PAGE);
        for size in [Some(zone.size), zone.hotplugged_size].into_iter().flatten() {
            if !size.is_multiple_of(page) {
                return Err(E::NotPages { option: name(), size, page });
            }
        }
        if let Some(size) = zone.hotplugged_size {
            let limit = zone.hotplug_size.unwrap_or(0);
            if size > limit {
                return Err(E::TooMuchHotplugged { option: name(), size, limit });
            }
            match self.hotplug_method {
                HotplugMethod::Acpi if !size.is_multiple_of(HOTPLUG_ALIGN) => {
                    return Err(E::NotBlocks { option: name(), size });
                }
                HotplugMethod::VirtioMem if !size.is_multiple_of(BLOCK_MIN) => {
                    return Err(E::NotPluggable { option: name(), key: "hotplugged_size", size, unit: "2M" });
                }
                _ => {}
            }
        }
        if self.hotplug_method == HotplugMethod::VirtioMem
            && let Some(size) = zone.hotplug_size.filter(|size| !size.is_multiple_of(HOTPLUG_ALIGN.max(page)))
        {
            let unit = if page > HOTPLUG_ALIGN { "hugepage_size" } else { "128M" };
            return Err(E::NotPluggable { option: name(), key: "hotplug_size", size, unit });
        }
        if zone.file.is_some() && zone.shared && zone.host_numa_node.is_some() {
            return Err(E::NodeOfSharedFile { id: id() });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone(text: &str) -> MemoryZoneConfig {
        MemoryZoneConfig::parse(text).unwrap()
    }

    fn virtio_mem(keys: &str) -> MemoryConfig {
        MemoryConfig::parse(&format!("hotplug_method=virtio-mem,{keys}")).unwrap()
    }

    #[test]
    fn each_zone_that_may_grow_by_virtio_mem_has_a_device_of_its_name() {
        let one = virtio_mem("size=1G,hotplug_size=1G,hotplugged_size=2M");
        assert!(one.validate().is_ok());
        assert_eq!(
            (one.pluggable_zones(), one.total_size()),
            (vec!["mem0".to_owned()], (1 << 30) + (2 << 20))
        );
        let mut zones = with_zones(&["id=a,size=1G,hotplug_size=1G", "id=b,size=512M"]);
        assert!(zones.pluggable_zones().is_empty());
        zones.hotplug_method = HotplugMethod::VirtioMem;
        assert_eq!(zones.pluggable_zones(), ["a"]);
    }

    fn with_zones(zones: &[&str]) -> MemoryConfig {
        MemoryConfig {
            size: 0,
            zones: Some(zones.iter().map(|text| zone(text)).collect()),
            ..MemoryConfig::default()
        }
    }

    #[test]
    fn a_zone_is_read_with_all_its_keys_and_has_cloud_hypervisors_defaults() {
        let all = zone(
            "id=a,size=1G,file=/dev/shm/a,shared=on,hugepages=on,hugepage_size=2M,host_numa_node=1,hotplug_size=2G,\
             hotplugged_size=1G,prefault=on,reserve=on,mergeable=on",
        );
        assert_eq!(all.file, Some(PathBuf::from("/dev/shm/a")));
        assert_eq!((all.size, all.hugepage_size, all.host_numa_node), (1 << 30, Some(2 << 20), Some(1)));
        assert_eq!((all.hotplug_size, all.hotplugged_size), (Some(2 << 30), Some(1 << 30)));
        assert!(all.shared && all.hugepages && all.prefault && all.reserve && all.mergeable);
        let plain = MemoryZoneConfig { id: "b".to_owned(), size: 512 << 20, ..MemoryZoneConfig::default() };
        assert_eq!(zone("id=b"), plain);
        assert!(MemoryZoneConfig::parse("size=1G").unwrap_err().to_string().contains("id"));
        let json = r#"{"id":"c","size":4096,"shared":false,"hugepages":false,"prefault":false,"reserve":false,"mergeable":false}"#;
        let parsed: MemoryZoneConfig = serde_json::from_str(r#"{"id":"c","size":4096}"#).unwrap();
        assert_eq!(serde_json::to_string(&parsed).unwrap(), json);
    }

    #[test]
    fn sizes_are_summed_over_zones_with_what_has_been_added() {
        let plain = MemoryConfig::default();
        assert_eq!((plain.boot_size(), plain.total_size()), (512 << 20, 512 << 20));
        assert_eq!(plain.effective_zones()[0].id, "mem0");
        let zones = with_zones(&["id=a,size=1G,hotplug_size=1G,hotplugged_size=128M", "id=b,size=512M"]);
        assert!(zones.validate().is_ok());
        assert_eq!((zones.boot_size(), zones.total_size()), (1536 << 20, 1664 << 20));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_the_zone_and_the_remedy() {
        let mut both = with_zones(&["id=a"]);
        both.size = 512 << 20;
        for (memory, words) in [
            (both, &["size=0"][..]),
            (with_zones(&["id=a", "id=a"]), &["id=a", "twice"]),
            (with_zones(&["id=a,size=0"]), &["id=a", "size"]),
            (with_zones(&["id=a,size=8M"]), &["64M"]),
            (with_zones(&["id=a,size=67108865"]), &["id=a", "4096"]),
            (with_zones(&["id=a,size=129M,hugepages=on,hugepage_size=2M"]), &["id=a", "2097152"]),
            (with_zones(&["id=a,hugepage_size=2M"]), &["hugepages=on"]),
            (with_zones(&["id=a,hugepages=on,hugepage_size=3M"]), &["3145728", "2M or 1G"]),
            (with_zones(&["id=a,hotplugged_size=128M"]), &["hotplugged_size", "hotplug_size=0"]),
            (with_zones(&["id=a,hotplug_size=1G,hotplugged_size=1M"]), &["128M"]),
            (with_zones(&["id=a,file=/f,shared=on,host_numa_node=0"]), &["id=a", "shared=off"]),
            (virtio_mem("size=1G,hotplug_size=100M"), &["hotplug_size=104857600", "128M"]),
            (virtio_mem("size=1G,hotplug_size=1G,hotplugged_size=3M"), &["hotplugged_size=3145728", "2M"]),
            (
                virtio_mem("size=1G,hugepages=on,hugepage_size=1G,hotplug_size=1536M"),
                &["hotplug_size", "multiple of hugepage_size"],
            ),
        ] {
            let message = memory.validate().unwrap_err().to_string();
            assert!(words.iter().all(|word| message.contains(word)), "{words:?}: {message}");
        }
    }
}
