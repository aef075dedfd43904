//! Why a tap cannot be used, and what to do about it.

use std::io;

use thiserror::Error;

/// A tap that cannot be used.
#[derive(Debug, Error)]
pub enum TapError {
    /// No interface can have this name.
    #[error(
        "tap={name}: no interface can have this name; use 1 to 15 characters without spaces, slashes and colons"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// The host has no taps.
    #[error("cannot open /dev/net/tun for a tap: {source}; {}", driver_remedy(source))]
    Driver {
        /// Why.
        source: io::Error,
    },
    /// Something else has this name.
    #[error(
        "tap={name}: this interface is no tap; name another one, or make it one with `ip tuntap add {name} mode tap`"
    )]
    NoTap {
        /// The name.
        name: String,
    },
    /// A tap for one pair of queues.
    #[error(
        "tap={name}: it was created for one pair of queues and not for {pairs}; create it with `ip tuntap add {name} mode tap multi_queue`, \
         or use num_queues=2"
    )]
    SingleQueue {
        /// The name.
        name: String,
        /// Pairs wanted.
        pairs: u16,
    },
    /// The kernel does not give it.
    #[error("cannot get the tap {name}: {source}; {}", attach_remedy(name, source))]
    Attach {
        /// The name.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// Something about it cannot be had or changed.
    #[error("cannot {what} the tap {name}: {source}; {}", change_remedy(source))]
    Failed {
        /// The name.
        name: String,
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A descriptor of something else.
    #[error(
        "descriptor {} of the network device is no tap: {source}; give descriptors of /dev/net/tun on which TUNSETIFF was done",
        number + 1
    )]
    Descriptor {
        /// Which one, from zero.
        number: usize,
        /// Why.
        source: io::Error,
    },
    /// A descriptor of a tap whose packets look otherwise.
    #[error(
        "descriptor {} of the network device (tap {name}) has the wrong flags; open it with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR",
        number + 1
    )]
    Flags {
        /// Which one, from zero.
        number: usize,
        /// The tap's name.
        name: String,
    },
    /// Descriptors of two taps.
    #[error(
        "the descriptors of one network device are of two taps, {name} and {other}; give those of one tap"
    )]
    Different {
        /// One tap.
        name: String,
        /// The other.
        other: String,
    },
}

impl TapError {
    /// Whether the kernel finds no sense in what was asked for.
    pub(super) fn is_invalid(&self) -> bool {
        matches!(self, Self::Attach { source, .. } if source.raw_os_error() == Some(libc::EINVAL))
    }
}

fn driver_remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENOENT) => {
            "in a container, give it this file (`mknod /dev/net/tun c 10 200`); else load the module: modprobe tun"
        }
        Some(libc::ENODEV) => "load the module: modprobe tun",
        Some(libc::EACCES | libc::EPERM) => {
            "let this user open it for reading and writing, or hand over an open tap with fd="
        }
        Some(libc::EMFILE) => "raise this process's limit on open files (ulimit -n)",
        _ => "the host's kernel log (dmesg) may say more",
    }
}

fn attach_remedy(name: &str, source: &io::Error) -> String {
    match source.raw_os_error() {
        Some(libc::EPERM) => format!(
            "give the VMM CAP_NET_ADMIN, or create the tap for its user: `ip tuntap add {name} mode tap vnet_hdr user USER`"
        ),
        Some(libc::EBUSY) => {
            format!("another process uses {name}: end it, or give each VM a tap of its own")
        }
        Some(libc::EINVAL) => format!(
            "it was created otherwise (tun, or with another number of queues); `ip -d link show {name}` says how"
        ),
        Some(libc::E2BIG) => "a tap has room for 256 pairs of queues, and all are taken".to_owned(),
        _ => "the host's kernel log (dmesg) may say more".to_owned(),
    }
}

fn change_remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "give the VMM CAP_NET_ADMIN, or configure the tap beforehand and leave ip=, mask=, host_mac= and mtu= out"
        }
        Some(libc::EINVAL) => "the kernel does not take this value; choose another one",
        Some(libc::ENODEV | libc::EBADFD) => "it has been removed; create it again",
        Some(libc::EADDRNOTAVAIL) => "this cannot be an address of an interface; choose another one",
        _ => "the host's kernel log (dmesg) may say more",
    }
}
