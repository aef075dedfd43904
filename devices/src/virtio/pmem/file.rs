//! The file behind persistent memory: mapped once, and mended where the host takes it away under the guest.
//!
//! The guest reaches the mapping without the VMM. Where the host has no page for it (the file has become shorter, its file system is full, its
//! disk is broken) the vCPU cannot go on. [`MappedFile::mend`] and [`MappedFile::give_up`] then put other pages there, and from then on each flush
//! fails, which is how the guest hears of it.
#![allow(unsafe_code)] // mmap of the user's file.

use std::ffi::c_void;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use log::error;
use rustix::fs::{SeekFrom as SeekTo, seek};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// A file's size must be a multiple of this: what the guest maps it by.
pub const SIZE_ALIGN: u64 = 2 << 20;
/// The page that the kernel maps files by.
const PAGE: u64 = 4096;
/// Pieces of a file, data or holes, that are mapped apart: the kernel has 65530 mappings for a process.
const PIECES_MAX: usize = 4096;

/// A file that cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// It cannot be opened.
    #[error("--pmem file={}: {source}; {}", path.display(), advice(source))]
    Open {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A directory has no size.
    #[error(
        "--pmem file={} is a directory: a file without a name is made in it, and needs size=SIZE",
        path.display()
    )]
    NoSize {
        /// The directory.
        path: PathBuf,
    },
    /// A size that the guest cannot map.
    #[error(
        "--pmem file={}: its {size} bytes are not a multiple of 2 MiB (2097152) above 0; use 'truncate -s SIZE {}', or size=SIZE",
        path.display(), path.display()
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// The size.
        size: u64,
    },
    /// More than there is.
    #[error(
        "--pmem file={}: size={wanted} is more than the {has} bytes that the file has; enlarge it with 'truncate -s {wanted} {}'",
        path.display(), path.display()
    )]
    TooShort {
        /// The file.
        path: PathBuf,
        /// Its size.
        has: u64,
        /// The size asked for.
        wanted: u64,
    },
    /// The kernel does not map it.
    #[error("--pmem file={}: it cannot be mapped: {source}; use a regular file or a block device", path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "create it with 'truncate -s SIZE FILE', in multiples of 2M",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "make it writable, or write discard_writes=on to keep the guest's writes out of it"
        }
        io::ErrorKind::Unsupported => "this file system has no files without a name (O_TMPFILE): name a file",
        _ => "the host's kernel log (dmesg) may say more",
    }
}

/// How much of the file the guest still has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Health {
    /// Bytes from the start that show the file.
    whole: u64,
    /// Whether what the guest writes goes into the file.
    writes_through: bool,
    /// Whether something has been taken from the guest.
    damaged: bool,
}

/// What a file with holes has of its file system, and what that has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    blocks: u64,
    bytes: u64,
}

impl Room {
    /// Whether nothing to speak of is left.
    pub fn is_none(self) -> bool {
        self.bytes < 64 << 10
    }
}

/// A file in this process' address space.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    file: File,
    size: u64,
    address: *mut c_void,
    health: Mutex<Health>,
}

// SAFETY: the address is that of a mapping which this process never reads or writes; it is handed to KVM, and to mmap under a lock.
unsafe impl Send for MappedFile {}
// SAFETY: as above.
unsafe impl Sync for MappedFile {}

