//! The paravirtual console: where it leads, as for the serial port, and its place on the PCI bus.

use std::path::PathBuf;

use devices::serial::SerialMode;
use serde::{Deserialize, Serialize};

use super::option_parser::{Key, OptionError, Options};
use super::pci_common::PciCommon;
use super::{ConfigError, ConsoleConfig, ConsoleMode, VmConfig};

/// The paravirtual console. There is none unless it is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioConsoleConfig {
    /// Where it leads.
    #[serde(flatten)]
    pub target: ConsoleConfig,
    /// Name and place.
    #[serde(flatten)]
    pub pci: PciCommon,
}

impl Default for VirtioConsoleConfig {
    fn default() -> Self {
        Self { target: ConsoleConfig::off(), pci: PciCommon::default() }
    }
}

/// What is wrong with a console.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// One terminal for two.
    #[error(
        "console mode tty is specified for both --serial and --console, and there is one standard input; give one of them pty, file=, socket=, null or off"
    )]
    DoubleTty,
    /// Nowhere to write to.
    #[error("--console mode {mode:?} needs the path: write {key}=PATH")]
    NoPath {
        /// The mode.
        mode: ConsoleMode,
        /// The key that is missing.
        key: &'static str,
    },
}

impl VirtioConsoleConfig {
    /// From the value of `--console`.
    ///
    /// # Errors
    /// See [`OptionError`].
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let keys = [&ConsoleConfig::KEYS[..], &PciCommon::KEYS[..]].concat();
        let (target, options) = ConsoleConfig::parse_with("--console", text, &keys)?;
        Ok(Self { target, pci: PciCommon::from_options(&options)? })
    }

    /// Whether the guest has such a device.
    pub fn is_there(&self) -> bool {
        self.target.mode != ConsoleMode::Off
    }
}

impl ConsoleConfig {
    pub(super) const KEYS: [Key; 6] = [
        Key::Word("off"),
        Key::Word("null"),
        Key::Word("pty"),
        Key::Word("tty"),
        Key::Value("file"),
        Key::Value("socket"),
    ];

    /// From the value of `option`, which is `--serial`.
    ///
    /// # Errors
    /// See [`OptionError`].
    pub fn parse(option: &'static str, text: &str) -> Result<Self, OptionError> {
        Ok(Self::parse_with(option, text, &Self::KEYS)?.0)
    }

    fn parse_with(option: &'static str, text: &str, keys: &[Key]) -> Result<(Self, Options), OptionError> {
        let mode_error = || OptionError::Mode { option, value: text.to_owned() };
        let options = Options::parse(option, text, keys).map_err(|e| match e {
            OptionError::UnknownKey { .. } => mode_error(),
            e => e,
        })?;
        let file: Option<PathBuf> = options.get("file")?;
        let socket: Option<PathBuf> = options.get("socket")?;
        let modes = [
            (options.has("off"), ConsoleMode::Off),
            (options.has("null"), ConsoleMode::Null),
            (options.has("pty"), ConsoleMode::Pty),
            (options.has("tty"), ConsoleMode::Tty),
            (file.is_some(), ConsoleMode::File),
            (socket.is_some(), ConsoleMode::Socket),
        ];
        let mut given = modes.iter().filter(|(given, _)| *given).map(|&(_, mode)| mode);
        match (given.next(), given.next()) {
            (Some(mode), None) => Ok((Self { mode, file, socket }, options)),
            _ => Err(mode_error()),
        }
    }

    /// As the devices take it.
    pub fn serial_mode(&self) -> SerialMode {
        match (self.mode, &self.file, &self.socket) {
            (ConsoleMode::Off, ..) => SerialMode::Off,
            (ConsoleMode::Pty, ..) => SerialMode::Pty,
            (ConsoleMode::Tty, ..) => SerialMode::Tty,
            (ConsoleMode::File, Some(path), _) => SerialMode::File(path.clone()),
            (ConsoleMode::Socket, _, Some(path)) => SerialMode::Socket(path.clone()),
            (ConsoleMode::Null | ConsoleMode::File | ConsoleMode::Socket, ..) => SerialMode::Null,
        }
    }
}

impl VmConfig {
    /// Checks the console, and that it and the serial port are not in each other's way.
    pub(super) fn validate_console(&self) -> Result<(), ConfigError> {
        let ConsoleConfig { mode, file, socket } = &self.console.target;
        match mode {
            ConsoleMode::Tty if self.serial.mode == ConsoleMode::Tty => Err(ConsoleError::DoubleTty.into()),
            ConsoleMode::File if file.is_none() => {
                Err(ConsoleError::NoPath { mode: *mode, key: "file" }.into())
            }
            ConsoleMode::Socket if socket.is_none() => {
                Err(ConsoleError::NoPath { mode: *mode, key: "socket" }.into())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_has_a_place_on_the_bus_and_a_serial_port_has_none() {
        let config = VirtioConsoleConfig::parse("socket=/run/c,pci_device_id=5").unwrap();
        let json = r#"{"mode":"Socket","socket":"/run/c","pci_segment":0,"pci_device_id":5}"#;
        assert_eq!(serde_json::to_string(&config).unwrap(), json);
        assert_eq!(serde_json::from_str::<VirtioConsoleConfig>(json).unwrap(), config);
        assert!(ConsoleConfig::parse("--serial", "tty,pci_device_id=5").is_err());
        // What clients fill in for the serial port without meaning it.
        let serial: ConsoleConfig = serde_json::from_str(r#"{"mode":"Tty","iommu":false}"#).unwrap();
        assert_eq!(serial.mode, ConsoleMode::Tty);
        for bad in ["", "tty,pty", "disk", "tty,iommu=maybe"] {
            assert!(VirtioConsoleConfig::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn one_standard_input_is_not_for_two_and_paths_are_needed() {
        let with = |serial: &str, console: &str| VmConfig {
            serial: ConsoleConfig::parse("--serial", serial).unwrap(),
            console: VirtioConsoleConfig::parse(console).unwrap(),
            ..VmConfig::default()
        };
        let error = with("tty", "tty").validate_console().unwrap_err().to_string();
        assert!(error.contains("--serial and --console"), "{error}");
        for (serial, console) in [("tty", "pty"), ("null", "tty"), ("pty", "pty"), ("tty", "off")] {
            with(serial, console).validate_console().unwrap();
        }
        let mut config = with("null", "file=/run/c");
        config.console.target.file = None;
        let error = config.validate_console().unwrap_err().to_string();
        assert!(error.contains("file=PATH"), "{error}");
    }
}
