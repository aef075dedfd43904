//! What the host says of an assigned device by itself (`include/uapi/linux/vfio.h`: `VFIO_PCI_REQ_IRQ_INDEX`, `VFIO_PCI_ERR_IRQ_INDEX`).

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// The eventfds by which the host's kernel speaks of one function; non-blocking, and never read by a power domain. `None` where it has no
/// such word for it.
#[derive(Clone, Debug, Default)]
pub struct HostSignals {
    /// The host wants the device back: its driver is being unbound, or it is being removed. The kernel repeats this every ten seconds
    /// until the device is closed.
    pub release: Option<Arc<EventFd>>,
    /// An error of the bus that the device has not survived (PCI Express Base 6.0, section 6.2).
    pub error: Option<Arc<EventFd>>,
}
