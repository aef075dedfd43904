//! The packed virtqueue (VIRTIO 1.2, section 2.8). The library has none, but for the form of a descriptor.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::desc::packed::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, Permissions};

use super::chain::{Builder, Chain, DESCRIPTOR_LEN};
use super::ring::{
    InFlight, QueueLayout, RingError, RingFeatures, RingPosition, check_area, load_u16, store_u16,
};

/// Bits of a descriptor's flags.
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const WRITE: u16 = 1 << 1;
/// Offsets in a descriptor.
const FLAGS: u64 = 14;
/// What an event suppression area can say, and its offsets.
const EVENTS_ENABLE: u16 = 0;
const EVENTS_DISABLE: u16 = 1;
const EVENTS_AT: u16 = 2;
const EVENT_FLAGS: u64 = 2;
const EVENT_LEN: u64 = 4;
const WRAP: u16 = 1 << 15;

const RING: &str = "descriptor ring";
const DRIVER: &str = "driver event suppression";
const DEVICE: &str = "device event suppression";

/// A packed ring being served.
#[derive(Debug)]
pub struct PackedRing {
    layout: QueueLayout,
    features: RingFeatures,
    position: RingPosition,
    in_flight: InFlight,
    /// Places of the ring whose chains the device has.
    taken: u16,
    /// Places given back since the driver was last considered for an interrupt.
    given_back: u16,
}

impl PackedRing {
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
        let size = layout.size;
        if !(1..=1 << 15).contains(&size) || position.avail >= size || position.used >= size {
            return Err(RingError::Size(size));
        }
        let ring = u64::from(size) * DESCRIPTOR_LEN;
        check_area(memory, RING, layout.descriptors, ring, 16, Permissions::ReadWrite)?;
        check_area(memory, DRIVER, layout.driver, EVENT_LEN, 4, Permissions::Read)?;
        check_area(memory, DEVICE, layout.device, EVENT_LEN, 4, Permissions::Write)?;
        Ok(Self {
            layout: *layout,
            features,
            position,
            in_flight: InFlight::new(size),
            taken: 0,
            given_back: 0,
        })
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// How far it has been served.
    pub fn position(&self) -> RingPosition {
        self.position
    }

    fn descriptor_at(&self, place: u16) -> u64 {
        self.layout.descriptors.wrapping_add(u64::from(place) * DESCRIPTOR_LEN)
    }

    /// Whether the driver has made the descriptor at this place available, seen with this wrap counter.
    fn is_available(&self, memory: &GuestMemoryMmap, place: u16, wrap: bool) -> Result<bool, RingError> {
        let address = self.descriptor_at(place).wrapping_add(FLAGS);
        let flags = load_u16(memory, RING, address, Ordering::Acquire)?;
        Ok((flags & AVAIL != 0) == wrap && (flags & USED != 0) != wrap)
    }

    /// The next chain, if there is one.
    ///
    /// # Errors
    /// The driver has broken the ring.
    pub fn pop(&mut self, memory: &GuestMemoryMmap) -> Result<Option<Chain>, RingError> {
        let size = self.layout.size;
        let (mut place, mut wrap) = (self.position.avail, self.position.avail_wrap);
        if !self.is_available(memory, place, wrap)? {
            return Ok(None);
        }
        let mut builder = Builder::new(memory, size);
        let mut slots = 0_u16;
        let id = loop {
            if slots >= size - self.taken {
                return Err(RingError::TooLong(size.into()));
            }
            if slots > 0 && !self.is_available(memory, place, wrap)? {
                return Err(RingError::Unfinished);
            }
            let address = self.descriptor_at(place);
            let descriptor: Descriptor = memory
                .read_obj(GuestAddress(address))
                .map_err(|_| RingError::Outside { what: RING, address, len: DESCRIPTOR_LEN })?;
            slots += 1;
            place += 1;
            if place == size {
                (place, wrap) = (0, !wrap);
            }
            if descriptor.refers_to_indirect_table() {
                if !self.features.indirect || descriptor.has_next() || slots > 1 {
                    return Err(RingError::Indirect(descriptor.len()));
                }
                add_indirect(&mut builder, memory, &descriptor)?;
            } else {
                builder.add(descriptor.addr().0, descriptor.len(), descriptor.is_write_only())?;
            }
            if !descriptor.has_next() {
                // The last descriptor of a chain has its ID.
                break descriptor.id();
            }
        };
        if id >= size {
            return Err(RingError::Index { index: id, size });
        }
        if !self.in_flight.take(id) {
            return Err(RingError::InUse(id));
        }
        self.taken += slots;
        (self.position.avail, self.position.avail_wrap) = (place, wrap);
        Ok(Some(builder.finish(id, slots)))
    }

    /// Puts back the chain that was taken last, to be taken again later.
    pub fn undo_pop(&mut self, chain: Chain) {
        self.in_flight.give_back(chain.id);
        self.taken = self.taken.saturating_sub(chain.slots);
        if let Some(place) = self.position.avail.checked_sub(chain.slots) {
            self.position.avail = place;
        } else {
            self.position.avail =
                self.position.avail.wrapping_add(self.layout.size).wrapping_sub(chain.slots);
            self.position.avail_wrap = !self.position.avail_wrap;
        }
    }

    /// Gives a chain back to the driver, of which `written` bytes have been written.
    ///
    /// # Errors
    /// The ring is not in memory any more.
    pub fn push(&mut self, memory: &GuestMemoryMmap, chain: Chain, written: u32) -> Result<(), RingError> {
        self.push_all(memory, std::iter::once((chain, written)))
    }

