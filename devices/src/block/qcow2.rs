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
use imago::{
    DenyImplicitOpenGate, FormatAccess, PermissiveImplicitOpenGate, ShallowMapping, StorageOpenOptions,
};
use rustix::fs::{FallocateFlags, fallocate};

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
    /// The image's file, which has the lock. What imago does not do is done here.
    file: File,
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
        let accessed = match direct {
            Some(direct) => direct,
            None => file.try_clone().map_err(broken)?,
        };
        let storage = ImageFile::from_open_file(accessed, options).map_err(broken)?;
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
        Ok(Self { image: RwLock::new(image), size, file })
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

    /// See [`super::Image::discard`]. Clusters that are free afterwards are taken out of the file, too, which imago leaves to its user.
    ///
    /// # Errors
    /// Of the host, and if the image is broken.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut image = self.alone();
        let before = own_data(&image, offset, len)?;
        match image.discard_to_any(offset, len) {
            // Those of version 2 cannot. A discard is only a hint.
            Err(e) if e.kind() == io::ErrorKind::Unsupported => return Ok(()),
            other => other?,
        }
        self.punch(&image, &before)
    }

    /// See [`super::Image::write_zeroes`].
    ///
    /// # Errors
    /// Of the host, and if the image is broken.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let result = if unmap {
            let mut image = self.alone();
            let before = own_data(&image, offset, len)?;
            image.discard_to_zero(offset, len).and_then(|()| {
                // The image must say so before the bytes are gone.
                sync(&image)?;
                self.punch(&image, &before)
            })
        } else {
            self.shared().write_zeroes(offset, len)
        };
        match result {
            Err(e) if e.kind() == io::ErrorKind::Unsupported => write_zero_bytes(&self.shared(), offset, len),
            other => other,
        }
    }

    /// Gives back the room of those of the ranges that the image does not use any more. Nobody else changes it meanwhile.
    fn punch(&self, image: &FormatAccess<ImageFile>, before: &[Data]) -> io::Result<()> {
        for data in before {
            let mut done = 0;
            while done < data.len {
                let host = data.host.saturating_add(done);
                let (now, len) =
                    image.get_shallow_mapping(data.guest.saturating_add(done), data.len - done)?;
                if len == 0 {
                    break;
                }
                let is_used = matches!(now, ShallowMapping::Raw { offset, .. } if offset == host);
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                if !is_used && let Err(e) = fallocate(&self.file, flags, host, len) {
                    // A host that cannot give room back keeps it; the clusters are used again anyway.
                    return if e == rustix::io::Errno::OPNOTSUPP { Ok(()) } else { Err(e.into()) };
                }
                done = done.saturating_add(len);
            }
        }
        Ok(())
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

/// Where data of the image are that nothing else of it uses.
#[derive(Debug)]
struct Data {
    guest: u64,
    host: u64,
    len: u64,
}

/// Those of a range. What is shared with a snapshot of the image cannot be written where it is, and is not among them.
fn own_data(image: &FormatAccess<ImageFile>, offset: u64, len: u64) -> io::Result<Vec<Data>> {
    let (mut all, mut at, end): (Vec<Data>, _, _) = (Vec::new(), offset, offset.saturating_add(len));
    while at < end {
        let (mapping, len) = image.get_shallow_mapping(at, end - at)?;
        if len == 0 {
            break;
        }
        if let ShallowMapping::Raw { offset: host, writable: true, .. } = mapping {
            all.push(Data { guest: at, host, len });
        }
        at = at.saturating_add(len);
    }
    Ok(all)
}

fn write_zero_bytes(image: &FormatAccess<ImageFile>, offset: u64, len: u64) -> io::Result<()> {
    let zeroes = vec![0; chunk(len)];
    let (mut at, end) = (offset, offset.saturating_add(len));
    while at < end {
        let bytes = zeroes.get(..chunk(end - at)).unwrap_or_default();
        image.writev(IoVector::from(bytes), at)?;
        at = at.saturating_add(bytes.len() as u64);
    }
    Ok(())
}

/// What is buffered goes to the file, and what is in the file to stable storage.
fn sync(image: &FormatAccess<ImageFile>) -> io::Result<()> {
    image.flush()?;
    image.sync()
}

fn chunk(left: u64) -> usize {
    usize::try_from(left).unwrap_or(BOUNCE).min(BOUNCE)
}
