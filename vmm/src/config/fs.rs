//! Shared file systems: a directory of the host that a backend such as virtiofsd serves (Cloud Hypervisor's `FsConfig`).

use std::path::PathBuf;

use devices::vhost_user::fs::TAG_MAX;
use serde::{Deserialize, Serialize};

use super::option_parser::{Key, OptionError, Options};
use super::pci_common::PciCommon;
use super::vhost_user::{PLACE_KEYS, VhostUserConfigError, check_queue_size};

/// A shared file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsConfig {
    /// Name and place.
    #[serde(flatten)]
    pub pci: PciCommon,
    /// The name by which the guest mounts it.
    pub tag: String,
    /// Where the backend listens.
    pub socket: PathBuf,
    /// Queues for requests.
    #[serde(default = "default_num_queues")]
    pub num_queues: u16,
    /// Descriptors of each.
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
}

impl FsConfig {
    /// From one value of `--fs`.
    ///
    /// # Errors
    /// See [`OptionError`].
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        const KEYS: [Key; 4] =
            [Key::Value("tag"), Key::Value("socket"), Key::Value("num_queues"), Key::Value("queue_size")];
        let options = Options::parse("--fs", text, &[&KEYS[..], &PLACE_KEYS].concat())?;
        Ok(Self {
            pci: PciCommon::from_options(&options)?,
            tag: options.get_or_default("tag")?,
            socket: options.get_or_default("socket")?,
            num_queues: options.get("num_queues")?.unwrap_or_else(default_num_queues),
            queue_size: options.get("queue_size")?.unwrap_or_else(default_queue_size),
        })
    }

    pub(super) fn validate(&self, vcpus: u32) -> Result<(), VhostUserConfigError> {
        const OPTION: &str = "--fs";
        if self.tag.is_empty() || self.tag.len() > TAG_MAX {
            return Err(VhostUserConfigError::Tag { tag: self.tag.clone() });
        }
        if self.socket.as_os_str().is_empty() {
            return Err(VhostUserConfigError::NoSocket { option: OPTION });
        }
        let queues = self.num_queues;
        if queues == 0 || u32::from(queues) > vcpus {
            return Err(VhostUserConfigError::Queues { option: OPTION, queues, vcpus });
        }
        check_queue_size(OPTION, self.queue_size)
    }
}

fn default_num_queues() -> u16 {
    1
}

fn default_queue_size() -> u16 {
    1024
}
