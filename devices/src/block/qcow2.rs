//! A qcow2 image, by the crate imago: one access at a time for each thread that calls.

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::file::File as ImageFile;
use imago::format::PreallocateMode;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, PermissiveImplicitOpenGate, StorageOpenOptions};

use super::buffers::Buffers;
use super::error::DiskError;
use super::{DiskSpec, Topology};

/// What goes through a buffer at a time.
const BOUNCE: usize = 256 << 10;

/// A qcow2 image.
pub struct Qcow2Image {
    /// Taken for writing by what moves clusters about, so that no access uses where they were.
    image: RwLock<FormatAccess<ImageFile>>,
    size: AtomicU64,
    /// Has the lock, if the image itself is read and written through another descriptor.
    _lock: Option<File>,
}

impl fmt::Debug for Qcow2Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qcow2Image").field("size", &self.size()).finish_non_exhaustive()
    }
}

impl Qcow2Image {
    /// Opens the image in `file`, or in `direct`, which is the same past the cache.
    pub(super) fn open(file: File, direct: Option<File>, spec: &DiskSpec) -> Result<Self, DiskError> {
        let path = spec.path.as_path();
        let broken = |source| DiskError::Qcow2 { path: path.into(), source };
        let options = StorageOpenOptions::new().filename(path).write(!spec.readonly).direct(direct.is_some());
        let (file, lock) = match direct {
            Some(direct) => (direct, Some(file)),
            None => (file, None),
        };
        let storage = ImageFile::from_open_file(file, options).map_err(broken)?;
        let mut image: Qcow2<ImageFile> = Qcow2::open_image(storage, !spec.readonly).map_err(broken)?;
        if image.requires_external_data_file() {
            return Err(DiskError::DataFile { path: path.into() });
        }
        match image.implicit_backing_file() {
            Some(backing) if !spec.backing_files => {
                return Err(DiskError::Backing { path: path.into(), backing: backing.clone() });
            }
            Some(_) => image
                .open_implicit_dependencies_gated(PermissiveImplicitOpenGate::default())
                .map_err(broken)?,
            // Nothing is to be opened; if that is not so, nothing is.
            None => {
                image.open_implicit_dependencies_gated(DenyImplicitOpenGate::default()).map_err(broken)?
            }
        }
        let image = FormatAccess::new(image);
        let size = AtomicU64::new(image.size());
        Ok(Self { image: RwLock::new(image), size, _lock: lock })
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// What accesses it likes.
    pub fn topology(&self) -> Topology {
        Topology { optimal: 64 << 10, ..Topology::default() }
    }

    /// See [`super::Image::read`].
    ///
    /// # Errors
    /// Of the host, and if the image is broken.
    pub fn read(&self, buffers: &mut Buffers, offset: u64) -> io::Result<()> {
        let image = self.shared();
        let mut bytes = vec![0; chunk(buffers.left())];
        let mut at = offset;
        while !buffers.is_empty() {
            let bytes = bytes.get_mut(..chunk(buffers.left())).unwrap_or_default();
            image.readv(IoVectorMut::from(&mut *bytes), at)?;
            at = at.saturating_add(buffers.put(bytes) as u64);
        }
        Ok(())
    }

    /// See [`super::Image::write`].
    ///
    /// # Errors
    /// Of the host, and if the image is broken.
    pub fn write(&self, buffers: &mut Buffers, offset: u64, through: bool) -> io::Result<()> {
        let image = self.shared();
        let mut bytes = vec![0; chunk(buffers.left())];
        let mut at = offset;
        while !buffers.is_empty() {
            let bytes = bytes.get_mut(..chunk(buffers.left())).unwrap_or_default();
            let count = buffers.take(bytes);
            image.writev(IoVector::from(&*bytes), at)?;
            at = at.saturating_add(count as u64);
        }
        if through { sync(&image) } else { Ok(()) }
    }

    /// See [`super::Image::flush`].
    ///
    /// # Errors
    /// Of the host.
    pub fn flush(&self) -> io::Result<()> {
        sync(&self.shared())
    }

    /// See [`super::Image::discard`].
    ///
    /// # Errors
    /// Of the host, and if the image is broken.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.alone().discard_to_any(offset, len) {
            Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(()),
            other => other,
        }
    }

    /// See [`super::Image::write_zeroes`].
    ///
    /// # Errors
    /// Of the host, and if the image is broken.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap {
            self.alone().discard_to_zero(offset, len)
        } else {
            self.shared().write_zeroes(offset, len)
        }
    }

    /// See [`super::Image::resize`].
    ///
    /// # Errors
    /// Of the host, and if the image cannot be resized.
    pub fn resize(&self, size: u64) -> io::Result<()> {
        let mut image = self.alone();
        image.resize(size, PreallocateMode::None)?;
        sync(&image)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn shared(&self) -> RwLockReadGuard<'_, FormatAccess<ImageFile>> {
        self.image.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, FormatAccess<ImageFile>> {
        self.image.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is buffered goes to the file, and what is in the file to stable storage.
fn sync(image: &FormatAccess<ImageFile>) -> io::Result<()> {
    image.flush()?;
    image.sync()
}

fn chunk(left: u64) -> usize {
    usize::try_from(left).unwrap_or(BOUNCE).min(BOUNCE)
}
