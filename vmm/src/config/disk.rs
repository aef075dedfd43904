//! Disks, and the limits that they can share (Cloud Hypervisor's `DiskConfig` and `RateLimitGroupConfig`).

use std::path::PathBuf;

use devices::block::{Granularity, ImageType};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::option_parser::{IntegerList, Key, OptionError, OptionValue, Options, Tuples};
use super::pci_common::PciCommon;
use super::rate_limit::RateLimiterConfig;
use super::{ConfigError, VhostUserConfigError, VmConfig};

use Key::Value;

/// Bytes of a serial number (VIRTIO 1.2, section 5.2.6).
const SERIAL_MAX: usize = 20;
/// Smallest and largest queue: header, data and status must go into it, and rings have no more than this.
const QUEUE_SIZES: std::ops::RangeInclusive<u16> = 4..=1 << 15;
/// Keys of both limits.
const LIMIT_KEYS: [Key; 6] = [
    Value("bw_size"),
    Value("bw_one_time_burst"),
    Value("bw_refill_time"),
    Value("ops_size"),
    Value("ops_one_time_burst"),
    Value("ops_refill_time"),
];

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Name and place.
    #[serde(flatten)]
    pub pci: PciCommon,
    /// The image or block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Whether it is only read.
    #[serde(default)]
    pub readonly: bool,
    /// Whether the host's page cache is left out.
    #[serde(default)]
    pub direct: bool,
    /// Queues, each with a thread.
    #[serde(default = "default_num_queues")]
    pub num_queues: u16,
    /// Descriptors of each.
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
    /// Whether another process is the device.
    #[serde(default)]
    pub vhost_user: bool,
    /// Where that listens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<String>,
    /// The limit that it shares with others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limit_group: Option<String>,
    /// Its own limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// Whether io_uring is left alone.
    #[serde(default)]
    pub disable_io_uring: bool,
    /// Whether Linux's older asynchronous I/O is left alone. Dormouse has no use for it.
    #[serde(default)]
    pub disable_aio: bool,
    /// Serial number that the guest sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Host processors of the queues' threads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_affinity: Option<Vec<QueueAffinity>>,
    /// Whether the image may name another one that it is based on.
    #[serde(default)]
    pub backing_files: bool,
    /// Whether room is given back to the host.
    #[serde(default = "super::default_true")]
    pub sparse: bool,
    /// What the image is.
    #[serde(default)]
    pub image_type: ImageType,
    /// What of the file is locked.
    #[serde(default)]
    pub lock_granularity: Granularity,
}

/// Host processors of one queue's thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueAffinity {
    /// The queue.
    pub queue_index: u16,
    /// The host processors.
    pub host_cpus: Vec<usize>,
}

/// A limit that disks share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimitGroupConfig {
    /// Its name.
    pub id: String,
    /// The limit.
    pub rate_limiter_config: RateLimiterConfig,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            pci: PciCommon::default(),
            path: None,
            readonly: false,
            direct: false,
            num_queues: default_num_queues(),
            queue_size: default_queue_size(),
            vhost_user: false,
            vhost_socket: None,
            rate_limit_group: None,
            rate_limiter_config: None,
            disable_io_uring: false,
            disable_aio: false,
            serial: None,
            queue_affinity: None,
            backing_files: false,
            sparse: true,
            image_type: ImageType::Unknown,
            lock_granularity: Granularity::ByteRange,
        }
    }
}

