//! Persistent memory in the guest's address space: where each file is, its memory slot, and what is done when the host has no page for it.
//!
//! No device can do DMA there. Files of most file systems cannot be pinned for an assigned device (Linux refuses it where the file system has to
//! know of each write), and the VMM's own devices would run into a file that has become shorter.

use std::io;
use std::ops::DerefMut;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use arch::layout::{AddressRange, HOTPLUG_ALIGN};
use devices::virtio::pmem::{MappedFile, Placed, Places};
use vm_allocator::{AddressAllocator, AllocPolicy, RangeInclusive};

use crate::memslot::{Memslot, Memslots};

/// The part of a machine's address space that is for persistent memory.
#[derive(Debug)]
pub struct PersistentSpace {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// None where there is no room at all.
    free: Option<Mutex<AddressAllocator>>,
    memslots: Arc<Memslots>,
    files: Mutex<Vec<Weak<MappedFile>>>,
}

/// A file in its place. Fields are dropped in their order: the slot first.
#[derive(Debug)]
struct Place {
    _slot: Memslot,
    _file: Arc<MappedFile>,
    range: RangeInclusive,
    inner: Arc<Inner>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PersistentSpace {
    /// Over `range`, with slots of `memslots`.
    pub fn new(range: AddressRange, memslots: &Arc<Memslots>) -> Arc<Self> {
        let free = AddressAllocator::new(range.start.0, range.len).ok().map(Mutex::new);
        let inner = Inner { free, memslots: Arc::clone(memslots), files: Mutex::default() };
        Arc::new(Self { inner: Arc::new(inner) })
    }

    fn files(&self) -> Vec<Arc<MappedFile>> {
        lock(&self.inner.files).iter().filter_map(Weak::upgrade).collect()
    }

    /// A vCPU has found no memory behind an address, which may be in one of these files. Puts other memory there where it is plain that a file has
    /// none; whether there was such a file, after which the vCPU can go on.
    pub fn mend(&self) -> bool {
        let files = self.files();
        let shorter = files.iter().filter(|file| file.mend()).count();
        let full = files.iter().filter(|file| file.is_out_of_room() && file.give_up(false)).count();
        shorter + full > 0
    }

    /// As [`Self::mend`], when nothing has helped: nothing says which file it is, so it is done with all of them.
    pub fn give_up(&self) -> bool {
        let files = self.files();
        files.iter().filter(|file| file.give_up(false)).count() > 0
            || files.iter().filter(|file| file.give_up(true)).count() > 0
    }
}

impl Places for PersistentSpace {
    fn place(&self, file: &Arc<MappedFile>, at: Option<u64>) -> io::Result<Box<dyn Placed>> {
        let inner = &self.inner;
        let policy = at.map_or(AllocPolicy::FirstMatch, AllocPolicy::ExactMatch);
        let no_room = |why: String| {
            io::Error::other(format!("{why}: there is no room for it in the guest's addresses"))
        };
        let mut free = inner.free.as_ref().map(lock).ok_or_else(|| no_room("all taken by RAM".to_owned()))?;
        // Linux cannot have RAM and other memory in one block.
        let range = free.deref_mut().allocate(file.size(), HOTPLUG_ALIGN, policy);
        drop(free);
        let range = range.map_err(|e| no_room(e.to_string()))?;
        let slot = inner.memslots.add(range.start(), file.host_address(), file.size());
        let slot = slot.map_err(|e| {
            inner.release(&range);
            io::Error::other(e)
        })?;
        let mut files = lock(&inner.files);
        files.retain(|file| file.strong_count() > 0);
        if !files.iter().any(|known| known.as_ptr() == Arc::as_ptr(file)) {
            files.push(Arc::downgrade(file));
        }
        Ok(Box::new(Place { _slot: slot, _file: Arc::clone(file), range, inner: Arc::clone(inner) }))
    }
}

impl Inner {
    fn release(&self, range: &RangeInclusive) {
        if let Some(Err(e)) = self.free.as_ref().map(|free| lock(free).free(range)) {
            log::error!(
                "addresses of persistent memory are not free again: {e}; this is a defect, please report it"
            );
        }
    }
}

impl Placed for Place {
    fn start(&self) -> u64 {
        self.range.start()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.inner.release(&self.range);
    }
}
