//! The socket device: sockets between the guest and the host.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::option_parser::{Key, OptionError, Options};
use super::pci_common::PciCommon;

/// The guest's number, and where the host's programs find it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockConfig {
    /// The guest's context identifier.
    pub cid: u32,
    /// The Unix socket.
    pub socket: PathBuf,
    /// Name and place.
    #[serde(flatten)]
    pub pci: PciCommon,
}

/// What is wrong with a socket device.
#[derive(Debug, thiserror::Error)]
pub enum VsockConfigError {
    /// A number that no guest can have.
    #[error("--vsock cid={0} is not possible; use 3 to 4294967294: 0 to 2 are the host's")]
    Cid(u32),
    /// No path.
    #[error("--vsock socket= is empty; give the path of the Unix socket that is to be made")]
    NoSocket,
}

impl VsockConfig {
    /// From the value of `--vsock`.
    ///
    /// # Errors
    /// See [`OptionError`].
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let keys = [&[Key::Value("cid"), Key::Value("socket")], &PciCommon::KEYS[..]].concat();
        let options = Options::parse("--vsock", text, &keys)?;
        // What is missing is found when the whole configuration is looked at.
        Ok(Self {
            cid: options.get_or_default("cid")?,
            socket: options.get_or_default("socket")?,
            pci: PciCommon::from_options(&options)?,
        })
    }

    /// Whether there can be such a device.
    ///
    /// # Errors
    /// [`ConfigError::Vsock`].
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(3..u32::MAX).contains(&self.cid) {
            return Err(VsockConfigError::Cid(self.cid).into());
        }
        if self.socket.as_os_str().is_empty() {
            return Err(VsockConfigError::NoSocket.into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_and_the_api_have_the_same_keys() {
        let config = VsockConfig::parse("cid=3,socket=/run/v,id=s,pci_device_id=7").unwrap();
        let json = r#"{"cid":3,"socket":"/run/v","id":"s","pci_segment":0,"pci_device_id":7}"#;
        assert_eq!(serde_json::to_string(&config).unwrap(), json);
        assert_eq!(serde_json::from_str::<VsockConfig>(json).unwrap(), config);
        config.validate().unwrap();
        assert!(VsockConfig::parse("cid=x,socket=/run/v").is_err());
        assert!(VsockConfig::parse("cid=3,path=/run/v").is_err());
    }

    #[test]
    fn numbers_of_the_host_and_a_missing_path_are_refused() {
        for (text, wrong) in [
            ("socket=/run/v", "cid=0"),
            ("cid=2,socket=/run/v", "cid=2"),
            ("cid=4294967295,socket=/run/v", "cid=4294967295"),
            ("cid=3", "socket="),
        ] {
            let error = VsockConfig::parse(text).unwrap().validate().unwrap_err().to_string();
            assert!(error.contains(wrong), "{text}: {error}");
        }
    }
}