    /// Gives several chains back at once: the driver, who looks at one after the other, sees all of them or none.
    ///
    /// # Errors
    /// The ring is not in memory any more.
    pub fn push_all(
        &mut self,
        memory: &GuestMemoryMmap,
        chains: impl Iterator<Item = (Chain, u32)>,
    ) -> Result<(), RingError> {
        let mut first = None;
        for (chain, written) in chains {
            let (at, flags) = self.write_used(memory, &chain, written)?;
            // The flags give a descriptor to the driver. Those of the first one do so for all.
            match first {
                None => first = Some((at, flags)),
                Some(_) => store_u16(memory, RING, at, flags, Ordering::Release)?,
            }
        }
        first.map_or(Ok(()), |(at, flags)| store_u16(memory, RING, at, flags, Ordering::Release))
    }

    /// Writes a used descriptor but for its flags, which are returned with their address.
    fn write_used(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: &Chain,
        written: u32,
    ) -> Result<(u64, u16), RingError> {
        let size = self.layout.size;
        let wrap = self.position.used_wrap;
        let turn = if wrap { AVAIL | USED } else { 0 };
        let flags = turn | if written > 0 { WRITE } else { 0 };
        let address = self.descriptor_at(self.position.used);
        let outside = RingError::Outside { what: RING, address, len: DESCRIPTOR_LEN };
        let [l0, l1, l2, l3] = written.to_le_bytes();
        let [i0, i1] = chain.id.to_le_bytes();
        // The length and the ID must be there before the flags.
        let body = GuestAddress(address.wrapping_add(8));
        memory.write_slice(&[l0, l1, l2, l3, i0, i1], body).map_err(|_| outside)?;
        self.in_flight.give_back(chain.id);
        self.taken = self.taken.saturating_sub(chain.slots);
        self.given_back = self.given_back.wrapping_add(chain.slots);
        let next = u32::from(self.position.used) + u32::from(chain.slots);
        let turned = next >= u32::from(size);
        let next = if turned { next - u32::from(size) } else { next };
        self.position.used = u16::try_from(next).unwrap_or(0);
        self.position.used_wrap = wrap != turned;
        Ok((address.wrapping_add(FLAGS), flags))
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
        fence(Ordering::SeqCst);
        let flags =
            load_u16(memory, DRIVER, self.layout.driver.wrapping_add(EVENT_FLAGS), Ordering::Acquire)?;
        match flags & 3 {
            EVENTS_DISABLE => Ok(false),
            EVENTS_AT if self.features.event_idx => {
                let at = load_u16(memory, DRIVER, self.layout.driver, Ordering::Relaxed)?;
                Ok(self.passed(at, given_back))
            }
            _ => Ok(true),
        }
    }

    /// Whether the last `given_back` places include the one that the driver waits for.
    fn passed(&self, at: u16, given_back: u16) -> bool {
        let size = self.layout.size;
        let mut event = at & !WRAP;
        if (at & WRAP != 0) != self.position.used_wrap {
            event = event.wrapping_sub(size);
        }
        let new = self.position.used;
        new.wrapping_sub(event).wrapping_sub(1) < given_back
    }

    /// Asks the driver to tell of the next chain; whether there is one already.
    ///
    /// # Errors
    /// The ring is not in memory any more.
    pub fn enable_notification(&mut self, memory: &GuestMemoryMmap) -> Result<bool, RingError> {
        let RingPosition { avail, avail_wrap, .. } = self.position;
        let flags = if self.features.event_idx {
            let at = avail | if avail_wrap { WRAP } else { 0 };
            store_u16(memory, DEVICE, self.layout.device, at, Ordering::Relaxed)?;
            EVENTS_AT
        } else {
            EVENTS_ENABLE
        };
        let address = self.layout.device.wrapping_add(EVENT_FLAGS);
        store_u16(memory, DEVICE, address, flags, Ordering::Release)?;
        fence(Ordering::SeqCst);
        self.is_available(memory, avail, avail_wrap)
    }

    /// Asks the driver not to tell of chains for now.
    ///
    /// # Errors
    /// The ring is not in memory any more.
    pub fn disable_notification(&mut self, memory: &GuestMemoryMmap) -> Result<(), RingError> {
        let address = self.layout.device.wrapping_add(EVENT_FLAGS);
        store_u16(memory, DEVICE, address, EVENTS_DISABLE, Ordering::Relaxed)
    }
}

/// An indirect table of a packed ring has its buffers in order, without links (VIRTIO 1.2, section 2.8.7).
fn add_indirect(
    builder: &mut Builder<'_>,
    memory: &GuestMemoryMmap,
    table: &Descriptor,
) -> Result<(), RingError> {
    for entry in 0..Builder::indirect_entries(table.len())? {
        let address = table.addr().0.wrapping_add(u64::from(entry) * DESCRIPTOR_LEN);
        let descriptor: Descriptor = memory
            .read_obj(GuestAddress(address))
            .map_err(|_| RingError::Outside { what: "descriptor", address, len: DESCRIPTOR_LEN })?;
        if descriptor.refers_to_indirect_table() {
            return Err(RingError::Indirect(descriptor.len()));
        }
        builder.add(descriptor.addr().0, descriptor.len(), descriptor.is_write_only())?;
    }
    Ok(())
}
