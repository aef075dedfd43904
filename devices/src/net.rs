//! The network device (VIRTIO 1.2, section 5.1) and the host's tap interfaces behind it (Linux, `Documentation/networking/tuntap.rst`).
//!
//! ```text
//! guest's driver <- rings -> QueuePair, a thread for each pair <- readv, writev -> Tap, a file for each pair
//!                              \- or the host's kernel (Vhost)
//!                <- ring -> Control, a thread
//! ```

mod control;
pub mod device;
mod interface;
mod ioctl;
mod pair;
mod receive;
mod shared;
pub mod tap;
mod transmit;
mod vectors;
pub mod vhost;

use std::io;

/// Bytes before a packet (`struct virtio_net_hdr_v1`).
pub(crate) use tap::HEADER_LEN;

/// Longest packet with its header: of 64 KiB, as the kernel puts segments together, and its link header (VIRTIO 1.2, section 5.1.6.3.1).
const PACKET_MAX: usize = 65550 + HEADER_LEN;

/// Whether an error of the tap says that there is no tap any more.
fn is_gone(error: &io::Error) -> bool {
    !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
        && !matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::ENOBUFS | libc::EAGAIN))
}
