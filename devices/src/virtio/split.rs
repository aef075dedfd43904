//! The split virtqueue (VIRTIO 1.2, section 2.7), over the library's queue: the indices and notifications are the library's, chains are
//! followed by [`Builder`](super::chain), which says what is wrong with them.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};

use super::chain::{Builder, Chain, DESCRIPTOR_LEN};
use super::ring::{
    InFlight, QueueLayout, RingError, RingFeatures, RingPosition, check_area, load_u16, store_u16,
};

/// Flags, index, and the event index at the end.
const RING_OVERHEAD: u64 = 6;
const AVAIL_ENTRY: u64 = 2;
const USED_ENTRY: u64 = 8;
/// Offset of the first entry.
const RING_HEADER: u64 = 4;
/// VIRTQ_AVAIL_F_NO_INTERRUPT.
const NO_INTERRUPT: u16 = 1;

/// A split ring being served.
#[derive(Debug)]
pub struct SplitRing {
    queue: Queue,
    indirect: bool,
    in_flight: InFlight,
    /// Heads that the driver has made available and that were not taken yet, as they were when its index was last read.
    heads: VecDeque<u16>,
    /// How often heads were found there.
    batch: u64,
    /// For each head, in which batch it was last. All of a batch are available at the same time, so none can be in it twice.
    last_in: Vec<u64>,
    /// Chains given back since the driver was last considered for an interrupt.
    given_back: u16,
}

