#![allow(unsafe_code)] // Network interfaces are configured by ioctls, which no crate wraps for taps.
//! The ioctls of taps (`include/uapi/linux/if_tun.h`) and of network interfaces (netdevice(7)).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

/// Longest name of an interface, with the zero behind it.
pub const NAME_LEN: usize = libc::IFNAMSIZ;

/// `struct ifreq`: a name, and a union that is read and written here as the bytes it is.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug)]
pub struct InterfaceRequest {
    name: [u8; NAME_LEN],
    data: [u8; 24],
}

const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

impl InterfaceRequest {
    /// For the interface of this name, which is cut if it is too long for one.
    pub fn new(name: &str) -> Self {
        let mut request = Self { name: [0; NAME_LEN], data: [0; 24] };
        for (to, from) in request.name.iter_mut().take(NAME_LEN - 1).zip(name.bytes()) {
            *to = from;
        }
        request
    }

    /// With these bytes at the start of the union.
    pub fn with(mut self, data: &[u8]) -> Self {
        for (to, from) in self.data.iter_mut().zip(data) {
            *to = *from;
        }
        self
    }

    /// The name, which the kernel may have completed.
    pub fn name(&self) -> String {
        let bytes: Vec<u8> = self.name.iter().copied().take_while(|byte| *byte != 0).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The first bytes of the union.
    pub fn data<const N: usize>(&self) -> [u8; N] {
        std::array::from_fn(|at| self.data.get(at).copied().unwrap_or_default())
    }
}

/// `struct in6_ifreq`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Ipv6Request {
    /// The address.
    pub address: [u8; 16],
    /// Bits of the network.
    pub prefix: u32,
    /// The interface.
    pub index: u32,
}

const _: () = assert!(size_of::<Ipv6Request>() == size_of::<libc::in6_ifreq>());

fn answer(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A request about an interface, answered in place. `number` must be one whose argument is a `struct ifreq`.
pub fn interface(fd: &impl AsFd, number: libc::c_ulong, request: &mut InterfaceRequest) -> io::Result<()> {
    // SAFETY: `request` has the size and alignment of a `struct ifreq`, without pointers in it, and the kernel writes no more than that.
    answer(unsafe { ioctl_with_mut_ref(&fd.as_fd().as_raw_fd(), number, request) })
}

/// `SIOCSIFADDR` of an IPv6 socket.
pub fn add_ipv6(socket: &impl AsFd, request: &Ipv6Request) -> io::Result<()> {
    // SAFETY: `request` is a `struct in6_ifreq`, which the kernel only reads.
    answer(unsafe { ioctl_with_ref(&socket.as_fd().as_raw_fd(), libc::SIOCSIFADDR, request) })
}

/// `TUNSETVNETHDRSZ`: how long the header before each packet is.
pub fn set_header_size(tap: &impl AsFd, size: libc::c_int) -> io::Result<()> {
    // SAFETY: the argument is an `int`, which the kernel only reads.
    answer(unsafe { ioctl_with_ref(&tap.as_fd().as_raw_fd(), libc::TUNSETVNETHDRSZ, &size) })
}

/// `TUNSETOFFLOAD`: what kinds of unfinished packets may be read from the tap.
pub fn set_offloads(tap: &impl AsFd, offloads: libc::c_uint) -> io::Result<()> {
    // SAFETY: the argument is a number, not a pointer.
    answer(unsafe { ioctl_with_val(&tap.as_fd().as_raw_fd(), libc::TUNSETOFFLOAD, offloads.into()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cut_to_what_the_kernel_takes_and_end_with_a_zero() {
        assert_eq!(InterfaceRequest::new("tap0").name(), "tap0");
        assert_eq!(InterfaceRequest::new("a-name-that-is-too-long").name(), "a-name-that-is-");
    }

    #[test]
    fn the_union_is_written_and_read_from_its_start() {
        let request = InterfaceRequest::new("x").with(&[1, 2, 3]);
        assert_eq!(request.data::<4>(), [1, 2, 3, 0]);
        assert_eq!(request.with(&[9; 40]).data::<24>(), [9; 24]);
    }
}
