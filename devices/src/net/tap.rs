//! A tap of the host: one file for each pair of queues (Linux, `Documentation/networking/tuntap.rst`; `drivers/net/tun.c`).
//!
//! It is found by its name, created, or handed over as open descriptors. Every packet has a `struct virtio_net_hdr_v1` before it, so that
//! neither side needs to finish checksums and segments that the other one can do without.

mod error;
#[cfg(test)]
mod tests;

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use bitflags::bitflags;
use log::info;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

pub use error::TapError;

use super::interface::Interface;
use super::ioctl::{self, InterfaceRequest, NAME_LEN};

/// Length of `struct virtio_net_hdr_v1` (virtio 1.2, section 5.1.6).
pub const HEADER_LEN: usize = 12;
/// Most files that the kernel gives one tap (`MAX_TAP_QUEUES`).
pub const MAX_PAIRS: u16 = 256;
/// More packets than a tap keeps for its reader (`txqueuelen`).
const WAITING_MAX: usize = 4096;
/// What a tap is called that is given no name; the kernel finds the number.
const NEW_NAME: &str = "vmtap%d";
/// Where taps are made.
const TUN: &str = "/dev/net/tun";

bitflags! {
    /// What may be unfinished in packets that are read from the tap (`TUN_F_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Offloads: u32 {
        /// The checksum.
        const CSUM = libc::TUN_F_CSUM;
        /// Segmentation of TCP over IPv4.
        const TSO4 = libc::TUN_F_TSO4;
        /// Segmentation of TCP over IPv6.
        const TSO6 = libc::TUN_F_TSO6;
        /// That of TCP with congestion notification.
        const ECN = libc::TUN_F_TSO_ECN;
        /// Fragmentation of UDP.
        const UFO = libc::TUN_F_UFO;
    }
}

/// Which tap, and what is to be set on it.
#[derive(Clone, Debug, Default)]
pub struct TapRequest {
    /// Its name; one is found if absent.
    pub name: Option<String>,
    /// Descriptors that are open already, one for each pair of queues; then `name` does not matter.
    pub descriptors: Vec<Arc<OwnedFd>>,
    /// Pairs of queues.
    pub pairs: u16,
    /// The host's address, and the mask of its network.
    pub ip: Option<IpAddr>,
    /// That mask.
    pub mask: Option<IpAddr>,
    /// The host's link address.
    pub mac: Option<[u8; 6]>,
    /// Largest packet without the link's header.
    pub mtu: Option<u16>,
}

/// An open tap.
#[derive(Debug)]
pub struct Tap {
    name: String,
    files: Vec<Arc<File>>,
    mac: [u8; 6],
    mtu: Option<u16>,
    multi_queue: bool,
    /// Whether it has been created here, with a link address that the kernel has chosen.
    mac_by_chance: bool,
}

impl Tap {
    /// Opens it and sets what is asked for.
    ///
    /// # Errors
    /// See [`TapError`].
    pub fn open(request: &TapRequest) -> Result<Self, TapError> {
        let tap =
            if request.descriptors.is_empty() { Self::by_name(request) } else { Self::handed_over(request) }?;
        // At first only what is finished may be read: the guest's driver says later what it can do.
        tap.set_offloads(Offloads::empty()).map_err(tap.failed("set the offloads of"))?;
        tap.use_pairs(1).map_err(tap.failed("use one queue of"))?;
        Ok(tap)
    }

    fn by_name(request: &TapRequest) -> Result<Self, TapError> {
        let name = request.name.as_deref().unwrap_or(NEW_NAME);
        let invalid = |c: char| c == '/' || c == ':' || c.is_whitespace();
        if name.is_empty() || name.len() >= NAME_LEN || name.contains(invalid) {
            return Err(TapError::Name { name: name.to_owned() });
        }
        let socket = |source| TapError::Failed { name: name.to_owned(), what: "ask about", source };
        let there_already = Interface::new(name).map_err(socket)?.index().is_ok();
        let (first, mut actual, multi_queue) = first_file(name, request.pairs, there_already)?;
        let mut files = vec![Arc::new(first)];
        for _ in 1..request.pairs {
            let (file, found) = attach(&actual, true)?;
            actual = found;
            files.push(Arc::new(file));
        }
        let mac_by_chance = !there_already && request.mac.is_none();
        let mut tap = Self { name: actual, files, mac: [0; 6], mtu: None, multi_queue, mac_by_chance };
        tap.configure(request, there_already)?;
        if request.name.is_none() {
            info!("the tap {} has been created", tap.name);
        }
        Ok(tap)
    }

