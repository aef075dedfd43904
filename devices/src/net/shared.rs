//! What the threads of one network device share: what the driver has settled, the link, and what was counted.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::tap::{HEADER_LEN, Offloads};
use super::{PACKET_MAX, tap};

/// Link header with a VLAN's tag.
const LINK_HEADER: usize = 18;
/// MTU of a tap whose own is not known.
const DEFAULT_MTU: u16 = 1500;

/// A network device's state, as all its threads see it.
#[derive(Debug)]
pub struct Shared {
    pairs: AtomicU16,
    offloads: AtomicU32,
    link: AtomicBool,
    mtu: u16,
    /// What the guest has received.
    pub received: Counters,
    /// What the guest has sent.
    pub sent: Counters,
}

/// Packets one way.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes of frames.
    bytes: AtomicU64,
    /// Frames.
    frames: AtomicU64,
}

impl Counters {
    /// One more, of so many bytes.
    pub fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.frames.fetch_add(1, Ordering::Relaxed);
    }

    /// Bytes and frames so far.
    pub fn get(&self) -> (u64, u64) {
        (self.bytes.load(Ordering::Relaxed), self.frames.load(Ordering::Relaxed))
    }
}

impl Shared {
    /// Of a device over `tap`, with its link up.
    pub fn new(tap: &tap::Tap) -> Self {
        Self {
            pairs: AtomicU16::new(1),
            offloads: AtomicU32::new(0),
            link: AtomicBool::new(true),
            mtu: tap.mtu().unwrap_or(DEFAULT_MTU),
            received: Counters::default(),
            sent: Counters::default(),
        }
    }

    /// How many pairs the driver uses.
    pub fn pairs(&self) -> u16 {
        self.pairs.load(Ordering::Acquire)
    }

    /// The driver uses so many pairs.
    pub fn set_pairs(&self, pairs: u16) {
        self.pairs.store(pairs, Ordering::Release);
    }

    /// What the driver takes unfinished.
    pub fn offloads(&self) -> Offloads {
        Offloads::from_bits_truncate(self.offloads.load(Ordering::Acquire))
    }

    /// The driver takes this unfinished.
    pub fn set_offloads(&self, offloads: Offloads) {
        self.offloads.store(offloads.bits(), Ordering::Release);
    }

    /// Whether the link is up.
    pub fn has_link(&self) -> bool {
        self.link.load(Ordering::Acquire)
    }

    /// The link is down for good; whether it was up.
    pub fn cut_link(&self) -> bool {
        self.link.swap(false, Ordering::AcqRel)
    }

    /// The longest packet that can come, with its header.
    pub fn packet_max(&self) -> usize {
        let large = Offloads::TSO4 | Offloads::TSO6 | Offloads::UFO;
        if self.offloads().intersects(large) {
            PACKET_MAX
        } else {
            HEADER_LEN + LINK_HEADER + usize::from(self.mtu)
        }
    }
}
