//! A raw image: a file or a block device whose bytes are the disk's.
//!
//! Without O_DIRECT every access is one system call over guest memory. With it, memory that does not lie as the host wants it goes through a buffer
//! of aligned pages, and an access to part of a block goes through the page cache by a second descriptor: the kernel keeps the two in step, and
//! neighbouring sectors that are written at once do not lose each other's bytes, as they could if each were read, changed and written back.
//!
//! Unsafe are the calls that take addresses of guest memory, and three that have no safe wrapper (statx for O_DIRECT, two ioctls).
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, fallocate};

use super::Topology;
use super::buffers::Buffers;

/// BLKDISCARD and BLKZEROOUT of linux/fs.h.
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;
/// What goes through a buffer at a time.
const BOUNCE: usize = 256 << 10;
/// Where nobody says what O_DIRECT asks for: what all hardware can do.
const DIRECT_ALIGN: u32 = 4096;

/// What the host's file system asks of accesses past its cache.
#[derive(Clone, Copy, Debug)]
struct Alignment {
    memory: usize,
    offset: u64,
}

/// How an access goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From or to guest memory, by this descriptor.
    Straight(RawFd),
    /// Past the cache, through a buffer.
    Bounce,
}

/// A raw image.
#[derive(Debug)]
pub struct RawImage {
    file: File,
    direct: Option<(File, Alignment)>,
    is_device: bool,
    size: AtomicU64,
    topology: Topology,
}

/// The size of a file or block device.
pub fn file_size(file: &File) -> io::Result<u64> {
    let mut file: &File = file;
    file.seek(SeekFrom::End(0))
}

