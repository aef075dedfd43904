//! Which program this is: it answers to the names of Cloud Hypervisor's two programs as well, so that what starts those can start it by a link.
//!
//! As `cloud-hypervisor` it has the VMM's options and no commands, as `ch-remote` those of `dormouse ctl` and no JSON made readable. libvirt
//! takes the version from the first line of `--version` (`src/ch/ch_conf.c`), Kata the level of a message from the log's lines.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::OnceLock;

/// The name that the program was started by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Program {
    /// Its own, or one that means nothing.
    #[default]
    Dormouse,
    /// Cloud Hypervisor's VMM.
    CloudHypervisor,
    /// Cloud Hypervisor's client.
    ChRemote,
}

/// The program of this process.
static CURRENT: OnceLock<Program> = OnceLock::new();

macro_rules! version {
    () => {
        concat!("v54.0.0-dormouse-", env!("CARGO_PKG_VERSION"))
    };
}

/// What Cloud Hypervisor's programs say to `--version` behind their names: the release whose interface this is, then whose it really is.
/// Nothing with a slash, after which libvirt would look for the number.
pub const VERSION: &str = version!();

/// The same of the VMM, which has a second line. Migration is not there yet, so its protocol has no version.
pub const VERSION_LINES: &str = concat!(version!(), "\nMigration Protocol Versions: none");

impl Program {
    /// By the first word of the command line: the file name counts, wherever the link is.
    pub fn of(word: Option<&OsStr>) -> Self {
        match word.and_then(|word| Path::new(word).file_name()?.to_str()) {
            Some("cloud-hypervisor") => Self::CloudHypervisor,
            Some("ch-remote") => Self::ChRemote,
            _ => Self::Dormouse,
        }
    }

    /// Keeps this for [`Self::current`]; the first time counts.
    pub fn announce(self) {
        let _ = CURRENT.set(self);
    }

    /// The program of this process.
    pub fn current() -> Self {
        CURRENT.get().copied().unwrap_or_default()
    }

    /// What its messages begin with.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dormouse => "dormouse",
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::ChRemote => "ch-remote",
        }
    }

    /// A failure, as it goes to standard error. Clients of Cloud Hypervisor look for its first line.
    pub fn failure(self, why: &str) -> String {
        let line = format!("{}: error: {why}\n", self.name());
        match self {
            Self::CloudHypervisor => {
                format!("Error: Cloud Hypervisor exited with the following chain of errors:\n{line}")
            }
            Self::Dormouse | Self::ChRemote => line,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_name_of_the_first_word_says_which_program_it_is() {
        let of = |word: &str| Program::of(Some(OsStr::new(word)));
        for word in ["cloud-hypervisor", "/opt/kata/bin/cloud-hypervisor", "./cloud-hypervisor"] {
            assert_eq!(of(word), Program::CloudHypervisor, "{word}");
        }
        assert_eq!(of("/usr/bin/ch-remote"), Program::ChRemote);
        for word in ["dormouse", "", "/", "cloud-hypervisor/dormouse", "cloud-hypervisor-static", "remote"] {
            assert_eq!(of(word), Program::Dormouse, "{word}");
        }
        assert_eq!(Program::of(None), Program::Dormouse);
    }

    #[test]
    fn a_failure_names_the_program_and_begins_as_clients_expect() {
        assert_eq!(Program::Dormouse.failure("no kernel"), "dormouse: error: no kernel\n");
        assert_eq!(Program::ChRemote.failure("no socket"), "ch-remote: error: no socket\n");
        assert_eq!(
            Program::CloudHypervisor.failure("no kernel"),
            "Error: Cloud Hypervisor exited with the following chain of errors:\ncloud-hypervisor: error: no kernel\n"
        );
    }
}
