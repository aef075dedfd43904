//! An allocator for tests of this crate and of those above it, which remembers what became of its vectors.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::interrupt::{MsiAllocator, MsiMessage, MsiVector};

/// A vector of a [`FakeAllocator`].
#[derive(Debug)]
pub struct FakeVector {
    eventfd: EventFd,
    message: Mutex<Option<MsiMessage>>,
}

impl FakeVector {
    /// The message while unmasked.
    pub fn message(&self) -> Option<MsiMessage> {
        *lock(&self.message)
    }

    /// Signals since the last call.
    pub fn signals(&self) -> u64 {
        self.eventfd.read().unwrap_or(0)
    }
}

impl MsiVector for FakeVector {
    fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    fn unmask(&self, message: MsiMessage) -> io::Result<()> {
        *lock(&self.message) = Some(message);
        Ok(())
    }

    fn mask(&self) -> io::Result<()> {
        *lock(&self.message) = None;
        Ok(())
    }
}

/// Gives out [`FakeVector`]s, or none while told to fail.
#[derive(Debug, Default)]
pub struct FakeAllocator {
    vectors: Mutex<Vec<Weak<FakeVector>>>,
    failing: AtomicBool,
}

impl FakeAllocator {
    /// One that does not fail.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Whether no vector can be had from now on.
    pub fn fail(&self, failing: bool) {
        self.failing.store(failing, Ordering::Relaxed);
    }

    /// How many vectors were made so far.
    pub fn allocated(&self) -> usize {
        lock(&self.vectors).len()
    }

    /// How many of them there still are.
    pub fn live(&self) -> usize {
        lock(&self.vectors).iter().filter(|v| v.strong_count() > 0).count()
    }

    /// The vectors that there still are, in the order in which they were made.
    pub fn vectors(&self) -> Vec<Arc<FakeVector>> {
        lock(&self.vectors).iter().filter_map(Weak::upgrade).collect()
    }

    /// The vector made in that place; it must still live.
    #[cfg(test)]
    pub(crate) fn vector(&self, index: usize) -> Arc<FakeVector> {
        lock(&self.vectors)[index].upgrade().unwrap()
    }
}

impl MsiAllocator for FakeAllocator {
    fn allocate(&self) -> io::Result<Arc<dyn MsiVector>> {
        if self.failing.load(Ordering::Relaxed) {
            return Err(io::Error::other("no route left"));
        }
        let vector = Arc::new(FakeVector { eventfd: EventFd::new(EFD_NONBLOCK)?, message: Mutex::new(None) });
        lock(&self.vectors).push(Arc::downgrade(&vector));
        Ok(vector)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
