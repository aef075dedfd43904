//! Pieces of guest memory as the host's kernel takes them for one access: `iovec`s, with what keeps them mapped.
//!
//! The kernel reads and writes guest memory itself, so addresses are taken out of `vm_memory`'s hands here; all unsafe code of the module is about
//! that. Nothing in the VMM makes a reference to such memory, which the guest may change at any time.
#![allow(unsafe_code)]

use std::fmt;
use std::ptr;

use vm_memory::{GuestMemory, Permissions};

use crate::virtio::MemoryView;
use crate::virtio::chain::Buffer;

/// The most pieces that one system call takes (IOV_MAX).
pub const PIECES_MAX: usize = 1024;

/// A piece of memory as `readv` and its like take it.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct Piece(libc::iovec);

// SAFETY: the pointer is only an address here. What it points to is guest memory, which is nobody's and stays mapped while `Buffers` holds it.
unsafe impl Send for Piece {}
// SAFETY: as above.
unsafe impl Sync for Piece {}

/// What is left to be transferred of one access.
pub struct Buffers {
    /// Keeps all pieces mapped.
    view: MemoryView,
    pieces: Vec<Piece>,
    /// Pieces that are done.
    first: usize,
    left: u64,
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffers").field("pieces", &self.pieces().len()).field("left", &self.left).finish()
    }
}

impl Buffers {
    /// These buffers; `None` if one is not in memory.
    pub fn new(
        view: &MemoryView,
        buffers: impl IntoIterator<Item = Buffer>,
        access: Permissions,
    ) -> Option<Self> {
        let (mut pieces, mut left) = (Vec::new(), 0_u64);
        for buffer in buffers {
            let count = usize::try_from(buffer.len).ok()?;
            // A buffer may lie in two regions, one right behind the other.
            for slice in view.get_slices(buffer.address, count, access).ok()? {
                let slice = slice.ok()?;
                let base = slice.ptr_guard_mut().as_ptr().cast();
                pieces.push(Piece(libc::iovec { iov_base: base, iov_len: slice.len() }));
            }
            left = left.checked_add(buffer.len.into())?;
        }
        Some(Self { view: view.clone(), pieces, first: 0, left })
    }

    /// Bytes that are left.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.left == 0
    }

    /// Guest memory.
    pub fn view(&self) -> &MemoryView {
        &self.view
    }

    fn pieces(&self) -> &[Piece] {
        self.pieces.get(self.first..).unwrap_or_default()
    }

    /// The pieces for the next system call, for use while this lives, and their number.
    pub fn next(&self) -> (*const libc::iovec, u32) {
        let pieces = self.pieces();
        let count = pieces.len().min(PIECES_MAX);
        (pieces.as_ptr().cast(), u32::try_from(count).unwrap_or(0))
    }

    /// Whether all pieces start and end at multiples of `align`, a power of two.
    pub fn are_aligned(&self, align: usize) -> bool {
        let mask = align.saturating_sub(1);
        self.pieces().iter().all(|piece| (piece.0.iov_base.addr() | piece.0.iov_len) & mask == 0)
    }

    /// Notes that `count` bytes have been transferred.
    pub fn advance(&mut self, count: usize) {
        let mut count = count;
        while count > 0 {
            let Some(Piece(piece)) = self.pieces.get_mut(self.first) else { return };
            let step = count.min(piece.iov_len);
            piece.iov_base = piece.iov_base.wrapping_byte_add(step);
            piece.iov_len -= step;
            self.left = self.left.saturating_sub(step as u64);
            count -= step;
            if piece.iov_len == 0 {
                self.first += 1;
            }
        }
    }

    /// Copies from guest memory, and counts it as transferred; how many bytes.
    pub fn take(&mut self, bytes: &mut [u8]) -> usize {
        self.copy(bytes.len(), |at, piece, step| {
            let target = bytes.get_mut(at..).unwrap_or_default();
            // SAFETY: `copy` passes pieces of mapped guest memory and no more bytes than there are on either side, which are different memory.
            unsafe { ptr::copy_nonoverlapping(piece.cast_const(), target.as_mut_ptr(), step) };
        })
    }

    /// Copies to guest memory, and counts it as transferred; how many bytes.
    pub fn put(&mut self, bytes: &[u8]) -> usize {
        self.copy(bytes.len(), |at, piece, step| {
            let source = bytes.get(at..).unwrap_or_default();
            // SAFETY: as above.
            unsafe { ptr::copy_nonoverlapping(source.as_ptr(), piece, step) };
        })
    }

    fn copy(&mut self, len: usize, mut each: impl FnMut(usize, *mut u8, usize)) -> usize {
        let mut done = 0;
        while done < len {
            let Some(&Piece(piece)) = self.pieces.get(self.first) else { break };
            let step = piece.iov_len.min(len - done);
            each(done, piece.iov_base.cast(), step);
            self.advance(step);
            done += step;
        }
        done
    }
}
