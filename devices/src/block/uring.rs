//! Many accesses to a raw image at a time, by io_uring (io_uring(7)).
//!
//! The ring's own descriptor becomes readable when something has finished, so a worker sleeps on it beside its doorbells; what has finished by the
//! time it looks costs no wake-up.
//!
//! Unsafe is the handing over of addresses: an operation, with the guest memory that it keeps mapped, is kept here until the kernel has given it
//! back. If that cannot be waited for, it is kept for ever.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use log::error;

use super::buffers::Buffers;

/// What is to be done. The descriptors must stay open until it has finished.
#[derive(Debug)]
pub enum Operation {
    /// Fill buffers.
    Read {
        /// From where.
        fd: RawFd,
        /// What to fill.
        buffers: Buffers,
        /// From which byte on.
        offset: u64,
    },
    /// Write buffers.
    Write {
        /// To where.
        fd: RawFd,
        /// What to write.
        buffers: Buffers,
        /// From which byte on.
        offset: u64,
        /// Whether to stable storage.
        through: bool,
    },
    /// Bring what was written to stable storage.
    Flush {
        /// Of what.
        fd: RawFd,
    },
}

impl Operation {
    fn entry(&self) -> squeue::Entry {
        match self {
            Self::Read { fd, buffers, offset } => {
                let (pieces, count) = buffers.next();
                opcode::Readv::new(Fd(*fd), pieces, count).offset(*offset).build()
            }
            Self::Write { fd, buffers, offset, through } => {
                let (pieces, count) = buffers.next();
                let flags = if *through { libc::RWF_DSYNC } else { 0 };
                opcode::Writev::new(Fd(*fd), pieces, count).offset(*offset).rw_flags(flags).build()
            }
            Self::Flush { fd } => opcode::Fsync::new(Fd(*fd)).flags(FsyncFlags::DATASYNC).build(),
        }
    }

    /// Takes over what the kernel said; `None` if there is more to do.
    fn advance(&mut self, result: i32) -> Option<io::Result<()>> {
        let done = match usize::try_from(result) {
            Ok(done) => done,
            Err(_) => {
                let error = io::Error::from_raw_os_error(result.saturating_neg());
                let again = matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR));
                return if again { None } else { Some(Err(error)) };
            }
        };
        match self {
            Self::Read { buffers, offset, .. } | Self::Write { buffers, offset, .. } => {
                if done == 0 && !buffers.is_empty() {
                    return Some(Err(io::ErrorKind::UnexpectedEof.into()));
                }
                buffers.advance(done);
                *offset = offset.saturating_add(done as u64);
                buffers.is_empty().then_some(Ok(()))
            }
            Self::Flush { .. } => Some(Ok(())),
        }
    }
}

/// A ring, with a `T` for each operation that comes back with its result.
pub struct Uring<T> {
    ring: IoUring,
    begun: Vec<Option<(T, Operation)>>,
    free: Vec<usize>,
    /// Not yet told to the kernel.
    waiting: VecDeque<usize>,
    /// How many the kernel has.
    flying: usize,
}

impl<T> fmt::Debug for Uring<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uring").field("flying", &self.flying).finish_non_exhaustive()
    }
}

impl<T> AsRawFd for Uring<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl<T> Uring<T> {
    /// For as many operations at a time as `size`, on the thread that will use it.
    ///
    /// # Errors
    /// The host does not have it, or this process may not use it.
    pub fn new(size: u16) -> io::Result<Self> {
        let entries = u32::from(size.max(1));
        // The first form interrupts this thread less; Linux has it since 5.19.
        let ring = IoUring::builder()
            .setup_coop_taskrun()
            .setup_clamp()
            .build(entries)
            .or_else(|_| IoUring::builder().setup_clamp().build(entries))?;
        let size = usize::from(size.max(1));
        let begun = (0..size).map(|_| None).collect();
        Ok(Self { ring, begun, free: (0..size).collect(), waiting: VecDeque::new(), flying: 0 })
    }

    /// Whether no more can be begun.
    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Whether nothing has been begun that has not finished.
    pub fn is_idle(&self) -> bool {
        self.flying == 0 && self.waiting.is_empty()
    }

    /// Begins an operation, which [`Self::submit`] tells the kernel.
    ///
    /// # Errors
    /// The ring is full.
    pub fn begin(&mut self, token: T, operation: Operation) -> Result<(), T> {
        let Some(place) = self.free.pop() else { return Err(token) };
        match self.begun.get_mut(place) {
            Some(slot) => *slot = Some((token, operation)),
            None => return Err(token),
        }
        self.waiting.push_back(place);
        Ok(())
    }

    /// Tells the kernel what has been begun.
    ///
    /// # Errors
    /// The ring does not work any more.
    pub fn submit(&mut self) -> io::Result<()> {
        self.submit_and_wait(0)
    }

    fn submit_and_wait(&mut self, wait: usize) -> io::Result<()> {
        self.fill();
        if wait == 0 && self.ring.submission().is_empty() {
            return Ok(());
        }
        loop {
            match self.ring.submit_and_wait(wait) {
                Ok(_) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // What has finished must be taken first, or memory is short: what is left is told the next time.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    }

    fn fill(&mut self) {
        while let Some(&place) = self.waiting.front() {
            let Some(Some((_, operation))) = self.begun.get(place) else { break };
            let entry = operation.entry().user_data(place as u64);
            // SAFETY: what the entry points to is kept in `begun` until the kernel has given the operation back: guest memory by `Buffers`, and
            // its list of pieces, which nothing changes meanwhile.
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                break;
            }
            self.waiting.pop_front();
            self.flying += 1;
        }
    }

    /// The next operation that has finished, if there is one. What has finished in part is begun anew; [`Self::submit`] tells the kernel.
    pub fn finished(&mut self) -> Option<(T, io::Result<()>)> {
        loop {
            let entry = self.ring.completion().next()?;
            self.flying = self.flying.saturating_sub(1);
            let place = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
            let Some(slot) = self.begun.get_mut(place) else { continue };
            let Some((_, operation)) = slot else { continue };
            let Some(result) = operation.advance(entry.result()) else {
                self.waiting.push_back(place);
                continue;
            };
            self.free.push(place);
            if let Some((token, _)) = slot.take() {
                return Some((token, result));
            }
        }
    }

    /// Tells the kernel what has been begun, and waits until something has finished, if anything has been begun.
    ///
    /// # Errors
    /// The ring does not work any more.
    pub fn wait(&mut self) -> io::Result<()> {
        if self.is_idle() { Ok(()) } else { self.submit_and_wait(1) }
    }

    /// How many are to be told to the kernel.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether the kernel has not taken all that it was told of, as it may when memory is short.
    pub fn is_held_up(&mut self) -> bool {
        !self.waiting.is_empty() || !self.ring.submission().is_empty()
    }
}

impl<T> Drop for Uring<T> {
    fn drop(&mut self) {
        // What the kernel does not have yet needs not be done.
        self.waiting.clear();
        while self.flying > 0 {
            if let Err(e) = self.submit_and_wait(1) {
                error!("disk operations cannot be waited for, so their memory is kept: {e}");
                mem::forget(mem::take(&mut self.begun));
                return;
            }
            while self.finished().is_some() {}
            self.waiting.clear();
        }
    }
}
