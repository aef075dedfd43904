//! Disk images on the host: raw files, block devices and qcow2, opened, locked, read and written for a guest.
//!
//! [`Disk::open`] finds out what an image is, locks it, and gives an [`Image`], which does one access after the other. For raw images [`uring`] does
//! many at a time. Nothing here knows virtio; [`crate::virtio::block`] is the device in front of it.

pub mod buffers;
pub mod counters;
pub mod detect;
pub mod error;
pub mod lock;
pub mod qcow2;
pub mod raw;
pub mod uring;

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use log::warn;

pub use self::buffers::Buffers;
pub use self::detect::ImageType;
pub use self::error::DiskError;
pub use self::lock::Granularity;
use self::qcow2::Qcow2Image;
use self::raw::RawImage;

/// Bytes of a sector, the unit of a virtio disk.
pub const SECTOR: u64 = 512;

/// How an image is to be opened.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// Where it is.
    pub path: PathBuf,
    /// Whether it is only read.
    pub readonly: bool,
    /// Whether the host's page cache is left out.
    pub direct: bool,
    /// What it is; [`ImageType::Unknown`]: what it looks like.
    pub image_type: ImageType,
    /// Whether an image may name another one that it is based on.
    pub backing_files: bool,
    /// Whether room that the guest does not need is given back to the host, and not taken before it is needed.
    pub sparse: bool,
    /// What of the file is locked.
    pub granularity: Granularity,
}

impl DiskSpec {
    /// With Cloud Hypervisor's defaults.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            readonly: false,
            direct: false,
            image_type: ImageType::Unknown,
            backing_files: false,
            sparse: true,
            granularity: Granularity::ByteRange,
        }
    }
}

/// What accesses an image likes, as its device is described to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Bytes of the smallest access.
    pub logical: u32,
    /// Bytes that are written at once below.
    pub physical: u32,
    /// Bytes of a good access; 0: not known.
    pub optimal: u32,
}

impl Default for Topology {
    fn default() -> Self {
        Self { logical: 512, physical: 4096, optimal: 0 }
    }
}

/// An image that is open. All calls can come from several threads at once.
#[derive(Debug)]
pub enum Image {
    /// Bytes as they are.
    Raw(RawImage),
    /// QEMU's format.
    Qcow2(Qcow2Image),
}

/// Calls the same method of either form.
macro_rules! either {
    ($image:expr, $inner:ident => $call:expr) => {
        match $image {
            Image::Raw($inner) => $call,
            Image::Qcow2($inner) => $call,
        }
    };
}

impl Image {
    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        either!(self, image => image.size())
    }

    /// What accesses it likes.
    pub fn topology(&self) -> Topology {
        either!(self, image => image.topology())
    }

    /// Fills `buffers` from `offset` on.
    ///
    /// # Errors
    /// Of the host; [`io::ErrorKind::UnexpectedEof`] behind the end of the file.
    pub fn read(&self, buffers: &mut Buffers, offset: u64) -> io::Result<()> {
        either!(self, image => image.read(buffers, offset))
    }

    /// Writes `buffers` from `offset` on; with `through`, to stable storage.
    ///
    /// # Errors
    /// Of the host.
    pub fn write(&self, buffers: &mut Buffers, offset: u64, through: bool) -> io::Result<()> {
        either!(self, image => image.write(buffers, offset, through))
    }

    /// Returns when all that was written before is on stable storage.
    ///
    /// # Errors
    /// Of the host.
    pub fn flush(&self) -> io::Result<()> {
        either!(self, image => image.flush())
    }

    /// Gives room back to the host. What is read there later can be anything.
    ///
    /// # Errors
    /// Of the host.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        either!(self, image => image.discard(offset, len))
    }

    /// Makes a range read as zeroes, and gives its room back if `unmap`.
    ///
    /// # Errors
    /// Of the host.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        either!(self, image => image.write_zeroes(offset, len, unmap))
    }

    /// Makes it larger or smaller.
    ///
    /// # Errors
    /// Of the host.
    pub fn resize(&self, size: u64) -> io::Result<()> {
        either!(self, image => image.resize(size))
    }
}

/// An open image with what was found out about it.
#[derive(Debug)]
pub struct Disk {
    /// The image.
    pub image: Image,
    /// Where it is.
    pub path: PathBuf,
    /// Whether it is only read.
    pub readonly: bool,
    /// Whether room is given back to the host.
    pub sparse: bool,
    /// Its first sector is not written. Nobody has said what the image is and it looks raw: a guest that writes another format's header there would
    /// have it taken for that format the next time, and so could have files of the host opened.
    pub protected: bool,
    /// A serial number that stays the same as long as the file does.
    pub serial: String,
}

impl Disk {
    /// Opens and locks the image.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn open(spec: &DiskSpec) -> Result<Self, DiskError> {
        let path = spec.path.as_path();
        let open_failed = |source| DiskError::Open { path: path.into(), readonly: spec.readonly, source };
        let file = open_file(path, spec.readonly, spec.direct).map_err(open_failed)?;
        let metadata = file.metadata().map_err(open_failed)?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::NotADisk { path: path.into() });
        }
        // The image is looked at without O_DIRECT, which would ask for aligned buffers.
        let (plain, direct) = if spec.direct {
            (open_file(path, spec.readonly, false).map_err(open_failed)?, Some(file))
        } else {
            (file, None)
        };
        let size = raw::file_size(&plain).map_err(open_failed)?;
        lock::lock(&plain, path, spec.readonly, spec.granularity, size)?;
        let looks = detect::detect(&plain, size).map_err(open_failed)?;
        let image_type = match spec.image_type {
            ImageType::Unknown => looks,
            given => given,
        };
        let serial = format!("{}{}{}", metadata.dev(), metadata.rdev(), metadata.ino());
        let image = match image_type {
            ImageType::Raw => {
                let image = RawImage::new(plain, direct).map_err(open_failed)?;
                if !spec.sparse
                    && !spec.readonly
                    && let Err(e) = image.allocate()
                {
                    warn!(
                        "disk {}: sparse=off, but its room cannot be taken in advance: {e}",
                        path.display()
                    );
                }
                Image::Raw(image)
            }
            ImageType::Qcow2 => Image::Qcow2(Qcow2Image::open(plain, direct, spec)?),
            other => return Err(DiskError::Format { path: path.into(), name: other.name() }),
        };
        let protected =
            spec.image_type == ImageType::Unknown && image_type == ImageType::Raw && !spec.readonly;
        if protected {
            warn!(
                "disk {}: it looks raw, but nobody has said so: its first sector will not be written; add image_type=raw",
                path.display()
            );
        }
        if !image.size().is_multiple_of(SECTOR) {
            warn!(
                "disk {}: its last {} bytes make no sector and are not used",
                path.display(),
                image.size() % SECTOR
            );
        }
        Ok(Self { image, path: path.into(), readonly: spec.readonly, sparse: spec.sparse, protected, serial })
    }
}

/// Opens the file at `path` for an image.
fn open_file(path: &Path, readonly: bool, direct: bool) -> io::Result<File> {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    File::options().read(true).write(!readonly).custom_flags(flags).open(path)
}

#[cfg(test)]
mod tests;
