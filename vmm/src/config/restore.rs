//! How a VM goes on from a snapshot (Cloud Hypervisor's `RestoreConfig` and `--restore`).

use std::os::fd::OwnedFd;

use serde::Deserialize;

use super::descriptors::Descriptors;
use super::option_parser::{IntegerList, Key, OptionError, OptionValue, Options, Tuples};
use super::{ConfigError, VmConfig};

/// When the content of memory is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum MemoryRestoreMode {
    /// Before the guest goes on.
    #[default]
    Copy,
    /// When the guest first touches it: the snapshot must stay as it is while the VM lives.
    OnDemand,
}

impl OptionValue for MemoryRestoreMode {
    const EXPECTED: &'static str = "copy or ondemand";

    fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "copy" => Some(Self::Copy),
            "ondemand" => Some(Self::OnDemand),
            _ => None,
        }
    }
}

/// Open descriptors for a network device that was given some before.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct RestoredNet {
    /// The device.
    pub id: String,
    /// How many come with the request.
    pub num_fds: usize,
    /// They themselves.
    #[serde(skip)]
    pub fds: Option<Descriptors>,
}

/// A zone whose memory is to come from another node of the host.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ZoneUpdate {
    /// The zone.
    pub id: String,
    /// The node.
    pub host_numa_node: u32,
}

/// Where the snapshot is and what is different from then.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct RestoreConfig {
    /// `file:///directory`
    pub source_url: String,
    /// Whether all memory is allocated at once.
    #[serde(default)]
    pub prefault: bool,
    /// When the content of memory is read.
    #[serde(default)]
    pub memory_restore_mode: MemoryRestoreMode,
    /// Descriptors for network devices.
    #[serde(default)]
    pub net_fds: Vec<RestoredNet>,
    /// Whether the guest goes on at once.
    #[serde(default)]
    pub resume: bool,
    /// Other nodes for zones.
    #[serde(default)]
    pub zone_updates: Vec<ZoneUpdate>,
    /// Descriptors for assigned devices, of which a snapshot has none.
    #[serde(default)]
    vfio_fds: Vec<serde_json::Value>,
}

/// What of it cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RestoreConfigError {
    /// No directory.
    #[error("--restore needs source_url=file:///path/to/the/snapshot")]
    NoSource,
    /// Both at once.
    #[error("prefault=on and memory_restore_mode=ondemand contradict each other; leave one of them out")]
    PrefaultOnDemand,
    /// An assigned device.
    #[error(
        "vfio_fds: there are no assigned devices in a snapshot; add the device afterwards (vm.add-device)"
    )]
    Devices,
    /// A device of `devices`.
    #[error(
        "config.json names an assigned device, which no snapshot has; take it out, and add it afterwards (vm.add-device)"
    )]
    AssignedDevice,
    /// Other descriptors than were announced.
    #[error(
        "net_fds announces {announced} descriptors, and {came} came with the request; send as many as it says"
    )]
    Descriptors {
        /// As `num_fds` says.
        announced: usize,
        /// How many came.
        came: usize,
    },
    /// Descriptors for a device that takes none.
    #[error("net_fds: the snapshot has no network device {id:?} that was given descriptors; {known}")]
    UnknownNet {
        /// The name.
        id: String,
        /// Those there are.
        known: String,
    },
    /// No descriptors for a device that needs them.
    #[error(
        "network device {id:?} was given {count} descriptors when it was made, and needs as many again; name them with \
         net_fds=[{id}@[FD,..]]"
    )]
    MissingNet {
        /// The device.
        id: String,
        /// How many it needs.
        count: usize,
    },
    /// Too few or too many for it.
    #[error(
        "net_fds: network device {id:?} needs {needs} descriptors, one for each pair of queues, and gets {count}"
    )]
    NetCount {
        /// The device.
        id: String,
        /// How many it needs.
        needs: usize,
        /// How many it gets.
        count: usize,
    },
    /// A node for a zone that is not there.
    #[error("zone_updates: the snapshot has no memory zone {id:?}; {known}")]
    UnknownZone {
        /// The name.
        id: String,
        /// Those there are.
        known: String,
    },
}

/// A list of names for a message.
fn known<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.collect();
    if names.is_empty() { "it has none".to_owned() } else { format!("it has {}", names.join(", ")) }
}

