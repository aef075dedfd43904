//! How a function's interrupts leave it: message vectors and INTx lines, as traits that the VMM implements.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// An MSI or MSI-X message as the guest programmed it (PCI 3.0, section 6.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message address, 64 bits.
    pub address: u64,
    /// Message data; 16 bits count for MSI, 32 for MSI-X.
    pub data: u32,
}

/// One message vector: an eventfd whose signal becomes the programmed message in the guest.
///
/// Dropping it disconnects the eventfd and gives the route back.
pub trait MsiVector: Debug + Send + Sync {
    /// The eventfd that devices (VFIO, or our own models) signal. Stays the same for the vector's life.
    fn eventfd(&self) -> &EventFd;

    /// Programs the message and connects the eventfd to it. Cheap when nothing changed.
    fn unmask(&self, message: MsiMessage) -> io::Result<()>;

    /// Disconnects the eventfd; signals stay pending in it and are delivered on the next `unmask`.
    fn mask(&self) -> io::Result<()>;
}

/// Gives out message vectors.
pub trait MsiAllocator: Debug + Send + Sync {
    /// A new, masked vector.
    fn allocate(&self) -> io::Result<Arc<dyn MsiVector>>;
}

/// A level-triggered INTx line with end-of-interrupt notice (KVM resampling irqfd).
///
/// Dropping it disconnects both.
pub trait IntxLine: Debug + Send + Sync {
    /// Signalled by the device to raise the line.
    fn trigger(&self) -> &EventFd;
    /// Signalled by the interrupt controller when the guest has acknowledged the interrupt.
    fn resample(&self) -> &EventFd;
}
