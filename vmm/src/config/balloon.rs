//! The memory balloon.

use devices::virtio::balloon::BalloonOptions;
use serde::{Deserialize, Serialize};

use super::option_parser::{ByteSized, Key, OptionError, Options};
use super::pci_common::PciCommon;
use super::{ConfigError, VmConfig};

/// A memory balloon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonConfig {
    /// Name and place.
    #[serde(flatten)]
    pub pci: PciCommon,
    /// Bytes that the guest is asked to give up.
    pub size: u64,
    /// Whether the guest may take pages back when it has no others.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Whether the guest tells of pages that it does not use.
    #[serde(default)]
    pub free_page_reporting: bool,
}

impl BalloonConfig {
    /// From the value of `--balloon`.
    ///
    /// # Errors
    /// See [`OptionError`].
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let own = [Key::Value("size"), Key::Value("deflate_on_oom"), Key::Value("free_page_reporting")];
        let options = Options::parse("--balloon", text, &[&own, &PciCommon::KEYS[..]].concat())?;
        Ok(Self {
            pci: PciCommon::from_options(&options)?,
            size: options.get::<ByteSized>("size")?.map_or(0, |size| size.0),
            deflate_on_oom: options.toggle("deflate_on_oom", false)?,
            free_page_reporting: options.toggle("free_page_reporting", false)?,
        })
    }

    /// What the device is told.
    pub fn options(&self) -> BalloonOptions {
        BalloonOptions { deflate_on_oom: self.deflate_on_oom, free_page_reporting: self.free_page_reporting }
    }
}

impl VmConfig {
    /// The balloon with another size.
    ///
    /// # Errors
    /// There is none, or it would be too large.
    pub fn with_balloon_of(&self, size: u64) -> Result<BalloonConfig, ConfigError> {
        let mut changed = self.clone();
        let balloon = changed.balloon.as_mut().ok_or(ConfigError::NoBalloon)?;
        balloon.size = size;
        let balloon = balloon.clone();
        changed.validate_balloon().map(|()| balloon)
    }

    /// A balloon that would take all of the guest's memory is a mistake.
    pub(super) fn validate_balloon(&self) -> Result<(), ConfigError> {
        match &self.balloon {
            Some(balloon) if balloon.size >= self.memory.size && self.memory.size > 0 => {
                Err(ConfigError::Balloon { size: balloon.size, memory: self.memory.size })
            }
            _ => Ok(()),
        }
    }
}
