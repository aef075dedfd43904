//! An allocator for tests that remembers what became of its vectors.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::interrupt::{MsiAllocator, MsiMessage, MsiVector};

#[derive(Debug)]
pub(crate) struct FakeVector {
    eventfd: EventFd,
    message: Mutex<Option<MsiMessage>>,
}

impl FakeVector {
    /// The message while unmasked.
    pub(crate) fn message(&self) -> Option<MsiMessage> {
        *self.message.lock().unwrap()
    }

    /// Signals since the last call.
    pub(crate) fn signals(&self) -> u64 {
        self.eventfd.read().unwrap_or(0)
    }
}

impl MsiVector for FakeVector {
    fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    fn unmask(&self, message: MsiMessage) -> io::Result<()> {
        *self.message.lock().unwrap() = Some(message);
        Ok(())
    }

    fn mask(&self) -> io::Result<()> {
        *self.message.lock().unwrap() = None;
        Ok(())
    }
}

#[derive(Debug, Default)]
pub(crate) struct FakeAllocator {
    vectors: Mutex<Vec<Weak<FakeVector>>>,
    failing: AtomicBool,
}

impl FakeAllocator {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn fail(&self, failing: bool) {
        self.failing.store(failing, Ordering::Relaxed);
    }

    pub(crate) fn allocated(&self) -> usize {
        self.vectors.lock().unwrap().len()
    }

    pub(crate) fn live(&self) -> usize {
        self.vectors.lock().unwrap().iter().filter(|v| v.strong_count() > 0).count()
    }

    /// The vector made in that place; it must still live.
    pub(crate) fn vector(&self, index: usize) -> Arc<FakeVector> {
        self.vectors.lock().unwrap()[index].upgrade().unwrap()
    }
}

impl MsiAllocator for FakeAllocator {
    fn allocate(&self) -> io::Result<Arc<dyn MsiVector>> {
        if self.failing.load(Ordering::Relaxed) {
            return Err(io::Error::other("no route left"));
        }
        let vector = Arc::new(FakeVector { eventfd: EventFd::new(EFD_NONBLOCK)?, message: Mutex::new(None) });
        self.vectors.lock().unwrap().push(Arc::downgrade(&vector));
        Ok(vector)
    }
}
