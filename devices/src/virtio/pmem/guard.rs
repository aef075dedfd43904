//! Looks after a file that is mapped into a guest: KVM does not say that a page is missing, but tries again for ever while the guest has its
//! interrupts on, so that the guest stands still there.
//!
//! A file that becomes shorter is heard of from the kernel (inotify). A file system that fills is not: it is looked at after each flush, and every
//! second from then on as long as the file takes more of it. A guest that writes nothing causes no look.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::inotify;
use vmm_sys_util::timerfd::TimerFd;

use super::file::{MappedFile, Room};

/// Between two looks.
const STEP: Duration = Duration::from_secs(1);
/// How often one looks after a flush. File systems flush every few seconds while they are written to.
const LOOKS: u32 = 10;

/// What is watched for one file.
#[derive(Debug)]
pub struct Guard {
    file: Arc<MappedFile>,
    changes: OwnedFd,
    timer: TimerFd,
    looks: u32,
    last: Option<Room>,
}

impl Guard {
    /// Over `file`, which is called by its descriptor: it may have no name.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(file: &Arc<MappedFile>) -> io::Result<Self> {
        let changes = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        inotify::add_watch(&changes, path, inotify::WatchFlags::MODIFY)?;
        Ok(Self { file: Arc::clone(file), changes, timer: TimerFd::new()?, looks: 0, last: None })
    }

    /// Readable when somebody has changed the file by other means than the mapping.
    pub fn changes(&self) -> &OwnedFd {
        &self.changes
    }

    /// Readable when it is time for a look.
    pub fn timer(&self) -> &TimerFd {
        &self.timer
    }

    /// The file has been changed.
    pub fn changed(&mut self) {
        let mut events = [0; 1024];
        while rustix::io::read(&self.changes, &mut events).is_ok_and(|len| len > 0) {}
        self.file.mend();
    }

    /// The guest has flushed: it writes.
    pub fn flushed(&mut self) {
        let sleeps = self.looks == 0;
        self.looks = LOOKS;
        if sleeps && self.file.room().is_some() {
            self.arm(true);
        }
    }

    /// Time for a look.
    pub fn look(&mut self) {
        // Tells how often the time has come.
        if self.timer.wait().is_err() {
            return;
        }
        self.file.mend();
        let room = self.file.room();
        if room.is_some_and(Room::is_none) {
            self.file.give_up(false);
        }
        // As long as the file grows, more may come.
        self.looks = if room == self.last { self.looks.saturating_sub(1) } else { LOOKS };
        self.last = room;
        if self.looks == 0 || self.file.room().is_none() {
            self.looks = 0;
            self.arm(false);
        }
    }

    fn arm(&mut self, on: bool) {
        let result = if on { self.timer.reset(STEP, Some(STEP)) } else { self.timer.clear() };
        if let Err(e) = result {
            log::warn!("{}: whether it has room is looked at no more: {e}", self.file.path().display());
        }
    }
}

/// The file, for who needs no more than its descriptor.
impl AsRawFd for MappedFile {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        File::as_raw_fd(self.as_file())
    }
}
