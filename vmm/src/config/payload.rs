//! What the machine boots: a kernel, or a firmware that finds one by itself.

use std::path::PathBuf;

use log::warn;
use serde::{Deserialize, Serialize};

use super::{ConfigError, VmConfig};

/// What to boot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PayloadConfig {
    /// Firmware: an ELF file with a PVH entry point.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firmware: Option<PathBuf>,
    /// Kernel: a bzImage, or an ELF file with a PVH entry point.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Kernel command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Initial RAM file system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
}

impl PayloadConfig {
    /// Takes out what a firmware has no use for, and says so.
    pub fn drop_unused(&mut self) {
        if self.firmware.is_none() {
            return;
        }
        for (option, given) in
            [("cmdline", self.cmdline.take().is_some()), ("initramfs", self.initramfs.take().is_some())]
        {
            if given {
                warn!(
                    "payload.{option} (--{option}) is ignored: a firmware takes it from the disk, with the kernel"
                );
            }
        }
    }

    /// Checks that there is one thing to boot.
    ///
    /// # Errors
    /// [`ConfigError::NoKernel`] or [`ConfigError::TwoPayloads`].
    pub fn validate(&self) -> Result<(), ConfigError> {
        match (&self.firmware, &self.kernel) {
            (None, None) => Err(ConfigError::NoKernel),
            (Some(_), Some(_)) => Err(ConfigError::TwoPayloads),
            _ => Ok(()),
        }
    }
}

impl VmConfig {
    /// Whether a firmware is booted.
    pub fn boots_firmware(&self) -> bool {
        self.payload.as_ref().is_some_and(|payload| payload.firmware.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_firmware_and_a_kernel_exclude_each_other_and_one_must_be_there() {
        let payload = |firmware: Option<&str>, kernel: Option<&str>| PayloadConfig {
            firmware: firmware.map(Into::into),
            kernel: kernel.map(Into::into),
            ..Default::default()
        };
        assert!(payload(Some("f"), None).validate().is_ok() && payload(None, Some("k")).validate().is_ok());
        let neither = payload(None, None).validate().unwrap_err().to_string();
        assert!(neither.contains("--kernel") && neither.contains("--firmware"), "{neither}");
        let both = payload(Some("f"), Some("k")).validate().unwrap_err().to_string();
        assert!(both.contains("--kernel") && both.contains("--firmware"), "{both}");
    }

    #[test]
    fn only_a_firmware_drops_command_line_and_initramfs() {
        let mut payload = PayloadConfig {
            kernel: Some("k".into()),
            cmdline: Some("quiet".into()),
            initramfs: Some("i".into()),
            ..Default::default()
        };
        let before = payload.clone();
        payload.drop_unused();
        assert_eq!(payload, before);
        payload.firmware = payload.kernel.take();
        payload.drop_unused();
        assert_eq!(payload, PayloadConfig { firmware: Some("k".into()), ..Default::default() });
    }
}
