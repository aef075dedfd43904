//! The entropy device: every machine has one.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::option_parser::{Key, OptionError, Options};
use super::pci_common::PciCommon;

/// Where the guest's random numbers come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngConfig {
    /// The source.
    pub src: PathBuf,
    /// Name and place.
    #[serde(flatten)]
    pub pci: PciCommon,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self { src: "/dev/urandom".into(), pci: PciCommon::default() }
    }
}

impl RngConfig {
    /// From the value of `--rng`.
    ///
    /// # Errors
    /// See [`OptionError`].
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let keys = [&[Key::Value("src")], &PciCommon::KEYS[..]].concat();
        let options = Options::parse("--rng", text, &keys)?;
        let src = options.get("src")?.unwrap_or(Self::default().src);
        Ok(Self { src, pci: PciCommon::from_options(&options)? })
    }
}
