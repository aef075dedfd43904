//! The directory of a snapshot, laid out as Cloud Hypervisor's: `config.json`, `state.json` and `memory-ranges`.
//!
//! The configuration is that of `vm.info`, for whoever wants to change paths in it. What the other two hold is Dormouse's own. An earlier snapshot is
//! never overwritten, and one that could not be written whole is taken away again.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{MachineState, SnapshotError};
use crate::config::{VmConfig, from_json};
use crate::remedy::remedy;

const CONFIG: &str = "config.json";
const STATE: &str = "state.json";
const MEMORY: &str = "memory-ranges";

/// Changes whenever what is in `state.json` cannot be read by older or newer versions.
const FORMAT: u32 = 1;

/// What is in `state.json`.
#[derive(Debug, Serialize, Deserialize)]
struct StateFile<T> {
    format: u32,
    version: String,
    machine: T,
}

/// A directory with a snapshot in it, or to be.
#[derive(Clone, Debug)]
pub struct Directory(PathBuf);

/// A file of a snapshot that cannot be used, with what the system says.
pub(super) fn file_error<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> SnapshotError + 'a {
    move |source| SnapshotError::File { what, path: path.to_owned(), remedy: remedy(&source), source }
}

impl Directory {
    /// The directory that an URL names: `file:///path`.
    pub fn of_url(url: &str) -> Result<Self, SnapshotError> {
        let path = url.strip_prefix("file://").filter(|path| path.starts_with('/'));
        path.map(|path| Self(path.into())).ok_or_else(|| SnapshotError::Url { url: url.to_owned() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a snapshot. `write` fills the file of memory, and returns the state.
    pub fn save(
        &self,
        config: &VmConfig,
        write: impl FnOnce(&File) -> Result<MachineState, SnapshotError>,
    ) -> Result<(), SnapshotError> {
        fs::create_dir_all(&self.0).map_err(file_error("make the directory", &self.0))?;
        let paths = [MEMORY, CONFIG, STATE].map(|name| self.0.join(name));
        if let Some(path) = paths.iter().find(|path| path.symlink_metadata().is_ok()) {
            return Err(SnapshotError::Exists { path: path.clone() });
        }
        let result = self.write_all(config, write);
        if result.is_err() {
            for path in &paths {
                // Those that have not been made are not there.
                let _ = fs::remove_file(path);
            }
        }
        result
    }

    fn write_all(
        &self,
        config: &VmConfig,
        write: impl FnOnce(&File) -> Result<MachineState, SnapshotError>,
    ) -> Result<(), SnapshotError> {
        let memory = self.create(MEMORY)?;
        let machine = write(&memory)?;
        self.write_json(CONFIG, config)?;
        let version = format!("v{}", env!("CARGO_PKG_VERSION"));
        // The last one: a directory without it is no snapshot.
        self.write_json(STATE, &StateFile { format: FORMAT, version, machine })?;
        File::open(&self.0).and_then(|dir| dir.sync_all()).map_err(file_error("write", &self.0))
    }

    /// A new file that nobody else can read: it holds what the guest does.
    fn create(&self, name: &str) -> Result<File, SnapshotError> {
        use std::os::unix::fs::OpenOptionsExt;
        let path = self.0.join(name);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        file.map_err(file_error("write", &path))
    }

    fn write_json(&self, name: &str, value: &impl Serialize) -> Result<(), SnapshotError> {
        let path = self.0.join(name);
        let mut file = BufWriter::new(self.create(name)?);
        let written = serde_json::to_writer(&mut file, value).map_err(io::Error::from);
        let written = written.and_then(|()| file.flush()).and_then(|()| file.get_ref().sync_all());
        written.map_err(file_error("write", &path))
    }

    fn read_json<T>(
        &self,
        name: &str,
        read: impl FnOnce(&[u8]) -> serde_json::Result<T>,
    ) -> Result<T, SnapshotError> {
        let path = self.0.join(name);
        let text = fs::read(&path).map_err(file_error("read", &path))?;
        read(&text).map_err(|source| SnapshotError::Unreadable { path, source })
    }

    /// The configuration, which somebody may have changed.
    pub fn config(&self) -> Result<VmConfig, SnapshotError> {
        // Whoever changes it may write null for what is absent.
        self.read_json(CONFIG, from_json)
    }

    /// The state.
    pub fn state(&self) -> Result<MachineState, SnapshotError> {
        // Null means something here.
        let state: Value = self.read_json(STATE, |text| serde_json::from_slice(text))?;
        if state.get("format").and_then(Value::as_u64) != Some(FORMAT.into()) {
            let version = state.get("version").and_then(Value::as_str).unwrap_or("another program");
            return Err(SnapshotError::Format { path: self.0.join(STATE), version: version.to_owned() });
        }
        let wrong = |source| SnapshotError::Unreadable { path: self.0.join(STATE), source };
        let file: StateFile<MachineState> = serde_json::from_value(state).map_err(wrong)?;
        Ok(file.machine)
    }

    /// The content of memory.
    pub fn memory(&self) -> Result<(File, PathBuf), SnapshotError> {
        let path = self.0.join(MEMORY);
        let file = File::open(&path).map_err(file_error("read", &path))?;
        Ok((file, path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(name: &str) -> Directory {
        let path = std::env::temp_dir().join(format!("dormouse-snapshot-{name}-{}", std::process::id()));
        drop(fs::remove_dir_all(&path));
        Directory::of_url(&format!("file://{}", path.display())).unwrap()
    }

    #[test]
    fn only_a_directory_of_this_host_can_hold_a_snapshot() {
        assert_eq!(Directory::of_url("file:///a/b").unwrap().path(), Path::new("/a/b"));
        for url in ["/a", "a", "file://a", "http:///a", ""] {
            let error = Directory::of_url(url).unwrap_err().to_string();
            assert!(error.contains("file:///"), "{error}");
        }
    }

    #[test]
    fn a_snapshot_that_fails_leaves_nothing_and_one_that_is_there_is_kept() {
        let directory = directory("fails");
        let fail = |_: &File| Err(SnapshotError::Device { id: "d".to_owned(), why: "no".to_owned() });
        assert!(directory.save(&VmConfig::default(), fail).is_err());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        fs::write(directory.path().join(CONFIG), "mine").unwrap();
        let error = directory.save(&VmConfig::default(), fail).unwrap_err().to_string();
        assert!(error.contains("config.json"), "{error}");
        assert_eq!(fs::read(directory.path().join(CONFIG)).unwrap(), b"mine");
        fs::remove_dir_all(directory.path()).unwrap();
    }

    #[test]
    fn a_state_that_is_not_ours_is_refused_by_its_version() {
        let directory = directory("foreign");
        fs::create_dir_all(directory.path()).unwrap();
        for (text, says) in [
            (r#"{"id":"snapshot","snapshots":{}}"#, "another program"),
            (r#"{"format":7,"version":"v9.0.0","machine":{}}"#, "v9.0.0"),
            ("{", "state.json"),
        ] {
            fs::write(directory.path().join(STATE), text).unwrap();
            let error = directory.state().unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        fs::remove_dir_all(directory.path()).unwrap();
    }
}
