//! PCI segments: how many there are, their shares of the address space for BARs, and whether every device is in one that there is.

use std::collections::HashSet;

use acpi::event_abi::SEGMENT_COUNT;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::VmConfig;
use super::option_parser::{Key, OptionError, Options};

use Key::Value;

/// Shares of a segment of which something is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciSegmentConfig {
    /// Its number.
    #[serde(default)]
    pub pci_segment: u16,
    /// Weight of its part of the 32-bit memory window.
    #[serde(default = "default_weight")]
    pub mmio32_aperture_weight: u32,
    /// Weight of its part of the 64-bit memory window.
    #[serde(default = "default_weight")]
    pub mmio64_aperture_weight: u32,
}

/// What is wrong with the segments of a configuration.
#[derive(Debug, Error)]
pub enum PciSegmentError {
    /// None, or more than there is room for.
    #[error("--platform num_pci_segments={count} is not possible; use 1 to {SEGMENT_COUNT}")]
    Count {
        /// How many.
        count: u16,
    },
    /// A segment that there is not.
    #[error(
        "{what} pci_segment={segment}: there is no such PCI segment; use 0 to {last}, or raise --platform num_pci_segments"
    )]
    Unknown {
        /// Whose setting.
        what: String,
        /// The segment.
        segment: u16,
        /// The last one.
        last: u16,
    },
    /// A share of nothing.
    #[error(
        "--pci-segment pci_segment={segment}: {key}=0 would leave it no addresses for BARs; use 1 or more"
    )]
    Weight {
        /// The segment.
        segment: u16,
        /// Which weight.
        key: &'static str,
    },
    /// One segment twice.
    #[error("--pci-segment pci_segment={segment} is given twice; write all that is said of a segment in one")]
    Twice {
        /// The segment.
        segment: u16,
    },
}

impl PciSegmentConfig {
    /// From one value of `--pci-segment`.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong form.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        const KEYS: &[Key] =
            &[Value("pci_segment"), Value("mmio32_aperture_weight"), Value("mmio64_aperture_weight")];
        let options = Options::parse("--pci-segment", text, KEYS)?;
        Ok(Self {
            pci_segment: options.get_or_default("pci_segment")?,
            mmio32_aperture_weight: options.get("mmio32_aperture_weight")?.unwrap_or(default_weight()),
            mmio64_aperture_weight: options.get("mmio64_aperture_weight")?.unwrap_or(default_weight()),
        })
    }
}

const fn default_weight() -> u32 {
    1
}

impl VmConfig {
    /// How many segments there are.
    pub fn segment_count(&self) -> u16 {
        self.platform.as_ref().map_or(1, |platform| platform.num_pci_segments)
    }

    /// All segments, in the order of their numbers.
    pub fn segments(&self) -> Vec<PciSegmentConfig> {
        let said =
            |number: u16| self.pci_segments.iter().flatten().find(|s| s.pci_segment == number).copied();
        let plain = |pci_segment| PciSegmentConfig {
            pci_segment,
            mmio32_aperture_weight: default_weight(),
            mmio64_aperture_weight: default_weight(),
        };
        (0..self.segment_count()).map(|number| said(number).unwrap_or(plain(number))).collect()
    }

    /// Checks number and shares of the segments.
    pub(super) fn validate_segments(&self) -> Result<(), PciSegmentError> {
        let count = self.segment_count();
        if !(1..=SEGMENT_COUNT).contains(&count) {
            return Err(PciSegmentError::Count { count });
        }
        let mut seen = HashSet::new();
        for config in self.pci_segments.iter().flatten() {
            let segment = config.pci_segment;
            self.validate_segment("--pci-segment", segment)?;
            let weights = [
                ("mmio32_aperture_weight", config.mmio32_aperture_weight),
                ("mmio64_aperture_weight", config.mmio64_aperture_weight),
            ];
            if let Some((key, _)) = weights.into_iter().find(|(_, weight)| *weight == 0) {
                return Err(PciSegmentError::Weight { segment, key });
            }
            if !seen.insert(segment) {
                return Err(PciSegmentError::Twice { segment });
            }
        }
        Ok(())
    }

