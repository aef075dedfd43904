//! Devices of any type that a vhost-user backend is (Cloud Hypervisor's `GenericVhostUserConfig`).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::option_parser::{IntegerList, Key, OptionError, Options};
use super::pci_common::PciCommon;
use super::vhost_user::{PLACE_KEYS, VhostUserConfigError, check_queue_size};

const OPTION: &str = "--generic-vhost-user";
/// The most queues: the transport has doorbells for no more.
const QUEUES_MAX: usize = 1023;

/// A device of any type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenericVhostUserConfig {
    /// Name and place.
    #[serde(flatten)]
    pub pci: PciCommon,
    /// Where the backend listens.
    pub socket: PathBuf,
    /// Descriptors of each queue.
    pub queue_sizes: Vec<u16>,
    /// Its type, as virtio numbers them.
    pub device_type: u32,
}

impl GenericVhostUserConfig {
    /// From one value of `--generic-vhost-user`.
    ///
    /// # Errors
    /// See [`OptionError`].
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        const KEYS: [Key; 4] = [
            Key::Value("device_type"),
            Key::Value("virtio_id"),
            Key::Value("socket"),
            Key::Value("queue_sizes"),
        ];
        let options = Options::parse(OPTION, text, &[&KEYS[..], &PLACE_KEYS].concat())?;
        let sizes = options.get_or_default::<IntegerList>("queue_sizes")?.0;
        // What is no size of a queue is found to be none when it is validated.
        let sizes = sizes.into_iter().map(|size| u16::try_from(size).unwrap_or(u16::MAX));
        let device_type = match options.get("device_type")? {
            Some(device_type) => device_type,
            None => options.get_or_default("virtio_id")?,
        };
        Ok(Self {
            pci: PciCommon::from_options(&options)?,
            socket: options.get_or_default("socket")?,
            queue_sizes: sizes.collect(),
            device_type,
        })
    }

    /// Its type, if virtio over PCI can have it.
    pub fn virtio_type(&self) -> Option<u16> {
        u16::try_from(self.device_type).ok().filter(|number| (1..=0x3f).contains(number))
    }

    pub(super) fn validate(&self) -> Result<(), VhostUserConfigError> {
        if self.socket.as_os_str().is_empty() {
            return Err(VhostUserConfigError::NoSocket { option: OPTION });
        }
        if self.virtio_type().is_none() {
            return Err(VhostUserConfigError::DeviceType { device_type: self.device_type });
        }
        if self.queue_sizes.is_empty() || self.queue_sizes.len() > QUEUES_MAX {
            return Err(VhostUserConfigError::NoQueues { count: self.queue_sizes.len() });
        }
        self.queue_sizes.iter().try_for_each(|size| check_queue_size(OPTION, *size))
    }
}
