//! Has the kernel say when it wants an assigned function back and when the bus has reported an error of it
//! (`include/uapi/linux/vfio.h`, `VFIO_DEVICE_SET_IRQS` with `VFIO_PCI_REQ_IRQ_INDEX` and `VFIO_PCI_ERR_IRQ_INDEX`).
//!
//! Without the first, the host waits for the end of the VM in silence.

use std::sync::Arc;

use log::{debug, warn};
use vfio_bindings::bindings::vfio::{VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX};
use vfio_pm::HostSignals;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::open::Handle;

/// Connects the host's words on a function. Wakes it. What cannot be connected is missing, which only costs the message.
pub fn listen(handle: &Handle) -> HostSignals {
    let release = connect(handle, VFIO_PCI_REQ_IRQ_INDEX, "its host's requests to release it");
    if let Some(release) = &release {
        handle.watch_release(Arc::clone(release));
    }
    HostSignals {
        release,
        error: connect(handle, VFIO_PCI_ERR_IRQ_INDEX, "errors that the bus reports of it"),
    }
}

fn connect(handle: &Handle, index: u32, what: &str) -> Option<Arc<EventFd>> {
    let bdf = handle.bdf();
    if handle.irq_count(index).0 == 0 {
        debug!("device {bdf}: the host does not tell of {what}");
        return None;
    }
    let eventfd = match EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK) {
        Ok(eventfd) => Arc::new(eventfd),
        Err(e) => {
            warn!("device {bdf}: nobody will hear of {what}: {e}; raise the limit on open files (ulimit -n)");
            return None;
        }
    };
    match handle.device().enable_irq(index, vec![&eventfd]) {
        Ok(()) => Some(eventfd),
        Err(e) => {
            warn!("device {bdf}: nobody will hear of {what}: {e}");
            None
        }
    }
}