    /// Checks that there is this segment. `what` has it for a setting.
    pub(super) fn validate_segment(&self, what: &str, segment: u16) -> Result<(), PciSegmentError> {
        let count = self.segment_count();
        if segment < count {
            return Ok(());
        }
        Err(PciSegmentError::Unknown { what: what.to_owned(), segment, last: count.saturating_sub(1) })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DiskConfig, PlatformConfig};
    use super::*;

    fn config(platform: &str, segments: &[&str]) -> VmConfig {
        VmConfig {
            platform: Some(PlatformConfig::parse(platform).unwrap()),
            pci_segments: Some(segments.iter().map(|text| PciSegmentConfig::parse(text).unwrap()).collect()),
            ..VmConfig::default()
        }
    }

    #[test]
    fn a_segment_is_read_with_its_defaults() {
        let parsed = PciSegmentConfig::parse("pci_segment=3,mmio64_aperture_weight=5").unwrap();
        let expected =
            PciSegmentConfig { pci_segment: 3, mmio32_aperture_weight: 1, mmio64_aperture_weight: 5 };
        assert_eq!(parsed, expected);
        assert_eq!(
            serde_json::from_str::<PciSegmentConfig>(r#"{"pci_segment":3,"mmio64_aperture_weight":5}"#)
                .unwrap(),
            expected
        );
        assert_eq!(
            serde_json::to_string(&expected).unwrap(),
            r#"{"pci_segment":3,"mmio32_aperture_weight":1,"mmio64_aperture_weight":5}"#
        );
        assert!(PciSegmentConfig::parse("segment=1").is_err());
    }

    #[test]
    fn segments_of_which_nothing_is_said_have_equal_shares() {
        let config = config("num_pci_segments=3", &["pci_segment=1,mmio32_aperture_weight=4"]);
        config.validate_segments().unwrap();
        let weights: Vec<_> =
            config.segments().iter().map(|s| (s.pci_segment, s.mmio32_aperture_weight)).collect();
        assert_eq!(weights, [(0, 1), (1, 4), (2, 1)]);
        assert_eq!(VmConfig::default().segments().len(), 1);
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_the_setting_and_the_remedy() {
        for (platform, segments, words) in [
            ("num_pci_segments=0", &[][..], &["num_pci_segments=0", "1 to 96"][..]),
            ("num_pci_segments=97", &[], &["num_pci_segments=97", "1 to 96"]),
            ("num_pci_segments=2", &["pci_segment=2"], &["--pci-segment pci_segment=2", "0 to 1"]),
            (
                "num_pci_segments=2",
                &["pci_segment=1,mmio32_aperture_weight=0"],
                &["mmio32_aperture_weight=0", "1 or more"],
            ),
            (
                "num_pci_segments=2",
                &["pci_segment=1,mmio64_aperture_weight=0"],
                &["mmio64_aperture_weight=0"],
            ),
            ("num_pci_segments=2", &["pci_segment=1", "pci_segment=1"], &["twice"]),
        ] {
            let message = config(platform, segments).validate_segments().unwrap_err().to_string();
            assert!(words.iter().all(|word| message.contains(word)), "{words:?}: {message}");
        }
        assert!(config("num_pci_segments=96", &["pci_segment=95"]).validate_segments().is_ok());
    }

    #[test]
    fn a_device_in_a_segment_that_there_is_not_is_refused_by_its_name() {
        let mut config = config("num_pci_segments=2", &[]);
        config.disks = Some(vec![DiskConfig::parse("path=/d,id=data,pci_segment=1").unwrap()]);
        assert!(config.validate_names_and_places().is_ok());
        config.disks = Some(vec![DiskConfig::parse("path=/d,id=data,pci_segment=2").unwrap()]);
        let message = config.validate_names_and_places().unwrap_err().to_string();
        assert!(
            message.contains("device data: pci_segment=2") && message.contains("num_pci_segments"),
            "{message}"
        );
    }
}
