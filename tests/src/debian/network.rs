//! The other end of a guest's network: a tap of the emulated host with a DHCP server and an iperf3 server behind it.

use std::time::Duration;

use crate::error::{Error, Result};
use crate::guest::Guest;
use crate::host::Host;
use crate::rpc::wait_for;

/// The tap's name.
pub const TAP: &str = "bed0";
/// The host's address on it.
pub const HOST: &str = "192.168.77.1";
/// What the guest's address begins with.
const PREFIX: &str = "192.168.77.";
/// How long the guest may take to get an address.
const LEASE: Duration = Duration::from_secs(60);

/// A tap with servers. Dropping it takes all away.
#[derive(Debug)]
pub struct Network<'h> {
    host: &'h Host,
}

impl<'h> Network<'h> {
    /// Makes it.
    pub fn new(host: &'h Host) -> Result<Self> {
        let network = Self { host };
        network.clear()?;
        host.sh(&format!(
            "debian ip tuntap add {TAP} mode tap && ip addr add {HOST}/24 dev {TAP} && ip link set {TAP} up"
        ))?;
        // Leases are written to the file when they are given.
        host.sh(&format!(
            "printf 'interface {TAP}\\nstart {PREFIX}20\\nend {PREFIX}29\\nlease_file /run/bed.leases\\n\
             option subnet 255.255.255.0\\noption router {HOST}\\nauto_time 1\\n' >/run/bed.dhcp; : >/run/bed.leases; \
             (udhcpd -f /run/bed.dhcp & echo $! >/run/bed.dhcp.pid) </dev/null >/run/bed.dhcp.log 2>&1; \
             (iperf3 --server & echo $! >/run/bed.iperf.pid) </dev/null >/run/bed.iperf.log 2>&1"
        ))?;
        Ok(network)
    }

    /// The address that the DHCP server has given the guest, once the guest has it on an interface and reaches the host.
    pub fn address(&self, guest: &Guest<'_>) -> Result<String> {
        let address = wait_for("the guest gets an address by DHCP", LEASE, || {
            let text = guest.probe("ip -color=never -4 -o addr show scope global dynamic")?.text;
            let words = text.split_whitespace().map(|word| word.split('/').next().unwrap_or(word));
            let found = words.map(str::to_owned).find(|word| word.starts_with(PREFIX));
            Ok(found.ok_or(text))
        })?;
        let leases = self.host.sh("dumpleases -f /run/bed.leases")?;
        if !leases.contains(&address) {
            return Err(Error::Check(format!("{address} is none of the server's leases: {leases}")));
        }
        guest.sh(&format!("ping -c 3 -W 5 {HOST}"))?;
        Ok(address)
    }

    fn clear(&self) -> Result<()> {
        self.host
            .sh(&format!(
                "for pid in $(cat /run/bed.dhcp.pid /run/bed.iperf.pid 2>/dev/null); do kill $pid; done; \
                 rm -f /run/bed.*; [ ! -e /sys/class/net/{TAP} ] || debian ip link del {TAP}"
            ))
            .map(drop)
    }
}

impl Drop for Network<'_> {
    fn drop(&mut self) {
        let _ = self.clear();
    }
}
