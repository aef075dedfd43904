#![allow(unsafe_code)] // readv(2) and writev(2) straight into and out of guest memory, which nothing safe may hold a reference to.
//! Buffers of the guest as the kernel takes them: packets go between the tap and guest memory without a copy.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::{GuestMemory, Permissions};

use crate::virtio::MemoryView;
use crate::virtio::chain::Buffer;

/// Most vectors of one call (`UIO_MAXIOV`).
const CALL_MAX: usize = 1024;
/// Most vectors of guest memory: one is kept for the byte that tells that a packet was too long.
pub const VECTORS_MAX: usize = CALL_MAX - 1;

/// Pieces of guest memory, and the memory that they point into.
pub struct Vectors {
    view: MemoryView,
    list: Vec<libc::iovec>,
    /// Those before this one are no longer meant.
    start: usize,
    /// Where what is too long begins to go.
    spare: Box<[u8; 1]>,
}

// SAFETY: the pointers lead into the mappings that `view` keeps, which all threads may use, and into `spare`, which is owned.
unsafe impl Send for Vectors {}

impl fmt::Debug for Vectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vectors").field("len", &self.len()).finish_non_exhaustive()
    }
}

/// What came of reading a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// So many bytes.
    Whole(usize),
    /// More than there was room for.
    TooLong,
}

impl Vectors {
    /// None yet, of `view`.
    pub fn new(view: MemoryView) -> Self {
        Self { view, list: Vec::new(), start: 0, spare: Box::new([0]) }
    }

    /// The memory that the vectors lead into.
    pub fn view(&self) -> &MemoryView {
        &self.view
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.list.len() - self.start
    }

    /// Forgets all, and goes on with `view`.
    pub fn restart(&mut self, view: MemoryView) {
        self.clear();
        self.view = view;
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.list.clear();
        self.start = 0;
    }

    /// Adds buffers at the end; how many vectors they took. `None` if they are too many for one call, or not in memory, and nothing was added.
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<usize> {
        let before = self.list.len();
        for buffer in buffers {
            if !self.add_one(buffer) {
                self.list.truncate(before);
                return None;
            }
        }
        Some(self.list.len() - before)
    }

    fn add_one(&mut self, buffer: &Buffer) -> bool {
        let Ok(len) = usize::try_from(buffer.len) else { return false };
        let Ok(slices) = self.view.get_slices(buffer.address, len, Permissions::ReadWrite) else {
            return false;
        };
        for slice in slices {
            let Ok(slice) = slice else { return false };
            if self.list.len() - self.start >= VECTORS_MAX {
                return false;
            }
            let iov_base = slice.ptr_guard_mut().as_ptr().cast();
            self.list.push(libc::iovec { iov_base, iov_len: slice.len() });
        }
        true
    }

    /// Forgets the first `count`.
    pub fn drop_front(&mut self, count: usize) {
        self.start = self.list.len().min(self.start + count);
        // Now and then, so that it costs nothing for each.
        if self.start > 4 * CALL_MAX {
            self.list.drain(..self.start);
            self.start = 0;
        }
    }

    /// Reads one packet into the first `count`.
    ///
    /// # Errors
    /// Of readv(2).
    pub fn read(&mut self, file: &Arc<File>, count: usize) -> io::Result<Read> {
        let count = count.min(self.len());
        let end = self.start + count;
        let room = self.list[self.start..end].iter().fold(0_usize, |sum, v| sum.saturating_add(v.iov_len));
        let spare = libc::iovec { iov_base: self.spare.as_mut_ptr().cast(), iov_len: self.spare.len() };
        // The spare vector stands where the next buffer does, for this call.
        let kept = match self.list.get_mut(end) {
            Some(next) => Some(std::mem::replace(next, spare)),
            None => {
                self.list.push(spare);
                None
            }
        };
        let vectors = &self.list[self.start..=end];
        let number = libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: each vector but the last is a piece of the guest memory that `view` keeps mapped, which the guest and the kernel may change at any
        // time and nothing in this program holds a reference to; the last is `spare`. `vectors` has `number` of them.
        let result = unsafe { libc::readv(file.as_raw_fd(), vectors.as_ptr(), number) };
        let error = io::Error::last_os_error();
        match kept {
            Some(next) => self.list[end] = next,
            None => self.list.truncate(end),
        }
        match usize::try_from(result) {
            Ok(len) if len > room => Ok(Read::TooLong),
            Ok(len) => Ok(Read::Whole(len)),
            Err(_) => Err(error),
        }
    }