    fn configure(&mut self, request: &TapRequest, there_already: bool) -> Result<(), TapError> {
        let interface = Interface::new(&self.name).map_err(self.failed("ask about"))?;
        if there_already {
            if request.ip.is_some() {
                info!("the tap {} was there already: its addresses stay as they are", self.name);
            }
        } else if let Some(ip) = request.ip {
            interface.set_ip(ip, request.mask).map_err(self.failed("set the address of"))?;
        }
        if let Some(mac) = request.mac.filter(|mac| interface.mac().ok() != Some(*mac)) {
            interface.set_mac(mac).map_err(self.failed("set the link address of"))?;
        }
        if let Some(mtu) = request.mtu.filter(|mtu| interface.mtu().ok() != Some(*mtu)) {
            interface.set_mtu(mtu).map_err(self.failed("set the MTU of"))?;
        }
        self.mac = interface.mac().map_err(self.failed("read the link address of"))?;
        self.mtu = Some(interface.mtu().map_err(self.failed("read the MTU of"))?);
        interface.set_up().map_err(self.failed("bring up"))?;
        for file in &self.files {
            set_header(file).map_err(self.failed("set the header of"))?;
        }
        Ok(())
    }

    /// Over descriptors of somebody else's, who may have opened them in another network namespace and has set what is to be set.
    fn handed_over(request: &TapRequest) -> Result<Self, TapError> {
        let (mut files, mut names, mut multi_queue) = (Vec::new(), Vec::new(), true);
        for (number, descriptor) in request.descriptors.iter().enumerate() {
            let no_tap = |source| TapError::Descriptor { number, source };
            // A file of its own would be another queue; a second descriptor of the same file is not.
            let file = File::from(descriptor.try_clone().map_err(no_tap)?);
            let (name, before) = attachment(&file).map_err(no_tap)?;
            // Takes effect on a macvtap; a tap has a name for good by now, and says so.
            let wanted =
                before & libc::IFF_MULTI_QUEUE | libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
            let _ = set_attachment(&file, &name, wanted);
            let (_, flags) = attachment(&file).map_err(no_tap)?;
            if flags & libc::IFF_TAP == 0 || flags & libc::IFF_NO_PI == 0 || flags & libc::IFF_VNET_HDR == 0 {
                return Err(TapError::Flags { number, name });
            }
            multi_queue &= flags & libc::IFF_MULTI_QUEUE != 0;
            fcntl_getfl(&file)
                .and_then(|flags| fcntl_setfl(&file, flags | OFlags::NONBLOCK))
                .map_err(|errno| no_tap(errno.into()))?;
            set_header(&file).map_err(no_tap)?;
            files.push(Arc::new(file));
            names.push(name);
        }
        let name = names.first().cloned().unwrap_or_default();
        if let Some(other) = names.iter().find(|other| **other != name) {
            return Err(TapError::Different { name, other: other.clone() });
        }
        let first = files.first().map(Arc::clone);
        let mut tap = Self { name, files, mac: [0; 6], mtu: request.mtu, multi_queue, mac_by_chance: false };
        let Some(first) = first else { return Ok(tap) };
        if let Some(mac) = request.mac {
            let mut address = [0; 8];
            address[..2].copy_from_slice(&libc::ARPHRD_ETHER.to_ne_bytes());
            address[2..].copy_from_slice(&mac);
            let mut set = InterfaceRequest::new("").with(&address);
            ioctl::interface(&first, libc::SIOCSIFHWADDR, &mut set)
                .map_err(tap.failed("set the link address of"))?;
        }
        let mut asked = InterfaceRequest::new("");
        ioctl::interface(&first, libc::SIOCGIFHWADDR, &mut asked)
            .map_err(tap.failed("read the link address of"))?;
        let [_, _, mac @ ..] = asked.data::<8>();
        tap.mac = mac;
        // The MTU can be had by name only, so it has to be the same interface and not one of that name in another namespace.
        if let Some(interface) =
            Interface::new(&tap.name).ok().filter(|interface| interface.mac().ok() == Some(mac))
        {
            if let Some(mtu) = request.mtu.filter(|mtu| interface.mtu().ok() != Some(*mtu)) {
                interface.set_mtu(mtu).map_err(tap.failed("set the MTU of"))?;
            }
            tap.mtu = interface.mtu().ok();
        }
        Ok(tap)
    }

