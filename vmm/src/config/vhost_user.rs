//! What devices that vhost-user backends are have in common: a socket, and memory that other processes can map.

use thiserror::Error;

use super::option_parser::Key;
use super::{ConfigError, VmConfig};

/// Keys of name and place: no such device can be behind a virtual IOMMU.
pub(super) const PLACE_KEYS: [Key; 3] =
    [Key::Value("id"), Key::Value("pci_segment"), Key::Value("pci_device_id")];

/// What is wrong with such a device.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum VhostUserConfigError {
    /// A tag that a guest cannot be told.
    #[error("--fs tag={tag}: a tag has 1 to 36 bytes; write tag=NAME, by which the guest mounts it")]
    Tag {
        /// What was given.
        tag: String,
    },
    /// No socket.
    #[error("{option} needs the socket of its vhost-user backend: write socket=PATH")]
    NoSocket {
        /// The option.
        option: &'static str,
    },
    /// A number of queues that cannot be.
    #[error("{option} num_queues={queues} is not possible; use 1 to the number of vCPUs, which is {vcpus}")]
    Queues {
        /// The option.
        option: &'static str,
        /// What was given.
        queues: u16,
        /// vCPUs of the machine.
        vcpus: u32,
    },
    /// A queue that cannot be.
    #[error("{option}: a queue of {size} descriptors is not possible; use a power of two up to 32768")]
    QueueSize {
        /// The option.
        option: &'static str,
        /// What was given.
        size: u16,
    },
    /// A type that no device has.
    #[error(
        "--generic-vhost-user device_type={device_type} is not possible; write the virtio number of the type, 1 to 63, for \
         example 26 for a file system"
    )]
    DeviceType {
        /// What was given.
        device_type: u32,
    },
    /// No queues, or too many.
    #[error(
        "--generic-vhost-user queue_sizes: {count} queues are not possible; write the size of each of 1 to 1023, for example \
         queue_sizes=[128,128]"
    )]
    NoQueues {
        /// How many were given.
        count: usize,
    },
    /// Memory of this process alone.
    #[error(
        "{option}: a vhost-user backend must map the guest's memory, which is not shared; add shared=on to --memory"
    )]
    MemoryNotShared {
        /// The option.
        option: &'static str,
    },
    /// An image of its own beside a backend.
    #[error(
        "--disk path={path} and vhost_user=on do not go together: the image is the backend's; give one of them"
    )]
    PathAndSocket {
        /// The image.
        path: String,
    },
    /// A backend for what has none.
    #[error("--disk socket={socket} is of use with vhost_user=on only; add it")]
    SocketAlone {
        /// The socket.
        socket: String,
    },
}

/// Refuses a size that no queue can have.
pub(super) fn check_queue_size(option: &'static str, size: u16) -> Result<(), VhostUserConfigError> {
    if size.is_power_of_two() { Ok(()) } else { Err(VhostUserConfigError::QueueSize { option, size }) }
}