impl RawImage {
    /// Over `file`, and the same opened with O_DIRECT if the cache is to be left out.
    pub fn new(file: File, direct: Option<File>) -> io::Result<Self> {
        let is_device = file.metadata()?.file_type().is_block_device();
        let mut topology = Topology::default();
        if is_device {
            topology.logical = rustix::fs::ioctl_blksszget(&file)?;
            topology.physical = rustix::fs::ioctl_blkpbszget(&file)?;
        }
        let direct = match direct {
            Some(direct) => {
                let alignment = alignment(&direct, is_device.then_some(topology.logical));
                Some((direct, alignment))
            }
            None => None,
        };
        let size = AtomicU64::new(file_size(&file)?);
        Ok(Self { file, direct, is_device, size, topology })
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// What accesses it likes.
    pub fn topology(&self) -> Topology {
        self.topology
    }

    /// Takes all the room that the image may need.
    ///
    /// # Errors
    /// There is none, or the file system cannot do it.
    pub fn allocate(&self) -> io::Result<()> {
        let size = self.size();
        if self.is_device || size == 0 {
            return Ok(());
        }
        Ok(fallocate(&self.file, FallocateFlags::empty(), 0, size)?)
    }

    /// How an access goes.
    pub fn way(&self, buffers: &Buffers, offset: u64) -> Way {
        match &self.direct {
            None => Way::Straight(self.file.as_raw_fd()),
            Some((_, alignment)) if !(offset | buffers.left()).is_multiple_of(alignment.offset) => {
                Way::Straight(self.file.as_raw_fd())
            }
            Some((file, alignment)) if buffers.are_aligned(alignment.memory) => {
                Way::Straight(file.as_raw_fd())
            }
            Some(_) => Way::Bounce,
        }
    }

    /// The descriptor for a flush.
    pub fn flush_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// See [`super::Image::read`].
    ///
    /// # Errors
    /// Of the host.
    pub fn read(&self, buffers: &mut Buffers, offset: u64) -> io::Result<()> {
        match (self.way(buffers, offset), &self.direct) {
            (Way::Bounce, Some((file, alignment))) => {
                let mut bounce = Bounce::new(alignment.memory);
                let mut at = offset;
                while !buffers.is_empty() {
                    let bytes = bounce.bytes(buffers.left());
                    file.read_exact_at(bytes, at)?;
                    at = at.saturating_add(buffers.put(bytes) as u64);
                }
                Ok(())
            }
            (Way::Straight(fd), _) => transfer(buffers, offset, |pieces, count, at| {
                // SAFETY: the descriptor is open as long as `self` is, and the pieces are guest memory that `buffers` keeps mapped.
                unsafe { libc::preadv(fd, pieces, count, at) }
            }),
            (Way::Bounce, None) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// See [`super::Image::write`].
    ///
    /// # Errors
    /// Of the host.
    pub fn write(&self, buffers: &mut Buffers, offset: u64, through: bool) -> io::Result<()> {
        match (self.way(buffers, offset), &self.direct) {
            (Way::Bounce, Some((file, alignment))) => {
                let mut bounce = Bounce::new(alignment.memory);
                let mut at = offset;
                while !buffers.is_empty() {
                    let bytes = bounce.bytes(buffers.left());
                    let count = buffers.take(bytes);
                    file.write_all_at(bytes.get(..count).unwrap_or_default(), at)?;
                    at = at.saturating_add(count as u64);
                }
                if through { self.flush() } else { Ok(()) }
            }
            (Way::Straight(fd), _) => {
                let flags = if through { libc::RWF_DSYNC } else { 0 };
                transfer(buffers, offset, |pieces, count, at| {
                    // SAFETY: as for reading.
                    unsafe { libc::pwritev2(fd, pieces, count, at, flags) }
                })
            }
            (Way::Bounce, None) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// See [`super::Image::flush`].
    ///
    /// # Errors
    /// Of the host.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// See [`super::Image::discard`].
    ///
    /// # Errors
    /// Of the host.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let result =
            if self.is_device { self.device_range(BLKDISCARD, offset, len) } else { self.punch(offset, len) };
        match result {
            // A host that cannot give room back keeps it: a discard is only a hint.
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
            other => other,
        }
    }

    /// See [`super::Image::write_zeroes`].
    ///
    /// # Errors
    /// Of the host.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let result = if self.is_device {
            self.device_range(BLKZEROOUT, offset, len)
        } else if unmap {
            self.punch(offset, len)
        } else {
            let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
            fallocate(&self.file, flags, offset, len).map_err(Into::into)
        };
        match result {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => self.write_zero_bytes(offset, len),
            other => other,
        }
    }

    /// See [`super::Image::resize`]. A block device cannot be told: its size is read anew.
    ///
    /// # Errors
    /// Of the host; [`io::ErrorKind::InvalidInput`] if a block device has another size.
    pub fn resize(&self, size: u64) -> io::Result<()> {
        if self.is_device {
            let now = file_size(&self.file)?;
            if size > now {
                let text = format!("the block device has {now} bytes; make it larger first");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
        } else {
            self.file.set_len(size)?;
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        Ok(fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)?)
    }

    fn device_range(&self, request: libc::c_ulong, offset: u64, len: u64) -> io::Result<()> {
        let range = [offset, len];
        // SAFETY: both requests read two 64-bit numbers.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), request, range.as_ptr()) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn write_zero_bytes(&self, offset: u64, len: u64) -> io::Result<()> {
        let zeroes = vec![0; BOUNCE];
        let (mut at, end) = (offset, offset.saturating_add(len));
        while at < end {
            let count = usize::try_from(end - at).unwrap_or(BOUNCE).min(BOUNCE);
            self.file.write_all_at(zeroes.get(..count).unwrap_or_default(), at)?;
            at += count as u64;
        }
        Ok(())
    }
}

/// Repeats a system call until all of `buffers` is transferred.
fn transfer(
    buffers: &mut Buffers,
    offset: u64,
    call: impl Fn(*const libc::iovec, i32, i64) -> isize,
) -> io::Result<()> {
    let mut at = offset;
    while !buffers.is_empty() {
        let (pieces, count) = buffers.next();
        let count = i32::try_from(count).map_err(io::Error::other)?;
        let done = call(pieces, count, at.try_into().map_err(io::Error::other)?);
        match usize::try_from(done) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(done) => {
                buffers.advance(done);
                at = at.saturating_add(done as u64);
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// Memory that starts at a multiple of some power of two.
struct Bounce {
    memory: Vec<u8>,
    skip: usize,
}

impl Bounce {
    fn new(align: usize) -> Self {
        let memory = vec![0; BOUNCE.saturating_add(align)];
        let skip = memory.as_ptr().align_offset(align.max(1)).min(align);
        Self { memory, skip }
    }

    fn bytes(&mut self, left: u64) -> &mut [u8] {
        let count = usize::try_from(left).unwrap_or(BOUNCE).min(BOUNCE);
        self.memory.get_mut(self.skip..self.skip.saturating_add(count)).unwrap_or_default()
    }
}

/// What O_DIRECT asks for on `file`: statx knows since Linux 6.1; of a device it is `logical`, its own block.
fn alignment(file: &File, logical: Option<u32>) -> Alignment {
    // SAFETY: all zeroes is a valid `statx`, which consists of integers.
    let mut found: libc::statx = unsafe { mem::zeroed() };
    // SAFETY: the path is an empty string, which AT_EMPTY_PATH makes the descriptor itself; the call fills `found`.
    let result = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut found)
    };
    let default = logical.unwrap_or(DIRECT_ALIGN);
    let power = |align: u32| if align.is_power_of_two() { align } else { default };
    let known = result == 0 && found.stx_mask & libc::STATX_DIOALIGN != 0;
    let (memory, offset) = if known {
        (power(found.stx_dio_mem_align), power(found.stx_dio_offset_align))
    } else {
        (default, default)
    };
    Alignment { memory: usize::try_from(memory).unwrap_or(4096), offset: offset.into() }
}