    fn failed<'a>(&'a self, what: &'static str) -> impl Fn(io::Error) -> TapError + use<'a> {
        move |source| TapError::Failed { name: self.name.clone(), what, source }
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The host's link address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// The host's link address as it is now, if nobody but the kernel has chosen it and it goes with the tap: who is to find the host
    /// at the same one later has to be told.
    pub fn fleeting_mac(&self) -> Option<[u8; 6]> {
        let interface = Interface::new(&self.name).ok().filter(|_| self.mac_by_chance)?;
        interface.mac().ok()
    }

    /// Gives a tap that has been created here, and was to have no particular link address, that of an earlier one: neighbours of the host
    /// know it. Any other tap keeps its own.
    ///
    /// # Errors
    /// The host's kernel refuses it.
    pub fn inherit_mac(&self, mac: [u8; 6]) -> Result<(), TapError> {
        if !self.mac_by_chance {
            return Ok(());
        }
        let set = Interface::new(&self.name).and_then(|interface| interface.set_mac(mac));
        set.map_err(self.failed("set the link address of"))
    }

    /// The largest packet without the link's header, if it can be known.
    pub fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    /// What the host's kernel has counted: bytes and packets to the guest, then from it. Zero for a tap of another namespace.
    pub fn statistics(&self) -> [u64; 4] {
        // What the interface sends, the guest receives.
        ["tx_bytes", "tx_packets", "rx_bytes", "rx_packets"].map(|name| {
            let text = std::fs::read_to_string(format!("/sys/class/net/{}/statistics/{name}", self.name));
            text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
        })
    }

    /// Over files that are no tap's: what is read from one is a packet with its header, and so is what is written.
    #[cfg(any(test, feature = "testing"))]
    pub fn over_files(files: Vec<File>) -> Self {
        let files = files.into_iter().map(Arc::new).collect();
        Self {
            name: "none".to_owned(),
            files,
            mac: [0; 6],
            mtu: Some(1500),
            multi_queue: false,
            mac_by_chance: false,
        }
    }

    /// One file for each pair of queues.
    pub fn files(&self) -> &[Arc<File>] {
        &self.files
    }

    /// What may be unfinished in packets that are read from it.
    ///
    /// # Errors
    /// The tap has gone.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        for file in &self.files {
            match ioctl::set_offloads(file, offloads.bits()) {
                // There were kernels that could not fragment UDP any more.
                Err(error)
                    if error.raw_os_error() == Some(libc::EINVAL) && offloads.contains(Offloads::UFO) =>
                {
                    ioctl::set_offloads(file, (offloads - Offloads::UFO).bits())?;
                }
                result => result?,
            }
        }
        Ok(())
    }

    /// Drops the packets that are waiting: what came before there was a driver is of no use to it.
    pub fn drop_waiting(&self) {
        for mut file in self.files.iter().map(Arc::as_ref) {
            // A packet is gone with the first byte of it that is read.
            for _ in 0..WAITING_MAX {
                if file.read(&mut [0]).is_err() {
                    break;
                }
            }
        }
    }

    /// Has the host send packets to the first `pairs` files only.
    ///
    /// # Errors
    /// The tap has gone.
    pub fn use_pairs(&self, pairs: usize) -> io::Result<()> {
        if !self.multi_queue || self.files.len() == 1 {
            return Ok(());
        }
        for (number, file) in self.files.iter().enumerate() {
            let attach = number < pairs;
            let flag = if attach { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
            match ioctl::interface(file, libc::TUNSETQUEUE, &mut flagged("", flag)) {
                // It is so already.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                result => result?,
            }
        }
        Ok(())
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // Descriptors of others are theirs still, and a later machine may use all of them. A tap that has gone has none.
        let _ = self.use_pairs(self.files.len());
    }
}

/// Opens the first file of a tap: with its name as the kernel completes it, and whether there can be more.
///
/// A tap that is there can only be opened as what it was created as, and the kernel gives one answer to all mistakes in that.
fn first_file(name: &str, pairs: u16, there_already: bool) -> Result<(File, String, bool), TapError> {
    let multi_queue = pairs > 1;
    let (error, other) = match attach(name, multi_queue) {
        Ok((file, actual)) => return Ok((file, actual, multi_queue)),
        Err(error) if there_already && error.is_invalid() => (error, attach(name, !multi_queue)),
        Err(error) => return Err(error),
    };
    match other {
        Ok((file, actual)) if !multi_queue => Ok((file, actual, true)),
        Err(other) if other.is_invalid() => Err(TapError::NoTap { name: name.to_owned() }),
        _ if multi_queue => Err(TapError::SingleQueue { name: name.to_owned(), pairs }),
        Err(other) => Err(other),
        Ok(_) => Err(error),
    }
}

/// A request with flags as its data.
fn flagged(name: &str, flags: libc::c_int) -> InterfaceRequest {
    // The kernel's field is 16 bits wide.
    let [low, high, ..] = flags.to_le_bytes();
    InterfaceRequest::new(name).with(&u16::from_le_bytes([low, high]).to_ne_bytes())
}

fn set_attachment(file: &impl AsFd, name: &str, flags: libc::c_int) -> io::Result<String> {
    let mut request = flagged(name, flags);
    ioctl::interface(file, libc::TUNSETIFF, &mut request)?;
    Ok(request.name())
}

/// The name and flags of the tap that a file belongs to.
fn attachment(file: &impl AsFd) -> io::Result<(String, libc::c_int)> {
    let mut request = InterfaceRequest::new("");
    ioctl::interface(file, libc::TUNGETIFF, &mut request)?;
    Ok((request.name(), u16::from_ne_bytes(request.data()).into()))
}

fn attach(name: &str, multi_queue: bool) -> Result<(File, String), TapError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(TUN)
        .map_err(|source| TapError::Driver { source })?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let found = set_attachment(&file, name, flags)
        .map_err(|source| TapError::Attach { name: name.to_owned(), source })?;
    Ok((file, found))
}

fn set_header(file: &impl AsFd) -> io::Result<()> {
    ioctl::set_header_size(file, libc::c_int::try_from(HEADER_LEN).unwrap_or(12))
}