/// What is wrong with a disk or a shared limit.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum DiskConfigError {
    /// No image.
    #[error("--disk needs the image: write path=FILE, or the path of a block device")]
    NoPath,
    /// A number of queues that cannot be.
    #[error("--disk num_queues={queues} is not possible; use 1 to the number of vCPUs, which is {vcpus}")]
    Queues {
        /// What was given.
        queues: u16,
        /// vCPUs of the machine.
        vcpus: u32,
    },
    /// A queue that cannot be.
    #[error("--disk queue_size={size} is not possible; use a power of two from 4 to 32768")]
    QueueSize {
        /// What was given.
        size: u16,
    },
    /// A serial number that is too long.
    #[error("--disk serial={serial} is too long; a serial number has 20 bytes at most")]
    Serial {
        /// What was given.
        serial: String,
    },
    /// Processors for a queue that does not exist.
    #[error(
        "--disk queue_affinity: there is no queue {queue}; queues are numbered from 0, and num_queues={queues}"
    )]
    Affinity {
        /// The queue.
        queue: u16,
        /// How many there are.
        queues: u16,
    },
    /// A group that nobody has described.
    #[error("--disk rate_limit_group={group}: there is no such group; add --rate-limit-group id={group},...")]
    NoGroup {
        /// Its name.
        group: String,
    },
    /// Two limits.
    #[error(
        "--disk rate_limit_group={group} and limits of the disk's own do not go together; give one of them"
    )]
    TwoLimits {
        /// The group.
        group: String,
    },
    /// A group that limits nothing.
    #[error(
        "--rate-limit-group id={group} limits nothing; add bw_size and bw_refill_time, or ops_size and ops_refill_time"
    )]
    NoLimit {
        /// Its name.
        group: String,
    },
    /// A group without a name, or one name twice.
    #[error("--rate-limit-group id={group}: every group needs a name of its own; write id=NAME")]
    GroupName {
        /// Its name.
        group: String,
    },
}

impl DiskConfig {
    /// From one value of `--disk`.
    ///
    /// # Errors
    /// See [`OptionError`].
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        const KEYS: [Key; 16] = [
            Value("path"),
            Value("readonly"),
            Value("direct"),
            Value("num_queues"),
            Value("queue_size"),
            Value("vhost_user"),
            Value("socket"),
            Value("rate_limit_group"),
            Value("queue_affinity"),
            Value("serial"),
            Value("backing_files"),
            Value("sparse"),
            Value("image_type"),
            Value("lock_granularity"),
            Value("_disable_io_uring"),
            Value("_disable_aio"),
        ];
        let keys = [&KEYS[..], &LIMIT_KEYS, &PciCommon::KEYS].concat();
        let options = Options::parse("--disk", text, &keys)?;
        let default = Self::default();
        let affinity = options.get::<Tuples<u16, Cpus>>("queue_affinity")?.map(|queues| {
            queues
                .0
                .into_iter()
                .map(|(queue_index, Cpus(host_cpus))| QueueAffinity { queue_index, host_cpus })
        });
        Ok(Self {
            pci: PciCommon::from_options(&options)?,
            path: options.get("path")?,
            readonly: options.toggle("readonly", false)?,
            direct: options.toggle("direct", false)?,
            num_queues: options.get("num_queues")?.unwrap_or(default.num_queues),
            queue_size: options.get("queue_size")?.unwrap_or(default.queue_size),
            vhost_user: options.toggle("vhost_user", false)?,
            vhost_socket: options.get("socket")?,
            rate_limit_group: options.get("rate_limit_group")?,
            rate_limiter_config: RateLimiterConfig::from_options(&options)?,
            disable_io_uring: options.toggle("_disable_io_uring", false)?,
            disable_aio: options.toggle("_disable_aio", false)?,
            serial: options.get("serial")?,
            queue_affinity: affinity.map(Iterator::collect),
            backing_files: options.toggle("backing_files", false)?,
            sparse: options.toggle("sparse", true)?,
            image_type: options.get::<Format>("image_type")?.map_or(default.image_type, |format| format.0),
            lock_granularity: options
                .get::<LockedPart>("lock_granularity")?
                .map_or(default.lock_granularity, |part| part.0),
        })
    }

    /// Another process has the image, or this one.
    fn validate_backend(&self) -> Result<(), VhostUserConfigError> {
        match (&self.vhost_socket, &self.path) {
            (None, _) if self.vhost_user => {
                Err(VhostUserConfigError::NoSocket { option: "--disk vhost_user=on" })
            }
            (_, Some(path)) if self.vhost_user => {
                Err(VhostUserConfigError::PathAndSocket { path: path.display().to_string() })
            }
            (Some(socket), _) if !self.vhost_user => {
                Err(VhostUserConfigError::SocketAlone { socket: socket.clone() })
            }
            _ => Ok(()),
        }
    }

    fn validate(&self, vcpus: u32, groups: &[RateLimitGroupConfig]) -> Result<(), ConfigError> {
        self.validate_backend()?;
        let queues = self.num_queues;
        let error = if self.path.is_none() && !self.vhost_user {
            DiskConfigError::NoPath
        } else if queues == 0 || u32::from(queues) > vcpus {
            DiskConfigError::Queues { queues, vcpus }
        } else if !QUEUE_SIZES.contains(&self.queue_size) || !self.queue_size.is_power_of_two() {
            DiskConfigError::QueueSize { size: self.queue_size }
        } else if let Some(serial) = self.serial.as_ref().filter(|serial| serial.len() > SERIAL_MAX) {
            DiskConfigError::Serial { serial: serial.clone() }
        } else if let Some(none) =
            self.queue_affinity.iter().flatten().find(|queue| queue.queue_index >= queues)
        {
            DiskConfigError::Affinity { queue: none.queue_index, queues }
        } else if let Some(group) = self.rate_limit_group.clone() {
            if !groups.iter().any(|known| known.id == group) {
                DiskConfigError::NoGroup { group }
            } else if self.rate_limiter_config.as_ref().is_some_and(RateLimiterConfig::limits) {
                DiskConfigError::TwoLimits { group }
            } else {
                return Ok(());
            }
        } else {
            return Ok(());
        };
        Err(error.into())
    }
}

