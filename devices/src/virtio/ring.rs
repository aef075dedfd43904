//! What split and packed rings have in common: where a ring lies, what was negotiated, what a guest can do wrong, how far device and driver have come
//! (VIRTIO 1.2, sections 2.6 to 2.8).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

/// The most buffers in one chain where the ring itself is shorter. (Linux makes indirect chains of up to some hundred.)
pub const CHAIN_MAX: usize = 1024;

/// Where a queue lies in guest memory, as the driver has written it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueLayout {
    /// Number of descriptors.
    pub size: u16,
    /// Descriptor table, or descriptor ring.
    pub descriptors: u64,
    /// Available ring, or driver event suppression.
    pub driver: u64,
    /// Used ring, or device event suppression.
    pub device: u64,
}

/// What of a ring was negotiated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingFeatures {
    /// VIRTIO_F_RING_PACKED.
    pub packed: bool,
    /// VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
}

/// How far a ring has been served. Enough to go on with it elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingPosition {
    /// The next chain to take: a running index, or in a packed ring a place.
    pub avail: u16,
    /// Where the next used element goes, likewise.
    pub used: u16,
    /// Packed: the driver's wrap counter as the device has it.
    pub avail_wrap: bool,
    /// Packed: the device's wrap counter.
    pub used_wrap: bool,
}

impl RingPosition {
    /// Of a ring that nobody has used.
    pub const START: Self = Self { avail: 0, used: 0, avail_wrap: true, used_wrap: true };

    fn bits(self) -> u64 {
        u64::from(self.avail)
            | u64::from(self.used) << 16
            | u64::from(self.avail_wrap) << 32
            | u64::from(self.used_wrap) << 33
    }

    fn from_bits(bits: u64) -> Self {
        let [a, b, c, d, wraps, ..] = bits.to_le_bytes();
        Self {
            avail: u16::from_le_bytes([a, b]),
            used: u16::from_le_bytes([c, d]),
            avail_wrap: wraps & 1 != 0,
            used_wrap: wraps & 2 != 0,
        }
    }
}

/// A ring's position, kept by who serves it for who saves it. What is read while the ring is being served is of no use.
#[derive(Clone, Debug)]
pub struct SharedPosition(Arc<AtomicU64>);

impl SharedPosition {
    /// At this position.
    pub fn new(position: RingPosition) -> Self {
        Self(Arc::new(AtomicU64::new(position.bits())))
    }

    /// The position last noted.
    pub fn get(&self) -> RingPosition {
        RingPosition::from_bits(self.0.load(Ordering::Acquire))
    }

    /// Notes a position.
    pub fn set(&self, position: RingPosition) {
        self.0.store(position.bits(), Ordering::Release);
    }
}

/// What a driver has done wrong with a ring. The device stops until it is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// A size that the queue cannot have.
    #[error("a queue of {0} descriptors is not possible")]
    Size(u16),
    /// An area at an address that it cannot have.
    #[error("the {area} is not aligned at {address:#x}")]
    Misaligned {
        /// Which area.
        area: &'static str,
        /// Where it is.
        address: u64,
    },
    /// Something that is not in guest memory.
    #[error("the {what} at {address:#x} ({len:#x} bytes) is not in the guest's memory")]
    Outside {
        /// What.
        what: &'static str,
        /// Where.
        address: u64,
        /// How long.
        len: u64,
    },
    /// More chains made available than there are descriptors.
    #[error("the available index jumped from {from} to {to} in a queue of {size}")]
    Jump {
        /// What the device had come to.
        from: u16,
        /// What the driver wrote.
        to: u16,
        /// Number of descriptors.
        size: u16,
    },
    /// A descriptor that does not exist.
    #[error("descriptor {index} does not exist in a table of {size}")]
    Index {
        /// Its number.
        index: u16,
        /// How many there are.
        size: u16,
    },
    /// A chain that the device has already.
    #[error("chain {0} is made available again before the device has given it back")]
    InUse(u16),
    /// A chain that runs in circles, or on and on.
    #[error("a descriptor chain is a loop or has more than {0} descriptors")]
    TooLong(usize),
    /// Buffers of more than 4 GiB in all.
    #[error("the buffers of a descriptor chain are larger than 4 GiB in all")]
    TooLarge,
    /// A buffer for the device to read behind one to write.
    #[error("a descriptor chain has a readable buffer behind a writable one")]
    Order,
    /// An indirect table where there can be none, or of an impossible length.
    #[error("an indirect descriptor table of {0} bytes is not possible here")]
    Indirect(u32),
    /// A packed chain without an end.
    #[error("a descriptor chain ends in a descriptor that the driver has not made available")]
    Unfinished,
}

