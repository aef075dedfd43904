//! Why a disk image cannot be used, and what to do.

use std::io;
use std::path::PathBuf;

/// Why a disk image cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file.
    #[error("--disk path={}: cannot be opened: {source}; {}", path.display(), advice(source, *readonly))]
    Open {
        /// Where it is.
        path: PathBuf,
        /// Whether it was only to be read.
        readonly: bool,
        /// What the kernel said.
        source: io::Error,
    },
    /// A directory, say.
    #[error("--disk path={}: this is neither a file nor a block device; name a disk image", path.display())]
    NotADisk {
        /// Where it is.
        path: PathBuf,
    },
    /// Somebody else has it.
    #[error(
        "--disk path={}: it is in use by {holder}, and cannot be locked for {purpose}; end that first, or use a copy; several can only have it with \
         readonly=on in all of them",
        path.display()
    )]
    Locked {
        /// Where it is.
        path: PathBuf,
        /// Who has it, as far as that can be told.
        holder: String,
        /// What it was to be locked for.
        purpose: &'static str,
    },
    /// It cannot be locked at all.
    #[error("--disk path={}: cannot be locked: {source}; a file system that knows no locks cannot hold disks", path.display())]
    Lock {
        /// Where it is.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A format that Dormouse does not read.
    #[error(
        "--disk path={}: images of type {name} are not in Dormouse yet; convert it with `qemu-img convert -O qcow2`, or say image_type=raw if its \
         bytes are the disk's",
        path.display()
    )]
    Format {
        /// Where it is.
        path: PathBuf,
        /// The format's name.
        name: &'static str,
    },
    /// An image on top of another.
    #[error(
        "--disk path={}: the image is based on {backing}, and images that name other files are not opened unless you say so; add backing_files=on if \
         you trust this image, or merge the two with `qemu-img convert`",
        path.display()
    )]
    Backing {
        /// Where it is.
        path: PathBuf,
        /// The image that it is based on.
        backing: String,
    },
    /// An image whose data are elsewhere.
    #[error(
        "--disk path={}: the image keeps its data in another file, which Dormouse does not open; bring them together with `qemu-img convert -O qcow2`",
        path.display()
    )]
    DataFile {
        /// Where it is.
        path: PathBuf,
    },
    /// A qcow2 image that is broken, or none.
    #[error("--disk path={}: not usable as qcow2: {source}; `qemu-img check` says what is wrong with an image", path.display())]
    Qcow2 {
        /// Where it is.
        path: PathBuf,
        /// What is wrong.
        source: io::Error,
    },
}

fn advice(error: &io::Error, readonly: bool) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT) => "check the path, or make an image with `truncate -s SIZE` or `qemu-img create`",
        Some(libc::EACCES | libc::EPERM) if readonly => "give this user the right to read it",
        Some(libc::EACCES | libc::EPERM) => {
            "give this user the right to read and write it, or add readonly=on"
        }
        Some(libc::EROFS) => "its file system is read-only: add readonly=on",
        Some(libc::EINVAL) => "its file system may not have O_DIRECT: leave out direct=on",
        Some(libc::EISDIR) => "name a disk image, not a directory",
        _ => "check the path and the file system that it is on",
    }
}