impl VmConfig {
    /// Checks the devices that backends are.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub(super) fn validate_vhost_user(&self) -> Result<(), ConfigError> {
        let vcpus = self.cpus.boot_vcpus;
        self.fs.iter().flatten().try_for_each(|fs| fs.validate(vcpus))?;
        self.generic_vhost_user.iter().flatten().try_for_each(|device| device.validate())?;
        let present = [
            ("--fs", self.fs.iter().flatten().count() > 0),
            ("--generic-vhost-user", self.generic_vhost_user.iter().flatten().count() > 0),
            ("--net vhost_user=on", self.net.iter().flatten().any(|net| net.vhost_user)),
            ("--disk vhost_user=on", self.disks.iter().flatten().any(|disk| disk.vhost_user)),
        ];
        match present.iter().find(|(_, present)| *present) {
            Some(&(option, _)) if !self.memory.shared => {
                Err(VhostUserConfigError::MemoryNotShared { option }.into())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{FsConfig, GenericVhostUserConfig, MemoryConfig, PayloadConfig};
    use super::*;

    fn machine(change: impl FnOnce(&mut VmConfig)) -> Result<(), String> {
        let payload = Some(PayloadConfig { kernel: Some("k".into()), ..Default::default() });
        let memory = MemoryConfig { shared: true, ..Default::default() };
        let mut config = VmConfig { payload, memory, ..Default::default() };
        change(&mut config);
        config.validate().map_err(|e| e.to_string())
    }

    fn fs(text: &str) -> Result<(), String> {
        machine(|config| config.fs = Some(vec![FsConfig::parse(text).unwrap()]))
    }

    fn generic(text: &str) -> Result<(), String> {
        let parse = GenericVhostUserConfig::parse;
        machine(|config| config.generic_vhost_user = Some(vec![parse(text).unwrap()]))
    }

    #[test]
    fn a_file_system_is_written_as_for_cloud_hypervisor() {
        let fs = FsConfig::parse("tag=share,socket=/run/fs.sock").unwrap();
        assert_eq!(
            serde_json::to_value(&fs).unwrap(),
            json!({"tag": "share", "socket": "/run/fs.sock", "num_queues": 1, "queue_size": 1024, "pci_segment": 0})
        );
        let text = "tag=t,socket=s,num_queues=2,queue_size=64,id=f,pci_segment=0,pci_device_id=9";
        let all = FsConfig::parse(text).unwrap();
        let json = json!({"tag": "t", "socket": "s", "num_queues": 2, "queue_size": 64, "id": "f", "pci_device_id": 9});
        assert_eq!(serde_json::from_value::<FsConfig>(json).unwrap(), all);
        assert!(
            FsConfig::parse("tag=t,socket=s,iommu=on").unwrap_err().to_string().contains("no key 'iommu'")
        );
    }

    #[test]
    fn a_generic_device_is_written_as_for_cloud_hypervisor() {
        let by_name = GenericVhostUserConfig::parse("device_type=26,socket=/s,queue_sizes=[64,128]").unwrap();
        let by_alias = GenericVhostUserConfig::parse("virtio_id=26,socket=/s,queue_sizes=[64,128]").unwrap();
        assert_eq!(by_name, by_alias);
        assert_eq!(
            serde_json::to_value(&by_name).unwrap(),
            json!({"socket": "/s", "queue_sizes": [64, 128], "device_type": 26, "pci_segment": 0})
        );
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_remedy() {
        assert_eq!(fs("tag=t,socket=s"), Ok(()));
        let long = format!("tag={},socket=s", "t".repeat(37));
        for (text, part) in [
            ("socket=s", "write tag=NAME"),
            (&long, "1 to 36 bytes"),
            ("tag=t", "write socket=PATH"),
            ("tag=t,socket=s,num_queues=2", "number of vCPUs, which is 1"),
            ("tag=t,socket=s,queue_size=100", "power of two"),
            ("tag=t,socket=s,pci_segment=1", "pci_segment"),
        ] {
            let error = fs(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        assert_eq!(generic("device_type=4,socket=s,queue_sizes=[16]"), Ok(()));
        for (text, part) in [
            ("socket=s,queue_sizes=[16]", "device_type=0"),
            ("device_type=64,socket=s,queue_sizes=[16]", "1 to 63"),
            ("device_type=4,socket=s", "queue_sizes=[128,128]"),
            ("device_type=4,queue_sizes=[16]", "write socket=PATH"),
            ("device_type=4,socket=s,queue_sizes=[70000]", "power of two"),
        ] {
            let error = generic(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn memory_that_is_not_shared_is_refused_with_the_option_that_shares_it() {
        for option in ["--fs", "--generic-vhost-user", "--disk vhost_user=on"] {
            let error = machine(|config| {
                config.memory.shared = false;
                match option {
                    "--fs" => config.fs = Some(vec![FsConfig::parse("tag=t,socket=s").unwrap()]),
                    "--disk vhost_user=on" => {
                        let disk = super::super::DiskConfig::parse("vhost_user=on,socket=s").unwrap();
                        config.disks = Some(vec![disk]);
                    }
                    _ => {
                        let text = "device_type=4,socket=s,queue_sizes=[16]";
                        config.generic_vhost_user = Some(vec![GenericVhostUserConfig::parse(text).unwrap()]);
                    }
                }
            });
            let error = error.unwrap_err();
            assert!(error.starts_with(option) && error.contains("add shared=on to --memory"), "{error}");
        }
    }
}
