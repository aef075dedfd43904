//! A descriptor that a serial port reads from or writes to without ever blocking the thread that does it.
//!
//! `O_NONBLOCK` belongs to the open file description (open(2)), which standard input and output share with the shell that
//! started us and with whatever runs after us. So it is never set on those: a terminal or pipe is opened anew through
//! `/proc/self/fd`, and where that is refused, every transfer asks poll(2) first.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// Most bytes given to a descriptor that can block: what poll(2) promises room for in a pipe, and in a terminal in practice.
const ASKED_CHUNK: usize = 256;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Input,
    Output,
}

/// A descriptor that answers [`io::ErrorKind::WouldBlock`] rather than wait.
#[derive(Debug)]
pub(super) struct Stream {
    file: File,
    /// The description is shared and can block: ask poll(2) before each transfer.
    ask: bool,
}

impl Stream {
    /// Takes a descriptor whose description is ours alone, and makes it non-blocking.
    pub(super) fn owned(fd: OwnedFd) -> io::Result<Self> {
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self { file: File::from(fd), ask: false })
    }

    /// A stream over a descriptor that others use too, such as standard input.
    pub(super) fn shared(fd: BorrowedFd<'_>, direction: Direction) -> io::Result<Self> {
        let file = File::from(fd.try_clone_to_owned()?);
        let kind = file.metadata()?.file_type();
        if kind.is_file() {
            return Ok(Self { file, ask: false });
        }
        // Sockets cannot be opened again, and opening a device node again may do more than open it.
        if kind.is_fifo() || rustix::termios::isatty(&file) {
            let again = OpenOptions::new()
                .read(direction == Direction::Input)
                .write(direction == Direction::Output)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(format!("/proc/self/fd/{}", fd.as_raw_fd()));
            if let Ok(file) = again {
                return Ok(Self { file, ask: false });
            }
        }
        Ok(Self { file, ask: true })
    }

    /// A second descriptor for the same stream.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, ask: self.ask })
    }

    /// Reads what is there; 0 at the end of the input.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.ask && !self.ready(Direction::Input, Duration::ZERO) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            match (&self.file).read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    /// Writes what there is room for.
    pub(super) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let mut chunk = bytes;
            if self.ask {
                if !self.ready(Direction::Output, Duration::ZERO) {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                chunk = &bytes[..bytes.len().min(ASKED_CHUNK)];
            }
            match (&self.file).write(chunk) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    /// Waits at most `timeout` until a transfer would not block (or would fail, which is no waiting either).
    pub(super) fn ready(&self, direction: Direction, timeout: Duration) -> bool {
        let flags = match direction {
            Direction::Input => PollFlags::IN,
            Direction::Output => PollFlags::OUT,
        };
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        let mut fds = [PollFd::new(&self.file, flags)];
        matches!(poll(&mut fds, Some(&timeout)), Ok(count) if count > 0)
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}