    /// Writes all as one packet.
    ///
    /// # Errors
    /// Of writev(2).
    pub fn write(&self, file: &Arc<File>) -> io::Result<usize> {
        let vectors = &self.list[self.start..];
        let number = libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: each vector is a piece of the guest memory that `view` keeps mapped and nothing in this program holds a reference to; the
        // kernel reads from it.
        let result = unsafe { libc::writev(file.as_raw_fd(), vectors.as_ptr(), number) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use std::os::fd::OwnedFd;
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    use super::*;
    use crate::virtio::testing::memory;

    fn buffer(address: u64, len: u32) -> Buffer {
        Buffer { address: GuestAddress(address), len }
    }

    fn files() -> (Arc<File>, UnixDatagram) {
        let (near, far) = UnixDatagram::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        (Arc::new(File::from(OwnedFd::from(near))), far)
    }

    #[test]
    fn a_packet_is_spread_over_the_buffers_that_it_is_read_into() {
        let memory = memory();
        let mut vectors = Vectors::new(memory.memory());
        assert_eq!(vectors.add(&[buffer(0x100, 4), buffer(0x200, 4)]), Some(2));
        assert_eq!(vectors.add(&[buffer(0x300, 4)]), Some(1));
        let (near, far) = files();
        far.send(b"abcdefg").unwrap();
        assert_eq!(vectors.read(&near, 2).unwrap(), Read::Whole(7));
        let mut bytes = [0; 4];
        memory.memory().read_slice(&mut bytes, GuestAddress(0x200)).unwrap();
        assert_eq!(&bytes, b"efg\0");
        far.send(b"123456789").unwrap();
        assert_eq!(vectors.read(&near, 2).unwrap(), Read::TooLong, "the third buffer was not meant");
        memory.memory().read_slice(&mut bytes, GuestAddress(0x300)).unwrap();
        assert_eq!(bytes, [0; 4]);
        vectors.drop_front(2);
        far.send(b"last").unwrap();
        assert_eq!(vectors.read(&near, 9).unwrap(), Read::Whole(4));
        memory.memory().read_slice(&mut bytes, GuestAddress(0x300)).unwrap();
        assert_eq!(&bytes, b"last");
        assert_eq!(vectors.read(&near, 1).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_packet_is_written_from_all_buffers_in_their_order() {
        let memory = memory();
        memory.memory().write_slice(b"helloworld", GuestAddress(0x1000)).unwrap();
        let mut vectors = Vectors::new(memory.memory());
        vectors.add(&[buffer(0x1005, 5), buffer(0x1000, 5)]).unwrap();
        let (near, far) = files();
        assert_eq!(vectors.write(&near).unwrap(), 10);
        let mut bytes = [0; 20];
        assert_eq!(far.recv(&mut bytes).unwrap(), 10);
        assert_eq!(&bytes[..10], b"worldhello");
    }

    #[test]
    fn what_is_not_in_memory_or_too_much_for_one_call_is_not_added() {
        let mut vectors = Vectors::new(memory().memory());
        assert_eq!(vectors.add(&[buffer(0x100, 4), buffer(9 << 20, 4)]), None);
        assert_eq!(vectors.len(), 0);
        assert_eq!(vectors.add(&[buffer(0x100, 1); VECTORS_MAX]), Some(VECTORS_MAX));
        assert_eq!(vectors.add(&[buffer(0x100, 1)]), None);
        for _ in 0..10 {
            vectors.drop_front(VECTORS_MAX);
            assert_eq!(vectors.add(&[buffer(0x100, 1); VECTORS_MAX]), Some(VECTORS_MAX));
        }
        assert!(vectors.list.len() < 8 * CALL_MAX, "what is no longer meant is forgotten");
    }
}
