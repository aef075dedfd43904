//! Where a [`Backend`](super::Backend) puts its descriptors to hear of them: the main thread's event loop, or the thread of a virtio device.

use std::os::fd::RawFd;

use event_manager::{EventOps, EventSet, Events};

use crate::virtio::worker::Watch;

/// A list of watched descriptors.
pub(crate) trait WatchList {
    /// Watches a descriptor; events have `token`.
    fn watch(&mut self, fd: RawFd, token: u32, set: EventSet);

    /// Watches it no longer.
    fn unwatch(&mut self, fd: RawFd);
}

impl WatchList for EventOps<'_> {
    fn watch(&mut self, fd: RawFd, token: u32, set: EventSet) {
        if let Err(error) = self.add(Events::with_data_raw(fd, token, set)) {
            // Regular files and some devices cannot be watched, and need not be: they are always ready.
            log::debug!("serial port: descriptor {fd} is not watched: {error}");
        }
    }

    fn unwatch(&mut self, fd: RawFd) {
        if let Err(error) = self.remove(Events::empty_raw(fd)) {
            log::debug!("serial port: descriptor {fd} was not watched: {error}");
        }
    }
}

impl WatchList for &Watch {
    fn watch(&mut self, fd: RawFd, token: u32, set: EventSet) {
        if let Err(error) = self.add(&fd, set, token) {
            log::debug!("console: descriptor {fd} is not watched: {error}");
        }
    }

    fn unwatch(&mut self, fd: RawFd) {
        if let Err(error) = self.remove(&fd) {
            log::debug!("console: descriptor {fd} was not watched: {error}");
        }
    }
}
