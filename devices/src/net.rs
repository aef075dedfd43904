//! The network device (virtio 1.2, section 5.1) and the host's tap interfaces behind it (Linux, `Documentation/networking/tuntap.rst`).

mod interface;
mod ioctl;
pub mod tap;
