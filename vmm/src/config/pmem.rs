//! Persistent memory: a file in the guest's address space (Cloud Hypervisor's `PmemConfig`).

use std::path::PathBuf;

use devices::virtio::pmem::file::SIZE_ALIGN;
use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::option_parser::{ByteSized, Key, OptionError, Options};
use super::pci_common::PciCommon;

/// What is wrong with persistent memory.
#[derive(Debug, thiserror::Error)]
pub enum PmemConfigError {
    /// Nothing to map.
    #[error("--pmem: there is no file to map; write file=PATH")]
    NoFile,
    /// A size that the guest cannot map.
    #[error("--pmem file={}: size={size} is not a multiple of 2M above 0; round it", file.display())]
    Size {
        /// The file.
        file: PathBuf,
        /// The size.
        size: u64,
    },
}

/// A file in the guest's address space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmemConfig {
    /// Name and place.
    #[serde(flatten)]
    pub pci: PciCommon,
    /// The file, or a directory in which one without a name is made.
    pub file: PathBuf,
    /// How much of it, in bytes; all of it if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Whether what the guest writes stays out of the file.
    #[serde(default)]
    pub discard_writes: bool,
}

impl PmemConfig {
    /// From one value of `--pmem`.
    ///
    /// # Errors
    /// See [`OptionError`].
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        const KEYS: [Key; 3] = [Key::Value("file"), Key::Value("size"), Key::Value("discard_writes")];
        let options = Options::parse("--pmem", text, &[&KEYS[..], &PciCommon::KEYS].concat())?;
        Ok(Self {
            pci: PciCommon::from_options(&options)?,
            file: options.get_or_default("file")?,
            size: options.get::<ByteSized>("size")?.map(|size| size.0),
            discard_writes: options.toggle("discard_writes", false)?,
        })
    }

    /// Whether it makes sense.
    ///
    /// # Errors
    /// See [`PmemConfigError`].
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        if self.file.as_os_str().is_empty() {
            return Err(PmemConfigError::NoFile.into());
        }
        match self.size {
            Some(size) if size == 0 || !size.is_multiple_of(SIZE_ALIGN) => {
                Err(PmemConfigError::Size { file: self.file.clone(), size }.into())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_keys_are_read_and_what_is_not_given_has_cloud_hypervisors_default() {
        let all = PmemConfig::parse("file=/a,size=2M,discard_writes=on,id=p,pci_device_id=5").unwrap();
        assert_eq!((all.file.to_str(), all.size, all.discard_writes), (Some("/a"), Some(2 << 20), true));
        assert_eq!((all.pci.id.as_deref(), all.pci.pci_device_id), (Some("p"), Some(5)));
        let plain = PmemConfig::parse("file=/a").unwrap();
        let json: PmemConfig = serde_json::from_str(r#"{"file": "/a"}"#).unwrap();
        assert_eq!((plain.size, plain.discard_writes, &plain), (None, false, &json));
        assert!(PmemConfig::parse("path=/a").is_err());
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_remedy() {
        for (text, words) in [("id=p", "file=PATH"), ("file=/a,size=3M", "2M"), ("file=/a,size=0", "size=0")]
        {
            let error = PmemConfig::parse(text).unwrap().validate().unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
