//! What is set on the host's side of a tap: link, addresses, MTU (netdevice(7)).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::ioctl::{self, InterfaceRequest, Ipv6Request};

/// The kernel's fields for these are 16 bits wide.
const IFF_UP: u16 = 1;
const AF_INET: u16 = 2;
const _: () = assert!(libc::IFF_UP == 1 && libc::AF_INET == 2);

/// A network interface of the host, in the network namespace that this process is in.
#[derive(Debug)]
pub struct Interface {
    name: String,
    socket: OwnedFd,
}

fn socket(family: AddressFamily) -> io::Result<OwnedFd> {
    Ok(socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

impl Interface {
    /// The interface of this name, whether or not there is one.
    pub fn new(name: &str) -> io::Result<Self> {
        Ok(Self { name: name.to_owned(), socket: socket(AddressFamily::INET)? })
    }

    fn ask(&self, number: libc::c_ulong, data: &[u8]) -> io::Result<InterfaceRequest> {
        let mut request = InterfaceRequest::new(&self.name).with(data);
        ioctl::interface(&self.socket, number, &mut request)?;
        Ok(request)
    }

    /// Its number; an error if there is no such interface.
    pub fn index(&self) -> io::Result<u32> {
        Ok(u32::from_ne_bytes(self.ask(libc::SIOCGIFINDEX, &[])?.data()))
    }

    /// Brings the link up.
    pub fn set_up(&self) -> io::Result<()> {
        let flags = u16::from_ne_bytes(self.ask(libc::SIOCGIFFLAGS, &[])?.data());
        let up = flags | IFF_UP;
        if up == flags {
            return Ok(());
        }
        self.ask(libc::SIOCSIFFLAGS, &up.to_ne_bytes()).map(drop)
    }

    /// Largest packet without the link's header.
    pub fn mtu(&self) -> io::Result<u16> {
        let mtu = i32::from_ne_bytes(self.ask(libc::SIOCGIFMTU, &[])?.data());
        Ok(mtu.clamp(0, u16::MAX.into()).try_into().unwrap_or(u16::MAX))
    }

    /// Sets that.
    pub fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        self.ask(libc::SIOCSIFMTU, &i32::from(mtu).to_ne_bytes()).map(drop)
    }

    /// The link's address.
    pub fn mac(&self) -> io::Result<[u8; 6]> {
        let [_, _, mac @ ..] = self.ask(libc::SIOCGIFHWADDR, &[])?.data::<8>();
        Ok(mac)
    }

    /// Sets that.
    pub fn set_mac(&self, mac: [u8; 6]) -> io::Result<()> {
        let mut address = [0; 8];
        address[..2].copy_from_slice(&libc::ARPHRD_ETHER.to_ne_bytes());
        address[2..].copy_from_slice(&mac);
        self.ask(libc::SIOCSIFHWADDR, &address).map(drop)
    }

    /// Gives it an address, and the network around that.
    pub fn set_ip(&self, ip: IpAddr, mask: Option<IpAddr>) -> io::Result<()> {
        match (ip, mask) {
            (IpAddr::V4(ip), None) => self.set_ipv4(libc::SIOCSIFADDR, ip),
            (IpAddr::V4(ip), Some(IpAddr::V4(mask))) => {
                self.set_ipv4(libc::SIOCSIFADDR, ip)?;
                self.set_ipv4(libc::SIOCSIFNETMASK, mask)
            }
            (IpAddr::V6(ip), None) => self.add_ipv6(ip, Ipv6Addr::from_bits(u128::MAX)),
            (IpAddr::V6(ip), Some(IpAddr::V6(mask))) => self.add_ipv6(ip, mask),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn set_ipv4(&self, number: libc::c_ulong, ip: Ipv4Addr) -> io::Result<()> {
        // A `struct sockaddr_in`: family, port, address.
        let mut address = [0; 8];
        address[..2].copy_from_slice(&AF_INET.to_ne_bytes());
        address[4..].copy_from_slice(&ip.octets());
        self.ask(number, &address).map(drop)
    }

    fn add_ipv6(&self, ip: Ipv6Addr, mask: Ipv6Addr) -> io::Result<()> {
        let request =
            Ipv6Request { address: ip.octets(), prefix: mask.to_bits().leading_ones(), index: self.index()? };
        match ioctl::add_ipv6(&socket(AddressFamily::INET6)?, &request) {
            // It has this address already.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result,
        }
    }
}
