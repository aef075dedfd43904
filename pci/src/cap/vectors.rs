//! What MSI and MSI-X have in common: changes of their vectors, and the message vectors kept in step with them.

pub mod fake;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use log::warn;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::interrupt::{MsiAllocator, MsiMessage, MsiVector};

/// One vector's new state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VectorChange {
    /// Number of the vector in its capability.
    pub vector: u16,
    /// The message to deliver from now on; `None`: hold interrupts back.
    pub message: Option<MsiMessage>,
}

/// What a guest's write to a capability or table changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Changes {
    /// The capability's enable bit has this value now and had the other.
    pub enabled: Option<bool>,
    /// Vectors that are now delivered, with another message, or no longer.
    pub vectors: Vec<VectorChange>,
}

impl Changes {
    /// Whether the write changed nothing that matters.
    pub fn is_empty(&self) -> bool {
        self.enabled.is_none() && self.vectors.is_empty()
    }
}

/// What became of [`Changes`] once the message vectors followed them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Applied {
    /// As in [`Changes::enabled`]. After `Some(false)` every vector has been given back.
    pub enabled: Option<bool>,
    /// Vectors that exist since now: their eventfds are new and the device must learn of them.
    pub allocated: Vec<u16>,
}

/// The message vectors of one capability, made when the guest first unmasks them.
///
/// Vectors live until the capability is disabled, so that an eventfd handed to a device stays good while the guest masks and unmasks.
pub struct VectorSet {
    allocator: Arc<dyn MsiAllocator>,
    vectors: BTreeMap<u16, Arc<dyn MsiVector>>,
    /// Signalled before there was a vector to hold the signal.
    early: BTreeSet<u16>,
    /// A failure was logged; the guest can repeat its cause at will.
    complained: bool,
}

impl fmt::Debug for VectorSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VectorSet")
            .field("vectors", &self.vectors.keys())
            .field("early", &self.early)
            .finish()
    }
}

impl VectorSet {
    /// No vectors yet.
    pub fn new(allocator: Arc<dyn MsiAllocator>) -> Self {
        Self { allocator, vectors: BTreeMap::new(), early: BTreeSet::new(), complained: false }
    }

    /// Follows the guest's changes. A vector that cannot be had is logged once and stays silent: the guest sees a device without that interrupt.
    pub fn apply(&mut self, changes: &Changes) -> Applied {
        let mut applied = Applied { enabled: changes.enabled, allocated: Vec::new() };
        if changes.enabled == Some(false) {
            self.clear();
            return applied;
        }
        for &VectorChange { vector, message } in &changes.vectors {
            let result = match message {
                Some(message) => self.unmask(vector, message, &mut applied.allocated),
                None => self.vectors.get(&vector).map_or(Ok(()), |v| v.mask()),
            };
            if let Err(error) = result {
                self.complain(vector, &error);
            }
        }
        applied
    }

    /// Makes a vector ahead of its first unmask; it holds signals back until then. A failure is logged once, as in
    /// [`apply`](Self::apply).
    ///
    /// `message`: the guest has it unmasked already, but it could not be had then. Now it delivers at once.
    ///
    /// A device whose eventfds are all set at once need not be interrupted in its work when the guest unmasks them one by one.
    pub fn reserve(&mut self, vector: u16, message: Option<MsiMessage>) {
        if self.vectors.contains_key(&vector) {
            return;
        }
        if let Err(error) = self.make(vector, message) {
            self.complain(vector, &error);
        }
    }

    /// The vectors made so far, in order, with their eventfds.
    pub fn iter(&self) -> impl Iterator<Item = (u16, &EventFd)> {
        self.vectors.iter().map(|(&number, vector)| (number, vector.eventfd()))
    }

    /// The vector of that number, if it was made.
    pub fn get(&self, vector: u16) -> Option<&Arc<dyn MsiVector>> {
        self.vectors.get(&vector)
    }

    /// Signals a vector. While it is masked the signal waits.
    pub fn signal(&mut self, vector: u16) {
        match self.vectors.get(&vector) {
            Some(v) => {
                if let Err(error) = v.eventfd().write(1) {
                    self.complain(vector, &error);
                }
            }
            None => {
                self.early.insert(vector);
            }
        }
    }

    /// Whether a signal waits in a masked vector.
    pub fn is_waiting(&self, vector: u16) -> bool {
        self.early.contains(&vector)
            || self.vectors.get(&vector).is_some_and(|v| is_readable(v.eventfd()).unwrap_or(false))
    }

    /// Gives every vector back and forgets what waited.
    pub fn clear(&mut self) {
        self.vectors.clear();
        self.early.clear();
    }

    fn unmask(&mut self, vector: u16, message: MsiMessage, allocated: &mut Vec<u16>) -> io::Result<()> {
        if let Some(v) = self.vectors.get(&vector) {
            return v.unmask(message);
        }
        self.make(vector, Some(message))?;
        allocated.push(vector);
        Ok(())
    }