/// Refuses an area that is misaligned or not in memory.
pub(super) fn check_area(
    memory: &GuestMemoryMmap,
    area: &'static str,
    address: u64,
    len: u64,
    align: u64,
    access: Permissions,
) -> Result<(), RingError> {
    if !address.is_multiple_of(align) {
        return Err(RingError::Misaligned { area, address });
    }
    let outside = RingError::Outside { what: area, address, len };
    let count = usize::try_from(len).map_err(|_| outside)?;
    if memory.check_range(GuestAddress(address), count, access) { Ok(()) } else { Err(outside) }
}

/// The 16 bits at `address`.
pub(super) fn load_u16(
    memory: &GuestMemoryMmap,
    what: &'static str,
    address: u64,
    order: Ordering,
) -> Result<u16, RingError> {
    memory.load(GuestAddress(address), order).map(u16::from_le).map_err(|_| RingError::Outside {
        what,
        address,
        len: 2,
    })
}

/// The index of a split ring's available or used ring at `address`.
///
/// # Errors
/// It is not in memory.
pub fn load_index(memory: &GuestMemoryMmap, address: u64) -> Result<u16, RingError> {
    load_u16(memory, "ring index", address.wrapping_add(2), Ordering::Acquire)
}

/// Sets the 16 bits at `address`.
pub(super) fn store_u16(
    memory: &GuestMemoryMmap,
    what: &'static str,
    address: u64,
    value: u16,
    order: Ordering,
) -> Result<(), RingError> {
    memory.store(value.to_le(), GuestAddress(address), order).map_err(|_| RingError::Outside {
        what,
        address,
        len: 2,
    })
}

/// Which chains the device has.
#[derive(Debug)]
pub(super) struct InFlight(Vec<u64>);

impl InFlight {
    pub(super) fn new(size: u16) -> Self {
        Self(vec![0; usize::from(size).div_ceil(64)])
    }

    /// Notes that the device has a chain; whether it had it not.
    pub(super) fn take(&mut self, id: u16) -> bool {
        let bit = 1_u64 << (id % 64);
        let Some(word) = self.0.get_mut(usize::from(id / 64)) else { return false };
        let free = *word & bit == 0;
        *word |= bit;
        free
    }

    /// Notes that the device has given a chain back.
    pub(super) fn give_back(&mut self, id: u16) {
        if let Some(word) = self.0.get_mut(usize::from(id / 64)) {
            *word &= !(1_u64 << (id % 64));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_survives_its_way_through_a_word() {
        for position in [
            RingPosition::START,
            RingPosition { avail: 0xffff, used: 0x1234, avail_wrap: false, used_wrap: true },
            RingPosition { avail: 1, used: 0xffff, avail_wrap: true, used_wrap: false },
        ] {
            let shared = SharedPosition::new(RingPosition::START);
            shared.set(position);
            assert_eq!(shared.get(), position);
        }
    }

    #[test]
    fn a_chain_is_taken_once_until_it_is_given_back() {
        let mut chains = InFlight::new(100);
        assert!(chains.take(99) && !chains.take(99) && chains.take(35));
        chains.give_back(99);
        assert!(chains.take(99));
        assert!(!chains.take(200), "a chain that cannot be is not there to be taken");
    }
}
