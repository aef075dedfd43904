//! Where VMMs are found: each serves a read-only status socket, named after its process, in a directory of its user.

use std::io;
use std::path::{Path, PathBuf};

use super::TopError;

/// Directory of the status sockets of root's VMMs.
const SYSTEM: &str = "/run/dormouse";
/// The same below a user's runtime directory.
const OF_USER: &str = "dormouse";
/// What follows the process ID in the name of a status socket.
const SUFFIX: &str = ".sock";

/// Which VMMs are looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// All with a status socket in this directory.
    Directory(PathBuf),
    /// These.
    Named(Vec<PathBuf>),
}

impl Source {
    /// Those that the user names, or else all of the user.
    pub fn new(named: &[PathBuf]) -> Result<Self, TopError> {
        if !named.is_empty() {
            return Ok(Self::Named(named.to_vec()));
        }
        if rustix::process::geteuid().is_root() {
            return Ok(Self::Directory(SYSTEM.into()));
        }
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|runtime| !runtime.is_empty());
        Ok(Self::Directory(Path::new(&runtime.ok_or(TopError::NoDirectory)?).join(OF_USER)))
    }

    /// The sockets there are now, in the order of their process IDs. A directory that is not there has none: no VMM has run yet.
    pub fn sockets(&self) -> Result<Vec<PathBuf>, TopError> {
        let directory = match self {
            Self::Named(sockets) => return Ok(sockets.clone()),
            Self::Directory(directory) => directory,
        };
        let failed = |cause| TopError::Directory { directory: directory.clone(), cause };
        let entries = match directory.read_dir() {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            if let Some(pid) = pid(&path) {
                found.push((pid, path));
            }
        }
        found.sort();
        Ok(found.into_iter().map(|(_, path)| path).collect())
    }

    /// Whether a socket where nobody listens means only that its VMM has gone.
    pub fn forgets(&self) -> bool {
        matches!(self, Self::Directory(_))
    }
}

/// The process that a status socket is named after.
pub fn pid(socket: &Path) -> Option<u32> {
    socket.file_name()?.to_str()?.strip_suffix(SUFFIX)?.parse().ok()
}