impl SplitRing {
    /// The ring at `layout`, from `position` on.
    ///
    /// # Errors
    /// It cannot be there.
    pub fn new(
        layout: &QueueLayout,
        features: RingFeatures,
        position: RingPosition,
        memory: &GuestMemoryMmap,
    ) -> Result<Self, RingError> {
        let &QueueLayout { size, descriptors, driver, device } = layout;
        let wrong_size = RingError::Size(size);
        let entries = u64::from(size);
        let mut queue = Queue::new(size).map_err(|_| wrong_size)?;
        queue.try_set_size(size).map_err(|_| wrong_size)?;
        let table = entries * DESCRIPTOR_LEN;
        check_area(memory, "descriptor table", descriptors, table, 16, Permissions::Read)?;
        let available = entries * AVAIL_ENTRY + RING_OVERHEAD;
        check_area(memory, "available ring", driver, available, 2, Permissions::Read)?;
        check_area(memory, "used ring", device, entries * USED_ENTRY + RING_OVERHEAD, 4, Permissions::Write)?;
        let low = |address: u64| u32::try_from(address & u64::from(u32::MAX)).ok();
        let high = |address: u64| u32::try_from(address >> 32).ok();
        queue.set_desc_table_address(low(descriptors), high(descriptors));
        queue.set_avail_ring_address(low(driver), high(driver));
        queue.set_used_ring_address(low(device), high(device));
        queue.set_event_idx(features.event_idx);
        queue.set_next_avail(position.avail);
        queue.set_next_used(position.used);
        queue.set_ready(true);
        Ok(Self {
            queue,
            indirect: features.indirect,
            in_flight: InFlight::new(size),
            heads: VecDeque::new(),
            batch: 0,
            last_in: vec![0; usize::from(size)],
            given_back: 0,
        })
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// How far it has been served.
    pub fn position(&self) -> RingPosition {
        RingPosition { avail: self.queue.next_avail(), used: self.queue.next_used(), ..RingPosition::START }
    }

    /// The next chain, if there is one.
    ///
    /// # Errors
    /// The driver has broken the ring.
    pub fn pop(&mut self, memory: &GuestMemoryMmap) -> Result<Option<Chain>, RingError> {
        if self.heads.is_empty() {
            self.look_for_heads(memory)?;
        }
        let (next, size) = (self.queue.next_avail(), self.queue.size());
        let Some(&head) = self.heads.front() else { return Ok(None) };
        if head >= size {
            return Err(RingError::Index { index: head, size });
        }
        let mut builder = Builder::new(memory, size);
        builder.follow(self.queue.desc_table(), size, head, self.indirect)?;
        if !self.in_flight.take(head) {
            return Err(RingError::InUse(head));
        }
        self.heads.pop_front();
        self.queue.set_next_avail(next.wrapping_add(1));
        Ok(Some(builder.finish(head, 1)))
    }

    fn look_for_heads(&mut self, memory: &GuestMemoryMmap) -> Result<(), RingError> {
        const AREA: &str = "available ring";
        let (ring, next, size) = (self.queue.avail_ring(), self.queue.next_avail(), self.queue.size());
        let index = load_u16(memory, AREA, ring.wrapping_add(2), Ordering::Acquire)?;
        let waiting = index.wrapping_sub(next);
        if waiting > size {
            return Err(RingError::Jump { from: next, to: index, size });
        }
        self.batch += 1;
        for place in (0..waiting).map(|offset| next.wrapping_add(offset) % size) {
            let entry = RING_HEADER + u64::from(place) * AVAIL_ENTRY;
            let head = load_u16(memory, AREA, ring.wrapping_add(entry), Ordering::Relaxed)?;
            if let Some(last) = self.last_in.get_mut(usize::from(head))
                && std::mem::replace(last, self.batch) == self.batch
            {
                return Err(RingError::InUse(head));
            }
            self.heads.push_back(head);
        }
        Ok(())
    }

    /// Puts back the chain that was taken last, to be taken again later.
    pub fn undo_pop(&mut self, chain: Chain) {
        self.in_flight.give_back(chain.id);
        self.heads.push_front(chain.id);
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
    }

    /// Gives a chain back to the driver, of which `written` bytes have been written.
    ///
    /// # Errors
    /// The used ring is not in memory any more.
    pub fn push(&mut self, memory: &GuestMemoryMmap, chain: Chain, written: u32) -> Result<(), RingError> {
        self.in_flight.give_back(chain.id);
        self.given_back = self.given_back.wrapping_add(1);
        self.queue.add_used(memory, chain.id, written).map_err(|_| self.used_ring_gone())
    }

    /// Gives several chains back at once: the driver sees all of them or none.
    ///
    /// # Errors
    /// The used ring is not in memory any more.
    pub fn push_all(
        &mut self,
        memory: &GuestMemoryMmap,
        chains: impl Iterator<Item = (Chain, u32)>,
    ) -> Result<(), RingError> {
        let (ring, size) = (self.queue.used_ring(), self.queue.size());
        let mut next = self.queue.next_used();
        for (chain, written) in chains {
            let entry = ring.wrapping_add(RING_HEADER + u64::from(next % size) * USED_ENTRY);
            let element = u64::from(chain.id) | u64::from(written) << 32;
            memory.write_obj(element.to_le(), GuestAddress(entry)).map_err(|_| self.used_ring_gone())?;
            self.in_flight.give_back(chain.id);
            self.given_back = self.given_back.wrapping_add(1);
            next = next.wrapping_add(1);
        }
        store_u16(memory, "used ring", ring.wrapping_add(2), next, Ordering::Release)?;
        self.queue.set_next_used(next);
        Ok(())
    }

    /// Whether the driver wants to hear of what was given back since the last call.
    ///
    /// # Errors
    /// The ring is not in memory any more.
    pub fn wants_interrupt(&mut self, memory: &GuestMemoryMmap) -> Result<bool, RingError> {
        let given_back = std::mem::take(&mut self.given_back);
        if given_back == 0 {
            return Ok(false);
        }
        // What was given back must be visible before the driver's wish is read.
        std::sync::atomic::fence(Ordering::SeqCst);
        let ring = self.queue.avail_ring();
        if self.queue.event_idx_enabled() {
            // The library counts only what was given back through it.
            let end = RING_HEADER + u64::from(self.queue.size()) * AVAIL_ENTRY;
            let event = load_u16(memory, "available ring", ring.wrapping_add(end), Ordering::Relaxed)?;
            return Ok(self.queue.next_used().wrapping_sub(event).wrapping_sub(1) < given_back);
        }
        let flags = load_u16(memory, "available ring", ring, Ordering::Relaxed)?;
        Ok(flags & NO_INTERRUPT == 0)
    }

    /// Asks the driver to tell of the next chain; whether there is one already.
    ///
    /// # Errors
    /// The ring is not in memory any more.
    pub fn enable_notification(&mut self, memory: &GuestMemoryMmap) -> Result<bool, RingError> {
        self.queue.enable_notification(memory).map_err(|_| self.used_ring_gone())
    }

    /// Asks the driver not to tell of chains for now.
    ///
    /// # Errors
    /// The ring is not in memory any more.
    pub fn disable_notification(&mut self, memory: &GuestMemoryMmap) -> Result<(), RingError> {
        self.queue.disable_notification(memory).map_err(|_| self.used_ring_gone())
    }

    fn used_ring_gone(&self) -> RingError {
        let len = u64::from(self.queue.size()) * USED_ENTRY + RING_OVERHEAD;
        RingError::Outside { what: "used ring", address: self.queue.used_ring(), len }
    }
}