impl RateLimitGroupConfig {
    /// From one value of `--rate-limit-group`.
    ///
    /// # Errors
    /// See [`OptionError`].
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let keys = [&[Value("id")][..], &LIMIT_KEYS].concat();
        let options = Options::parse("--rate-limit-group", text, &keys)?;
        let rate_limiter_config = RateLimiterConfig::from_options(&options)?.unwrap_or_default();
        Ok(Self { id: options.get_or_default("id")?, rate_limiter_config })
    }
}

impl VmConfig {
    /// Checks disks and the limits that they share.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub(super) fn validate_disks(&self) -> Result<(), ConfigError> {
        let groups = self.rate_limit_groups.as_deref().unwrap_or_default();
        for (number, group) in groups.iter().enumerate() {
            let twice = groups.iter().take(number).any(|other| other.id == group.id);
            let group_name = || group.id.clone();
            if group.id.is_empty() || twice {
                return Err(DiskConfigError::GroupName { group: group_name() }.into());
            }
            if !group.rate_limiter_config.limits() {
                return Err(DiskConfigError::NoLimit { group: group_name() }.into());
            }
        }
        let mut disks = self.disks.iter().flatten();
        disks.try_for_each(|disk| disk.validate(self.cpus.boot_vcpus, groups))
    }
}

/// Host processor numbers.
struct Cpus(Vec<usize>);

impl OptionValue for Cpus {
    const EXPECTED: &'static str = IntegerList::EXPECTED;

    fn parse(text: &str) -> Option<Self> {
        IntegerList::parse(text)?.0.into_iter().map(|n| n.try_into().ok()).collect::<Option<_>>().map(Self)
    }
}

/// A kind of image.
struct Format(ImageType);

impl OptionValue for Format {
    const EXPECTED: &'static str = "raw or qcow2 (vhd, vhdx and vmdk are not in Dormouse yet)";

    fn parse(text: &str) -> Option<Self> {
        let text = text.to_ascii_lowercase();
        let all =
            [ImageType::Raw, ImageType::Qcow2, ImageType::FixedVhd, ImageType::Vhdx, ImageType::FlatVmdk];
        all.into_iter().find(|format| format.name() == text).map(Self)
    }
}

/// What of a file is locked.
struct LockedPart(Granularity);

impl OptionValue for LockedPart {
    const EXPECTED: &'static str = "byte-range or full";

    fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "byte-range" => Some(Self(Granularity::ByteRange)),
            "full" => Some(Self(Granularity::Full)),
            _ => None,
        }
    }
}

fn default_num_queues() -> u16 {
    1
}

fn default_queue_size() -> u16 {
    128
}

#[cfg(test)]
mod tests;
