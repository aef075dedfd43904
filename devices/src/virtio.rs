//! Paravirtual devices (Virtual I/O Device, VIRTIO 1.2).
//!
//! A device type implements [`VirtioDevice`](device::VirtioDevice); [`pci::VirtioPci`] puts it on the PCI bus. Between the driver's DRIVER_OK and its
//! reset the device has [`ActiveQueue`](queue::ActiveQueue)s, which usually a [`Worker`](worker::Worker) thread serves.
//!
//! ```text
//! guest's store to a doorbell -> ioeventfd -> Worker -> Handler -> ActiveQueue (split or packed ring) -> irqfd
//! ```
//!
//! Everything in a ring is the guest's: what it must not be is a [`RingError`](ring::RingError), which stops the device with DEVICE_NEEDS_RESET and never
//! more than that.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod console;
pub mod device;
pub mod discard;
pub mod life;
pub mod mem;
pub mod packed;
pub mod pci;
pub mod pmem;
pub mod queue;
pub mod ring;
pub mod rng;
pub mod split;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vsock;
pub mod watchdog;
pub mod worker;

use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

/// The guest's memory as devices hold it: what is added to the machine later is seen too.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
/// One look at it.
pub type MemoryView = <Memory as GuestAddressSpace>::T;
