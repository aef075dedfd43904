//! `VFIO_DEVICE_SET_IRQS` for message vectors (`include/uapi/linux/vfio.h`), with its whole answer: the kernel says how
//! many vectors there are when it has fewer than it was asked for, and then has armed none. The wrapper of the VFIO
//! crate takes that for success.
#![allow(unsafe_code)] // An ioctl with a structure of variable length.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use pci::interrupt::MsiVector;
use vfio_bindings::bindings::vfio::{VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD};
use vmm_sys_util::ioctl::ioctl_with_ptr;

use super::open::Handle;

/// The macro makes an undocumented public function; here it stays private.
mod request {
    use vfio_bindings::bindings::vfio::{VFIO_BASE, VFIO_TYPE};
    use vmm_sys_util::ioctl_io_nr;

    ioctl_io_nr!(VFIO_DEVICE_SET_IRQS, VFIO_TYPE as u32, VFIO_BASE + 10);
}
use request::VFIO_DEVICE_SET_IRQS;

/// Words of `struct vfio_irq_set` before its data: argsz, flags, index, start, count.
const HEADER_WORDS: usize = 5;

/// Why vectors were not armed.
#[derive(Debug, thiserror::Error)]
pub enum ArmError {
    /// The host has run out of interrupt vectors.
    #[error("the host has {available} interrupt vectors left for the {wanted} that the guest uses")]
    TooFew {
        /// How many it has.
        available: usize,
        /// How many are needed.
        wanted: usize,
    },
    /// The kernel refused.
    #[error("{0}")]
    Refused(#[source] io::Error),
}

/// Has the vectors `0..vectors.len()` of an interrupt index signal these eventfds.
pub fn arm(handle: &Handle, index: u32, vectors: &[Arc<dyn MsiVector>]) -> Result<(), ArmError> {
    let words = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let mut set = vec![
        words((HEADER_WORDS + vectors.len()) * size_of::<u32>()),
        VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
        index,
        0,
        words(vectors.len()),
    ];
    set.extend(vectors.iter().map(|vector| vector.eventfd().as_raw_fd().cast_unsigned()));
    // SAFETY: `set` is a whole `struct vfio_irq_set` with as many descriptors as it says, its length is in `argsz`, and
    // the kernel only reads it.
    let result = unsafe { ioctl_with_ptr(handle, VFIO_DEVICE_SET_IRQS(), set.as_ptr()) };
    match usize::try_from(result) {
        Ok(0) => Ok(()),
        Ok(available) => Err(ArmError::TooFew { available, wanted: vectors.len() }),
        Err(_) => Err(ArmError::Refused(io::Error::last_os_error())),
    }
}