impl RestoreConfig {
    /// From the value of `--restore`.
    ///
    /// # Errors
    /// See [`OptionError`].
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let keys = [
            "source_url",
            "prefault",
            "memory_restore_mode",
            "net_fds",
            "resume",
            "zone_updates",
            "vfio_fds",
            "iommufd_fd",
        ]
        .map(Key::Value);
        let options = Options::parse("--restore", text, &keys)?;
        let nets: Option<Tuples<String, IntegerList>> = options.get("net_fds")?;
        let zones: Option<Tuples<String, u32>> = options.get("zone_updates")?;
        let net = |(id, IntegerList(numbers)): (String, IntegerList)| {
            let numbers: Vec<i32> =
                numbers.into_iter().map(|number| i32::try_from(number).unwrap_or(-1)).collect();
            RestoredNet { id, num_fds: numbers.len(), fds: Some(Descriptors::of_numbers(numbers)) }
        };
        let zone = |(id, host_numa_node)| ZoneUpdate { id, host_numa_node };
        let devices = options.has("vfio_fds") || options.has("iommufd_fd");
        Ok(Self {
            source_url: options.get_or_default("source_url")?,
            prefault: options.toggle("prefault", false)?,
            memory_restore_mode: options.get_or_default("memory_restore_mode")?,
            net_fds: nets.map_or_else(Vec::new, |nets| nets.0.into_iter().map(net).collect()),
            resume: options.toggle("resume", false)?,
            zone_updates: zones.map_or_else(Vec::new, |zones| zones.0.into_iter().map(zone).collect()),
            vfio_fds: if devices { vec![serde_json::Value::Bool(true)] } else { Vec::new() },
        })
    }

    /// Whether it makes sense by itself.
    ///
    /// # Errors
    /// See [`RestoreConfigError`].
    pub fn validate(&self) -> Result<(), ConfigError> {
        let wrong = if self.source_url.is_empty() {
            RestoreConfigError::NoSource
        } else if !self.vfio_fds.is_empty() {
            RestoreConfigError::Devices
        } else if self.prefault && self.memory_restore_mode == MemoryRestoreMode::OnDemand {
            RestoreConfigError::PrefaultOnDemand
        } else {
            return Ok(());
        };
        Err(wrong.into())
    }

    /// Takes the files that came with a request: for each network device as many as it says, in that order.
    ///
    /// # Errors
    /// There are more or fewer.
    pub fn take_files(&mut self, files: Vec<OwnedFd>) -> Result<(), RestoreConfigError> {
        let announced = self.net_fds.iter().fold(0_usize, |sum, net| sum.saturating_add(net.num_fds));
        if announced != files.len() {
            return Err(RestoreConfigError::Descriptors { announced, came: files.len() });
        }
        let mut files = files.into_iter();
        for net in &mut self.net_fds {
            net.fds = Some(Descriptors::of_files(files.by_ref().take(net.num_fds).collect()));
        }
        Ok(())
    }

    /// Changes the configuration that was saved as this says.
    ///
    /// # Errors
    /// See [`RestoreConfigError`].
    pub fn apply(&self, config: &mut VmConfig) -> Result<(), ConfigError> {
        self.validate()?;
        if config.devices.as_ref().is_some_and(|devices| !devices.is_empty()) {
            return Err(RestoreConfigError::AssignedDevice.into());
        }
        let memory = &mut config.memory;
        memory.prefault |= self.prefault;
        for zone in memory.zones.iter_mut().flatten() {
            zone.prefault |= self.prefault;
        }
        for update in &self.zone_updates {
            let mut zones = memory.zones.iter_mut().flatten();
            let Some(zone) = zones.find(|zone| zone.id == update.id) else {
                let names = memory.zones.iter().flatten().map(|zone| zone.id.as_str());
                let known = known(names);
                return Err(RestoreConfigError::UnknownZone { id: update.id.clone(), known }.into());
            };
            zone.host_numa_node = Some(update.host_numa_node);
        }
        self.apply_descriptors(config).map_err(ConfigError::from)
    }

    fn apply_descriptors(&self, config: &mut VmConfig) -> Result<(), RestoreConfigError> {
        let mut nets: Vec<_> = config.net.iter_mut().flatten().filter(|net| net.fds.is_some()).collect();
        let name = |id: &Option<String>| id.clone().unwrap_or_default();
        for given in &self.net_fds {
            if !nets.iter().any(|net| net.pci.id.as_deref() == Some(given.id.as_str())) {
                let known = known(nets.iter().filter_map(|net| net.pci.id.as_deref()));
                return Err(RestoreConfigError::UnknownNet { id: given.id.clone(), known });
            }
        }
        for net in &mut nets {
            let id = name(&net.pci.id);
            let needs = net.fds.as_ref().map_or(0, Descriptors::len);
            let given = self.net_fds.iter().find(|given| given.id == id);
            let Some(fds) = given.and_then(|given| given.fds.as_ref()) else {
                return Err(RestoreConfigError::MissingNet { id, count: needs });
            };
            if fds.len() != needs {
                return Err(RestoreConfigError::NetCount { id, needs, count: fds.len() });
            }
            net.fds = Some(fds.clone());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::NetConfig;
    use super::*;

    fn with_net() -> VmConfig {
        let net: NetConfig =
            serde_json::from_str(r#"{"id": "n", "fds": [-1, -1], "num_queues": 4}"#).unwrap();
        VmConfig { net: Some(vec![net]), ..VmConfig::default() }
    }

    fn error(text: &str, config: &mut VmConfig) -> String {
        RestoreConfig::parse(text).unwrap().apply(config).unwrap_err().to_string()
    }

    #[test]
    fn the_option_and_the_api_have_the_same_keys() {
        let text = "source_url=file:///s,prefault=on,memory_restore_mode=copy,resume=on,zone_updates=[z@1]";
        let json = r#"{"source_url":"file:///s","prefault":true,"memory_restore_mode":"Copy","resume":true,
            "zone_updates":[{"id":"z","host_numa_node":1}]}"#;
        assert_eq!(RestoreConfig::parse(text).unwrap(), serde_json::from_str(json).unwrap());
        let config = RestoreConfig::parse("source_url=file:///s").unwrap();
        assert_eq!(config.memory_restore_mode, MemoryRestoreMode::Copy);
        assert!(config.apply(&mut VmConfig::default()).is_ok());
        assert!(RestoreConfig::parse("source_url=file:///s,memory_restore_mode=x").is_err());
    }

    #[test]
    fn a_device_that_had_descriptors_needs_as_many_again() {
        for (text, says) in [
            ("source_url=file:///s", "net_fds=[n@[FD,..]]"),
            ("source_url=file:///s,net_fds=[m@[3]]", "it has n"),
            ("source_url=file:///s,net_fds=[n@[7]]", "needs 2 descriptors"),
        ] {
            let error = error(text, &mut with_net());
            assert!(error.contains(says), "{text}: {error}");
        }
        let mut config = with_net();
        let restore = RestoreConfig::parse("source_url=file:///s,net_fds=[n@[7,8]]").unwrap();
        restore.apply(&mut config).unwrap();
        let fds = config.net.unwrap()[0].fds.clone();
        assert_eq!(fds, Some(Descriptors::of_numbers(vec![7, 8])));
    }

    #[test]
    fn files_of_a_request_go_to_their_devices_in_order_and_must_be_as_many_as_announced() {
        let body = r#"{"source_url":"file:///s","net_fds":[{"id":"a","num_fds":1},{"id":"b","num_fds":2}]}"#;
        let mut config: RestoreConfig = serde_json::from_str(body).unwrap();
        let file = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let error = config.take_files(vec![file()]).unwrap_err().to_string();
        assert!(error.contains("announces 3") && error.contains("1 came"), "{error}");
        config.take_files(vec![file(), file(), file()]).unwrap();
        let lengths: Vec<_> =
            config.net_fds.iter().map(|net| net.fds.as_ref().map_or(0, Descriptors::len)).collect();
        assert_eq!(lengths, [1, 2]);
    }

    #[test]
    fn what_contradicts_itself_is_refused_by_name() {
        let devices = r#"{"devices": [{"path": "/sys/bus/pci/devices/0000:01:00.0"}]}"#;
        for (text, says) in [
            ("resume=on", "source_url"),
            ("source_url=file:///s,prefault=on,memory_restore_mode=ondemand", "contradict"),
            ("source_url=file:///s,zone_updates=[z@1]", "no memory zone"),
            ("source_url=file:///s,vfio_fds=[v@7]", "vfio_fds"),
        ] {
            let error = error(text, &mut VmConfig::default());
            assert!(error.contains(says), "{text}: {error}");
        }
        let mut config: VmConfig = serde_json::from_str(devices).unwrap();
        assert!(error("source_url=file:///s", &mut config).contains("vm.add-device"));
    }
}