    fn make(&mut self, vector: u16, message: Option<MsiMessage>) -> io::Result<()> {
        let v = self.allocator.allocate()?;
        if let Some(message) = message {
            v.unmask(message)?;
        }
        if self.early.remove(&vector) {
            v.eventfd().write(1)?;
        }
        self.vectors.insert(vector, v);
        Ok(())
    }

    fn complain(&mut self, vector: u16, error: &io::Error) {
        if !std::mem::replace(&mut self.complained, true) {
            warn!(
                "interrupt vector {vector} cannot be connected to the guest: {error}; further failures of this function's vectors are not logged"
            );
        }
    }
}

/// Asks without consuming the count, and without blocking whatever the eventfd's flags are.
fn is_readable(eventfd: &EventFd) -> io::Result<bool> {
    let epoll = Epoll::new()?;
    epoll.ctl(ControlOperation::Add, eventfd.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))?;
    Ok(epoll.wait(0, &mut [EpollEvent::default()])? > 0)
}

#[cfg(test)]
mod tests {
    use super::fake::FakeAllocator;
    use super::*;

    const MESSAGE: MsiMessage = MsiMessage { address: 0xfee0_0000, data: 0x41 };

    fn change(vector: u16, message: Option<MsiMessage>) -> Changes {
        Changes { enabled: None, vectors: vec![VectorChange { vector, message }] }
    }

    #[test]
    fn a_vector_is_made_at_its_first_unmask_and_kept_while_masked() {
        let allocator = FakeAllocator::new();
        let mut set = VectorSet::new(allocator.clone());
        assert_eq!(set.apply(&change(3, None)).allocated, []);
        assert_eq!(set.apply(&change(3, Some(MESSAGE))).allocated, [3]);
        assert_eq!(set.apply(&change(3, None)).allocated, []);
        assert_eq!(set.apply(&change(3, Some(MESSAGE))).allocated, []);
        assert_eq!(allocator.allocated(), 1);
        assert_eq!(allocator.vector(0).message(), Some(MESSAGE));
        assert_eq!(set.iter().map(|(number, _)| number).collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn a_signal_before_the_first_unmask_is_delivered_with_it() {
        let allocator = FakeAllocator::new();
        let mut set = VectorSet::new(allocator.clone());
        set.signal(0);
        assert!(set.is_waiting(0));
        let _ = set.apply(&change(0, Some(MESSAGE)));
        assert_eq!(allocator.vector(0).signals(), 1);
        assert!(!set.is_waiting(0));
        set.signal(0);
        assert!(set.is_waiting(0));
        assert_eq!(allocator.vector(0).signals(), 1, "asking did not consume the signal");
    }

    #[test]
    fn a_reserved_vector_keeps_its_eventfd_and_holds_signals_back_until_unmasked() {
        let allocator = FakeAllocator::new();
        let mut set = VectorSet::new(allocator.clone());
        set.signal(2);
        set.reserve(2, None);
        set.reserve(2, None);
        assert_eq!(allocator.allocated(), 1);
        assert_eq!(allocator.vector(0).message(), None);
        assert_eq!(set.apply(&change(2, Some(MESSAGE))).allocated, [], "the device knows it already");
        assert_eq!(allocator.vector(0).signals(), 1);
    }

    #[test]
    fn a_vector_that_could_not_be_had_when_it_was_unmasked_delivers_once_it_is_reserved() {
        let allocator = FakeAllocator::new();
        let mut set = VectorSet::new(allocator.clone());
        allocator.fail(true);
        let _ = set.apply(&change(0, Some(MESSAGE)));
        set.signal(0);
        allocator.fail(false);
        set.reserve(0, Some(MESSAGE));
        assert_eq!(allocator.vector(0).message(), Some(MESSAGE));
        assert_eq!(allocator.vector(0).signals(), 1);
    }

    #[test]
    fn disabling_gives_every_vector_back() {
        let allocator = FakeAllocator::new();
        let mut set = VectorSet::new(allocator.clone());
        let _ = set.apply(&change(0, Some(MESSAGE)));
        set.signal(1);
        let applied = set.apply(&Changes { enabled: Some(false), ..change(0, None) });
        assert_eq!(applied, Applied { enabled: Some(false), allocated: vec![] });
        assert_eq!(set.iter().count(), 0);
        assert!(!set.is_waiting(1));
        assert_eq!(allocator.live(), 0);
    }

    #[test]
    fn a_vector_that_cannot_be_had_is_tried_again_at_the_next_unmask() {
        let allocator = FakeAllocator::new();
        allocator.fail(true);
        let mut set = VectorSet::new(allocator.clone());
        assert_eq!(set.apply(&change(0, Some(MESSAGE))).allocated, []);
        allocator.fail(false);
        assert_eq!(set.apply(&change(0, Some(MESSAGE))).allocated, [0]);
    }
}