impl MappedFile {
    /// Maps the first `size` bytes of the file at `path`, or all of it. In a directory a file without a name is made. With `discard_writes` the
    /// file is only read, and what the guest writes is gone with the VM.
    ///
    /// # Errors
    /// See [`PmemError`].
    pub fn open(path: &Path, size: Option<u64>, discard_writes: bool) -> Result<Self, PmemError> {
        let failed = |source| PmemError::Open { path: path.into(), source };
        let mut options = File::options();
        let mut file = if path.is_dir() {
            let size = size.ok_or_else(|| PmemError::NoSize { path: path.into() })?;
            options.read(true).write(true).custom_flags(libc::O_TMPFILE);
            options.open(path).and_then(|file| file.set_len(size).map(|()| file)).map_err(failed)?
        } else {
            options.read(true).write(!discard_writes).open(path).map_err(failed)?
        };
        // A block device's size is where it ends.
        let has = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let size = size.unwrap_or(has);
        if size == 0 || !size.is_multiple_of(SIZE_ALIGN) {
            return Err(PmemError::Size { path: path.into(), size });
        }
        if size > has {
            return Err(PmemError::TooShort { path: path.into(), has, wanted: size });
        }
        let health = Health { whole: size, writes_through: !discard_writes, damaged: false };
        let flags = if discard_writes { MapFlags::PRIVATE } else { MapFlags::SHARED };
        let refused = |source| PmemError::Map { path: path.into(), source };
        let length = usize::try_from(size).map_err(|e| refused(io::Error::other(e)))?;
        // SAFETY: a fresh mapping, placed where the kernel likes; nothing else is touched.
        let address = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                flags | MapFlags::NORESERVE,
                &file,
                0,
            )
        };
        let address = address.map_err(|e| refused(e.into()))?;
        Ok(Self { path: path.into(), file, size, address, health: Mutex::new(health) })
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where it stands in this process.
    pub fn host_address(&self) -> u64 {
        self.address as u64
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts all that the guest has written on the disk.
    ///
    /// # Errors
    /// The disk's, or the file is not the guest's whole memory any more.
    pub fn flush(&self) -> io::Result<()> {
        let health = *self.health();
        if !health.writes_through && !health.damaged {
            return Ok(());
        }
        self.mend();
        if self.health().damaged {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.file.sync_data()
    }

    /// Looks whether the file has become shorter than what is mapped, and puts empty pages behind its end; whether it had. What the guest had there
    /// is lost.
    pub fn mend(&self) -> bool {
        let mut health = self.health();
        let Ok(has) = (&self.file).seek(SeekFrom::End(0)) else { return false };
        // The page in which the file ends is there.
        let has = has.next_multiple_of(PAGE);
        if has >= health.whole {
            return false;
        }
        let lost = health.whole - has;
        if !self.put_empty(has, health.whole) {
            return false;
        }
        *health = Health { whole: has, damaged: true, ..*health };
        error!(
            "{}: it has become shorter under the guest, whose memory has lost {lost} bytes and reads zeroes there; flushes fail from now on: \
             restore the file and start the VM anew",
            self.path.display()
        );
        true
    }

    /// What is left for the holes of the file; `None` where it has none, or writes do not go there.
    pub fn room(&self) -> Option<Room> {
        let metadata = self.file.metadata().ok()?;
        let blocks = metadata.blocks();
        let has_holes = metadata.is_file() && blocks.saturating_mul(512) < self.size;
        if !has_holes || !self.health().writes_through {
            return None;
        }
        let fs = rustix::fs::fstatvfs(&self.file).ok()?;
        let free = if rustix::process::geteuid().is_root() { fs.f_bfree } else { fs.f_bavail };
        Some(Room { blocks, bytes: free.saturating_mul(fs.f_frsize) })
    }

    /// Whether a write of the guest can have no page, for want of room in the file system.
    pub fn is_out_of_room(&self) -> bool {
        self.room().is_some_and(Room::is_none)
    }

    /// Whether what the guest writes is in a file that can be opened again by its name.
    pub fn keeps_writes(&self) -> bool {
        self.health().writes_through && !self.path.is_dir()
    }

    /// Its name, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file itself.
    pub fn as_file(&self) -> &File {
        &self.file
    }

    /// Puts pages there that need nothing of the file system: what the guest writes stays in memory, or, if that was so before, all of it is empty.
    /// Whether there was anything left to give up.
    pub fn give_up(&self, all: bool) -> bool {
        let mut health = self.health();
        if health.writes_through {
            if health.whole > 0 && !self.put_private(health.whole) {
                return false;
            }
            *health = Health { writes_through: false, damaged: true, ..*health };
            error!(
                "{}: the host has no page for it (is its file system full?); what the guest writes is in memory only, and flushes fail from \
                 now on: see the host's kernel log (dmesg), make room, and start the VM anew",
                self.path.display()
            );
            return true;
        }
        if !all || health.whole == 0 || !self.put_empty(0, health.whole) {
            return false;
        }
        *health = Health { whole: 0, damaged: true, ..*health };
        error!(
            "{}: it cannot be read; the guest has empty memory in its place, and flushes fail from now on: see the host's kernel log (dmesg)",
            self.path.display()
        );
        true
    }

    /// Empty pages from `from` to `to`, in the place of the file's.
    fn put_empty(&self, from: u64, to: u64) -> bool {
        let (Ok(offset), Ok(length)) = (usize::try_from(from), usize::try_from(to - from)) else {
            return false;
        };
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        let at = self.address.wrapping_byte_add(offset);
        // SAFETY: the range is part of this object's own mapping, into which nothing in this process points; KVM follows what is mapped.
        let result =
            unsafe { rustix::mm::mmap_anonymous(at, length, ProtFlags::READ | ProtFlags::WRITE, flags) };
        self.has_put(result.err())
    }

    /// Private pages of the file, up to `to`, in the place of shared ones, and empty ones where it has holes: even to read a hole some file systems
    /// (tmpfs) need room.
    fn put_private(&self, to: u64) -> bool {
        let mut next = 0;
        for _ in 0..PIECES_MAX {
            let data = match seek(&self.file, SeekTo::Data(next)) {
                Ok(data) => data / PAGE * PAGE,
                // No more of them.
                Err(Errno::NXIO) => to,
                Err(_) => next,
            };
            let data = data.clamp(next, to);
            if data > next && !self.put_empty(next, data) {
                return false;
            }
            if data == to {
                return true;
            }
            let hole = seek(&self.file, SeekTo::Hole(data)).unwrap_or(to);
            next = hole.next_multiple_of(PAGE).clamp(data + PAGE, to);
            if !self.put_copy(data, next) {
                return false;
            }
            if next == to {
                return true;
            }
        }
        self.put_copy(next, to)
    }

    fn put_copy(&self, from: u64, to: u64) -> bool {
        let (Ok(offset), Ok(length)) = (usize::try_from(from), usize::try_from(to.saturating_sub(from)))
        else {
            return false;
        };
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let at = self.address.wrapping_byte_add(offset);
        // SAFETY: as in `put_empty`.
        let result = unsafe { rustix::mm::mmap(at, length, access, flags, &self.file, from) };
        self.has_put(result.err())
    }

    fn has_put(&self, error: Option<Errno>) -> bool {
        if let Some(e) = error {
            error!("{}: memory of the guest cannot be replaced: {e}", self.path.display());
        }
        error.is_none()
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        let length = usize::try_from(self.size).unwrap_or(0);
        // SAFETY: the mapping is this object's own; whoever shows it to a guest keeps the object.
        if let Err(e) = unsafe { rustix::mm::munmap(self.address, length) } {
            error!("{}: its mapping cannot be removed: {e}", self.path.display());
        }
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
pub mod tests;
