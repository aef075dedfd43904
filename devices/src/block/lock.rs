//! Locks on image files, so that no two machines write one: open file description locks (fcntl(2), F_OFD_SETLK), shared by those who only read.
//!
//! The system call for them has no safe wrapper in what the project uses, and that is the module's only unsafe.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::DiskError;

/// What of a file is locked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Granularity {
    /// The bytes that there are: some network storage can lock nothing else.
    #[default]
    ByteRange,
    /// All of it, with what may be added.
    Full,
}

/// Locks `file`, which is at `path`: for reading beside others if `readonly`, else alone. The lock is gone when the last copy of the descriptor is.
///
/// # Errors
/// Somebody has it, or it cannot be locked.
pub fn lock(
    file: &File,
    path: &Path,
    readonly: bool,
    granularity: Granularity,
    size: u64,
) -> Result<(), DiskError> {
    match set(file, readonly, granularity, size) {
        Ok(()) => Ok(()),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Err(DiskError::Locked {
            path: path.into(),
            holder: holder(file).unwrap_or_else(|| "another process".to_owned()),
            purpose: if readonly { "reading" } else { "writing" },
        }),
        Err(source) => Err(DiskError::Lock { path: path.into(), source }),
    }
}

fn set(file: &File, readonly: bool, granularity: Granularity, size: u64) -> io::Result<()> {
    let kind = if readonly { libc::F_RDLCK } else { libc::F_WRLCK };
    // A length of 0 is all there is and will be.
    let len = match granularity {
        Granularity::Full => 0,
        Granularity::ByteRange => size.try_into().map_err(io::Error::other)?,
    };
    let narrow = |value: i32| libc::c_short::try_from(value).map_err(io::Error::other);
    let lock = libc::flock {
        l_type: narrow(kind)?,
        l_whence: narrow(libc::SEEK_SET)?,
        l_start: 0,
        l_len: len,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and the structure is one that the call only reads.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A process that has the file open. The kernel does not say whose an open file description lock is.
fn holder(file: &File) -> Option<String> {
    let wanted = file.metadata().ok()?;
    let own = std::process::id();
    let same = |entry: &fs::DirEntry| {
        fs::metadata(entry.path())
            .is_ok_and(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()))
    };
    let mut others = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let open = fs::read_dir(entry.path().join("fd")).ok()?.flatten().filter(same).count();
        // This process has opened it, too.
        (open > if pid == own { 1 } else { 0 }).then_some(pid)
    });
    let pid = others.next()?;
    if pid == own {
        return Some("another disk of this machine".to_owned());
    }
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(format!("process {pid} ({})", name.trim_end()))
}
