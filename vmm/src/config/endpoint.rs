//! Where a socket, file or pipe of the VMM's own is: a path, or a descriptor that whoever started us has opened.

use std::path::PathBuf;

use super::OptionError;
use super::option_parser::{Key, Options};

/// A path or a descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A path.
    Path(PathBuf),
    /// The number of an open descriptor.
    Descriptor(i32),
}

impl Endpoint {
    /// From the value of `option`, if it is given: `path=PATH`, `fd=N`, or just a path.
    ///
    /// # Errors
    /// Neither, or both.
    pub fn parse_option(option: &'static str, text: Option<&str>) -> Result<Option<Self>, OptionError> {
        text.map(|text| Self::parse(option, text)).transpose()
    }

    fn parse(option: &'static str, text: &str) -> Result<Self, OptionError> {
        const KEYS: &[Key] = &[Key::Value("path"), Key::Value("fd")];
        if !text.is_empty() && !text.contains('=') {
            return Ok(Self::Path(text.into()));
        }
        let options = Options::parse(option, text, KEYS)?;
        let path: Option<PathBuf> = options.get("path")?;
        let descriptor: Option<u32> = options.get("fd")?;
        match (path, descriptor.map(i32::try_from)) {
            (Some(path), None) if !path.as_os_str().is_empty() => Ok(Self::Path(path)),
            (None, Some(Ok(descriptor))) => Ok(Self::Descriptor(descriptor)),
            _ => Err(OptionError::Endpoint { option, value: text.to_owned() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_with_or_without_its_key_and_a_descriptor_are_understood() {
        let parse = |text| Endpoint::parse("--api-socket", text);
        assert_eq!(parse("/run/vm.sock").unwrap(), Endpoint::Path("/run/vm.sock".into()));
        assert_eq!(parse("path=/run/vm.sock").unwrap(), Endpoint::Path("/run/vm.sock".into()));
        assert_eq!(parse("fd=3").unwrap(), Endpoint::Descriptor(3));
        for wrong in ["", "path=", "fd=", "fd=-1", "fd=3,path=/a", "socket=/a", "fd=99999999999"] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(error.contains("--api-socket"), "{wrong}: {error}");
        }
    }
}
