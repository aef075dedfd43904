//! The debug console: a port for text, and where that goes.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use arch::layout;
use devices::serial::SerialMode;
use serde::{Deserialize, Serialize};

use super::option_parser::{Key, OptionError, OptionValue, Options};
use super::{ConfigError, ConsoleConfig, ConsoleMode};

/// The debug console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DebugConsoleConfig {
    /// As for the other consoles.
    pub mode: ConsoleMode,
    /// The file, or the name of the terminal once it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Its port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iobase: Option<u16>,
}

impl Default for DebugConsoleConfig {
    fn default() -> Self {
        Self { mode: ConsoleMode::Off, file: None, iobase: Some(layout::DEBUG_CONSOLE_PORT) }
    }
}

/// Ports of what is always there, whether in the VMM or in KVM.
const TAKEN: [RangeInclusive<u16>; 11] = [
    // Interrupt controllers, interval timer, and what the controllers' edges are set by.
    0x20..=0x21,
    0x40..=0x43,
    0xa0..=0xa1,
    0x4d0..=0x4d1,
    layout::I8042_PORT..=layout::I8042_PORT + 4,
    layout::CMOS_PORT..=layout::CMOS_PORT + 1,
    layout::SERIAL_PORT..=layout::SERIAL_PORT + 7,
    layout::PM1_EVENT_PORT..=layout::PM1_EVENT_PORT + 5,
    layout::PM_TIMER_PORT..=layout::PM_TIMER_PORT + 3,
    layout::PCI_CONFIG_PORT..=layout::PCI_CONFIG_PORT + 7,
    layout::PCI_IO_START..=layout::PCI_IO_LAST,
];

/// A port, in either way of writing it.
struct Port(u16);

impl OptionValue for Port {
    const EXPECTED: &'static str = "a port such as 0xe9 or 233";

    fn parse(text: &str) -> Option<Self> {
        let port = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_hexdigit()) => {
                u16::from_str_radix(digits, 16).ok()?
            }
            Some(_) => return None,
            None => u16::parse(text)?,
        };
        Some(Self(port))
    }
}

impl DebugConsoleConfig {
    /// From the value of `--debug-console`.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        use Key::{Value, Word};
        const OPTION: &str = "--debug-console";
        const KEYS: &[Key] =
            &[Word("off"), Word("null"), Word("pty"), Word("tty"), Value("file"), Value("iobase")];
        let options = Options::parse(OPTION, text, KEYS)?;
        let file: Option<PathBuf> = options.get("file")?;
        let modes = [
            (options.has("off"), ConsoleMode::Off),
            (options.has("null"), ConsoleMode::Null),
            (options.has("pty"), ConsoleMode::Pty),
            (options.has("tty"), ConsoleMode::Tty),
            (file.is_some(), ConsoleMode::File),
        ];
        let mut given = modes.iter().filter(|(given, _)| *given).map(|&(_, mode)| mode);
        let (Some(mode), None) = (given.next(), given.next()) else {
            return Err(OptionError::InvalidValue {
                option: OPTION,
                key: "the mode",
                value: text.to_owned(),
                expected: "one of off, null, pty, tty, file=PATH",
            });
        };
        let port = options.get::<Port>("iobase")?.map_or(layout::DEBUG_CONSOLE_PORT, |port| port.0);
        Ok(Self { mode, file, iobase: Some(port) })
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.iobase.unwrap_or(layout::DEBUG_CONSOLE_PORT)
    }

    /// What its output goes to.
    pub fn output(&self) -> SerialMode {
        ConsoleConfig { mode: self.mode, file: self.file.clone(), ..ConsoleConfig::default() }.serial_mode()
    }

    /// Whether it can be.
    ///
    /// # Errors
    /// [`ConfigError::DebugConsole`].
    pub fn validate(&self) -> Result<(), ConfigError> {
        let port = self.port();
        let why = match self.mode {
            ConsoleMode::Off => return Ok(()),
            ConsoleMode::Socket => {
                "it has no mode Socket; use Null, Pty, Tty or File (null, pty, tty, file=PATH)"
            }
            ConsoleMode::File if self.file.is_none() => "mode File needs the file (file=PATH)",
            _ if TAKEN.iter().any(|ports| ports.contains(&port)) => {
                "its port (iobase) is another device's; use 0xe9 or 0x402"
            }
            _ => return Ok(()),
        };
        Err(ConfigError::DebugConsole { port, why })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> DebugConsoleConfig {
        DebugConsoleConfig::parse(text).unwrap()
    }

    #[test]
    fn modes_and_port_are_read_and_the_default_port_is_0xe9() {
        assert_eq!(parse("off"), DebugConsoleConfig::default());
        let file = parse("file=/tmp/debug,iobase=0x402");
        assert_eq!((file.mode, file.port()), (ConsoleMode::File, 0x402));
        assert_eq!(file.output(), SerialMode::File("/tmp/debug".into()));
        assert_eq!((parse("tty").mode, parse("tty").port()), (ConsoleMode::Tty, 0xe9));
        assert_eq!((parse("iobase=1026,pty").mode, parse("null,iobase=233").port()), (ConsoleMode::Pty, 233));
        assert_eq!(parse("null").output(), SerialMode::Null);
    }

    #[test]
    fn wrong_values_name_the_option_and_what_is_possible() {
        for (text, words) in [
            ("socket=/tmp/s", "off, null, pty, tty, file, iobase"),
            ("", "one of off, null, pty, tty, file=PATH"),
            ("iobase=0xe9", "one of off, null, pty, tty, file=PATH"),
            ("tty,pty", "one of off, null, pty, tty, file=PATH"),
            ("tty,iobase=0x10000", "a port such as 0xe9"),
            ("tty,iobase=0x+9", "a port such as 0xe9"),
            ("tty,iobase=70000", "a port such as 0xe9"),
        ] {
            let error = DebugConsoleConfig::parse(text).unwrap_err().to_string();
            assert!(error.contains("--debug-console") && error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn ports_of_other_devices_and_modes_that_are_not_there_are_refused() {
        for port in [0x20, 0x43, 0x61, 0x64, 0x71, 0x3f8, 0x3ff, 0x605, 0x60b, 0xcf9, 0x1000, 0xffff] {
            let config = DebugConsoleConfig { iobase: Some(port), ..parse("null") };
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(&format!("{port:#x}")) && error.contains("0xe9"), "{error}");
            assert!(DebugConsoleConfig { mode: ConsoleMode::Off, ..config }.validate().is_ok());
        }
        for port in [0xe9, 0x402, 0x80, 0x2f8] {
            assert!(DebugConsoleConfig { iobase: Some(port), ..parse("null") }.validate().is_ok());
        }
        let error =
            |mode| DebugConsoleConfig { mode, ..Default::default() }.validate().unwrap_err().to_string();
        assert!(error(ConsoleMode::Socket).contains("no mode Socket"));
        assert!(error(ConsoleMode::File).contains("file=PATH"));
    }

    #[test]
    fn a_configuration_without_a_port_has_the_default_one() {
        let config: DebugConsoleConfig = serde_json::from_str(r#"{"mode":"Null"}"#).unwrap();
        assert_eq!(config.port(), 0xe9);
        assert_eq!(serde_json::to_string(&config).unwrap(), r#"{"mode":"Null"}"#);
        let default = serde_json::to_string(&DebugConsoleConfig::default()).unwrap();
        assert_eq!(default, r#"{"mode":"Off","iobase":233}"#);
    }
}
