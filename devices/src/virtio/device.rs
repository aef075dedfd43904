//! What a virtio device is to the transport it stands on (VIRTIO 1.2, chapters 2 and 5), and the transport to it.

use std::fmt::Debug;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

pub use crate::emulated::Saved;

use super::Memory;
use super::queue::ActiveQueue;
use super::ring::RingError;

/// VIRTIO_F_INDIRECT_DESC.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1: not a device of the time before the standard.
pub const F_VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_RING_PACKED.
pub const F_RING_PACKED: u64 = 1 << 34;
/// What a device offers of rings that [`ActiveQueue`] serves.
pub const F_RINGS: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_RING_PACKED;

/// Types of devices (VIRTIO 1.2, chapter 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceType(pub u16);

impl DeviceType {
    /// Network.
    pub const NET: Self = Self(1);
    /// Block.
    pub const BLOCK: Self = Self(2);
    /// Console.
    pub const CONSOLE: Self = Self(3);
    /// Entropy.
    pub const RNG: Self = Self(4);
    /// Traditional memory balloon.
    pub const BALLOON: Self = Self(5);
    /// Socket.
    pub const VSOCK: Self = Self(19);
    /// Memory that can be added and taken away.
    pub const MEM: Self = Self(24);
    /// File system.
    pub const FS: Self = Self(26);
    /// Persistent memory.
    pub const PMEM: Self = Self(27);
    /// Watchdog.
    pub const WATCHDOG: Self = Self(35);
}

/// The way back from a device to its driver. Callable from any thread; never waits.
pub trait Interrupt: Debug + Send + Sync {
    /// Chains of this queue have been given back.
    fn queue(&self, index: u16);

    /// The configuration has changed.
    fn config(&self);

    /// The device has stopped and must be reset: `why` goes to the log, and to the driver its status.
    fn needs_reset(&self, why: &str);

    /// An eventfd whose signal is [`Self::queue`], for who cannot call (vhost).
    ///
    /// # Errors
    /// No descriptor is left.
    fn queue_event(&self, index: u16) -> io::Result<EventFd>;

    /// Whether a device that is activated now begins paused, as after [`Active::pause`]: it must not look at its rings before the machine goes on.
    fn begins_paused(&self) -> bool {
        false
    }
}

/// What a device gets when the driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory.
    pub memory: Memory,
    /// By number; those that the driver has not enabled are not there.
    pub queues: Vec<ActiveQueue>,
    /// Features that were negotiated.
    pub features: u64,
    /// The way to the driver.
    pub interrupt: std::sync::Arc<dyn Interrupt>,
}

impl Activation {
    /// Whether all of `bits` were negotiated.
    pub fn has(&self, bits: u64) -> bool {
        self.features & bits == bits
    }

    /// Takes a queue out.
    ///
    /// # Errors
    /// The driver has not enabled it.
    pub fn take_queue(&mut self, index: u16) -> Result<ActiveQueue, DeviceError> {
        let place = self.queues.iter().position(|queue| queue.index() == index);
        Ok(self.queues.remove(place.ok_or(DeviceError::NoQueue(index))?))
    }
}

/// Why a device stops until it is reset.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver has broken a ring.
    #[error("queue {queue}: {source}")]
    Ring {
        /// Which queue.
        queue: u16,
        /// What is wrong with it.
        source: RingError,
    },
    /// The driver has broken a ring, in a place that knows no number.
    #[error(transparent)]
    SomeRing(#[from] RingError),
    /// A queue without which the device cannot work.
    #[error("the driver has not enabled queue {0}")]
    NoQueue(u16),
    /// The driver does not keep to the device's protocol.
    #[error("{0}")]
    Protocol(String),
    /// The host.
    #[error("{what}: {source}")]
    Host {
        /// What failed.
        what: String,
        /// How.
        source: io::Error,
    },
}

impl DeviceError {
    /// For `map_err`: something on the host failed.
    pub fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Host { what, source }
    }
}

/// A device that a transport can stand before. It outlives resets of itself and of the machine, and is one device all the time: what is behind it
/// (a file, a tap, a socket) stays open.
///
/// All calls but [`Self::activate`] can come from several threads at once. None may wait for the guest or for the far end.
pub trait VirtioDevice: Debug + Send + Sync {
    /// Its type.
    fn device_type(&self) -> DeviceType;

    /// The most descriptors of each queue, each a power of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Features offered, with [`F_RINGS`] if they are [`ActiveQueue`]s that are served. VERSION_1 goes without saying.
    fn features(&self) -> u64;

    /// The driver's read of device configuration. What is beyond it reads zero: `data` comes so.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let _ = (offset, data);
    }

    /// The driver's write of device configuration.
    fn write_config(&self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready. Never called twice without the first [`Active`] having stopped.
    ///
    /// # Errors
    /// The device cannot work; it then needs a reset.
    fn activate(&self, activation: Activation) -> Result<Box<dyn Active>, DeviceError>;

    /// Memory has been added to the machine or taken from it, and [`Activation::memory`] shows it.
    fn memory_changed(&self) {}

    /// Gives it another size, in bytes: that of a disk, of a balloon, of memory that the guest can have.
    ///
    /// # Errors
    /// It cannot have that size, or none at all, and why.
    fn resize(&self, size: u64) -> Result<(), String> {
        Err(format!("it cannot be made {size} bytes: it has no size"))
    }

    /// Bytes of the machine's memory that the guest has given up to it.
    fn withheld_memory(&self) -> u64 {
        0
    }

    /// The pseudoterminal behind it.
    fn terminal(&self) -> Option<PathBuf> {
        None
    }

    /// What it has counted, by Cloud Hypervisor's names.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// What of the device itself must go on elsewhere as it is here. Called while it is paused.
    ///
    /// # Errors
    /// It cannot be saved, and why.
    fn save(&self) -> Result<Saved, String> {
        Ok(Saved::Null)
    }

    /// Goes on as saved; called before it is activated.
    ///
    /// # Errors
    /// That cannot be, and why.
    fn restore(&self, saved: &Saved) -> Result<(), String> {
        let _ = saved;
        Ok(())
    }
}

/// A device at work. Dropping it stops it, if need be, and waits for that.
pub trait Active: Debug + Send + Sync {
    /// Asks it to stop: to end what it has begun, and to touch guest memory no more.
    fn stop(&self);

    /// Waits until it has stopped, but no longer than `limit`; whether it has.
    fn wait_stopped(&self, limit: Duration) -> bool;

    /// Ends what has begun, begins nothing new, and returns when that is so.
    fn pause(&self);

    /// Begins nothing new, as after [`Self::pause`], but waits no longer than `limit` for what has begun.
    fn hold(&self, limit: Duration);

    /// Goes on.
    fn resume(&self);
}
