//! A network device: the host's tap behind it, and what the guest sees of it (Cloud Hypervisor's `NetConfig` and `--net`).

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use devices::net::tap::MAX_PAIRS;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::descriptors::Descriptors;
use super::option_parser::{IntegerList, Key, OptionError, OptionValue, Options};
use super::pci_common::PciCommon;
use super::rate_limit::RateLimiterConfig;
use super::{ConfigError, VhostUserConfigError, VmConfig, is_default};

/// Smallest packet that IPv6 works with, and so the smallest MTU (Cloud Hypervisor's rule).
const MIN_MTU: u16 = 1280;

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Name and place.
    #[serde(flatten)]
    pub pci: PciCommon,
    /// The tap; a new one if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Address of the host on a tap that is created.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// Mask of the network around that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mask: Option<IpAddr>,
    /// The guest's link address; chosen once, if nobody gives one.
    #[serde(default = "MacAddress::random")]
    pub mac: MacAddress,
    /// The host's link address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_mac: Option<MacAddress>,
    /// Largest packet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Queues for packets: two for each pair.
    #[serde(default = "default_num_queues")]
    pub num_queues: usize,
    /// Descriptors of each queue.
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
    /// Whether another process is behind it.
    #[serde(default)]
    pub vhost_user: bool,
    /// The socket of that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<String>,
    /// Who listens at the socket.
    #[serde(default)]
    pub vhost_mode: VhostMode,
    /// An open tap instead of a name: one descriptor for each pair of queues.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fds: Option<Descriptors>,
    /// How much may pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// Whether segments of TCP may be put together.
    #[serde(default = "super::default_true")]
    pub offload_tso: bool,
    /// Whether fragments of UDP may be put together.
    #[serde(default = "super::default_true")]
    pub offload_ufo: bool,
    /// Whether checksums may be left out.
    #[serde(default = "super::default_true")]
    pub offload_csum: bool,
    /// Whether the host's kernel moves the packets (vhost-net); Dormouse's own.
    #[serde(default, skip_serializing_if = "is_default")]
    pub vhost: VhostChoice,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            pci: PciCommon::default(),
            tap: None,
            ip: None,
            mask: None,
            mac: MacAddress::random(),
            host_mac: None,
            mtu: None,
            num_queues: default_num_queues(),
            queue_size: default_queue_size(),
            vhost_user: false,
            vhost_socket: None,
            vhost_mode: VhostMode::default(),
            fds: None,
            rate_limiter_config: None,
            offload_tso: true,
            offload_ufo: true,
            offload_csum: true,
            vhost: VhostChoice::default(),
        }
    }
}

fn default_num_queues() -> usize {
    2
}

fn default_queue_size() -> u16 {
    256
}

/// Who listens at the socket of a vhost-user device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum VhostMode {
    /// The other process.
    #[default]
    Client,
    /// The VMM.
    Server,
}

/// Whether the host's kernel moves the packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum VhostChoice {
    /// The VMM does.
    #[default]
    Off,
    /// The kernel does.
    On,
    /// The kernel does, if it can.
    Auto,
}

/// A link address (EUI-48).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// One of one's own making: locally administered, and of one station.
    pub fn random() -> Self {
        let mut bytes = [0; 6];
        // Fails on kernels before 3.17 only; then the address is a fixed one, and still a valid one.
        let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
        bytes[0] = bytes[0] & !1 | 2;
        Self(bytes)
    }

    fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        <Self as OptionValue>::parse(text)
            .ok_or_else(|| format!("'{text}' is no link address; write it as 12:34:56:78:9a:bc"))
    }
}

impl TryFrom<String> for MacAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl OptionValue for MacAddress {
    const EXPECTED: &'static str = "a link address such as 12:34:56:78:9a:bc";

    fn parse(text: &str) -> Option<Self> {
        let byte = |part: &str| {
            let digits = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
            u8::from_str_radix(part, 16).ok().filter(|_| digits)
        };
        let bytes: Vec<u8> = text.split(':').map(byte).collect::<Option<_>>()?;
        Some(Self(bytes.try_into().ok()?))
    }
}

impl OptionValue for IpAddr {
    const EXPECTED: &'static str = "an address such as 192.168.1.1 or fd00::1";

    fn parse(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

impl OptionValue for VhostMode {
    const EXPECTED: &'static str = "client or server";

    fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "client" => Some(Self::Client),
            "server" => Some(Self::Server),
            _ => None,
        }
    }
}

impl OptionValue for VhostChoice {
    const EXPECTED: &'static str = "on, off or auto";

    fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "off" => Some(Self::Off),
            "on" => Some(Self::On),
            "auto" => Some(Self::Auto),
            _ => None,
        }
    }
}

/// A network device that makes no sense.
#[derive(Debug, Error)]
pub enum NetError {
    /// Queues that are no pairs.
    #[error("--net num_queues={queues} is not possible; a device has a pair of queues or several: 2, 4, 6, ..., {}", 2 * MAX_PAIRS)]
    Queues {
        /// How many.
        queues: usize,
    },
    /// More pairs than processors.
    #[error("--net num_queues={queues}: {} pairs of queues are more than the machine has vCPUs ({vcpus}); one for each is enough", queues / 2)]
    MorePairsThanVcpus {
        /// Queues.
        queues: usize,
        /// vCPUs.
        vcpus: u32,
    },
    /// Pairs and descriptors that are not the same number.
    #[error("--net fd: {fds} descriptors are not one for each pair of queues; with them, num_queues must be {}, and is {queues}", 2 * fds)]
    DescriptorCount {
        /// Descriptors.
        fds: usize,
        /// Queues.
        queues: usize,
    },
    /// Descriptors that are none.
    #[error(
        "--net fd={fd} is no tap: 0, 1 and 2 are standard input, output and error; open the tap as another one, or send it with vm.add-net"
    )]
    ReservedDescriptor {
        /// Its number.
        fd: i32,
    },
    /// A size that a queue cannot have.
    #[error("--net queue_size={size} is not possible; use a power of two from 2 to 32768")]
    QueueSize {
        /// The size.
        size: u16,
    },
    /// Too small packets.
    #[error("--net mtu={mtu} is too small; use at least {MIN_MTU}")]
    Mtu {
        /// The MTU.
        mtu: u16,
    },
    /// What needs checksums to be left out.
    #[error(
        "--net offload_csum=off: segments without checksums cannot be put together; write offload_tso=off,offload_ufo=off too"
    )]
    Checksums,
    /// An address that is of many stations.
    #[error("--net {key}={mac} is the address of a group; the first byte must be even")]
    GroupAddress {
        /// Which key.
        key: &'static str,
        /// The address.
        mac: MacAddress,
    },
    /// A mask that does not go with its address.
    #[error("--net mask={mask} does not go with ip={}; give both as IPv4, or both as IPv6", ip.map_or_else(|| "(none)".to_owned(), |ip| ip.to_string()))]
    Mask {
        /// The mask.
        mask: IpAddr,
        /// The address.
        ip: Option<IpAddr>,
    },
    /// What only the VMM can do.
    #[error("--net vhost=on: the kernel limits no rates; leave out bw_size and ops_size, or write vhost=off")]
    LimitedVhost,
}

impl NetConfig {
    /// From one value of `--net`.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        const KEYS: &[Key] = &[
            Key::Value("tap"),
            Key::Value("ip"),
            Key::Value("mask"),
            Key::Value("mac"),
            Key::Value("host_mac"),
            Key::Value("mtu"),
            Key::Value("fd"),
            Key::Value("num_queues"),
            Key::Value("queue_size"),
            Key::Value("vhost_user"),
            Key::Value("socket"),
            Key::Value("vhost_mode"),
            Key::Value("bw_size"),
            Key::Value("bw_one_time_burst"),
            Key::Value("bw_refill_time"),
            Key::Value("ops_size"),
            Key::Value("ops_one_time_burst"),
            Key::Value("ops_refill_time"),
            Key::Value("offload_tso"),
            Key::Value("offload_ufo"),
            Key::Value("offload_csum"),
            Key::Value("vhost"),
        ];
        let options = Options::parse("--net", text, &[KEYS, &PciCommon::KEYS[..]].concat())?;
        let default = Self::default();
        let fds = options.get::<Numbers>("fd")?.map(|Numbers(numbers)| Descriptors::of_numbers(numbers));
        Ok(Self {
            pci: PciCommon::from_options(&options)?,
            tap: options.get("tap")?,
            ip: options.get("ip")?,
            mask: options.get("mask")?,
            mac: options.get("mac")?.unwrap_or(default.mac),
            host_mac: options.get("host_mac")?,
            mtu: options.get("mtu")?,
            num_queues: options.get::<u16>("num_queues")?.map_or(default.num_queues, usize::from),
            queue_size: options.get("queue_size")?.unwrap_or(default.queue_size),
            vhost_user: options.toggle("vhost_user", false)?,
            vhost_socket: options.get("socket")?,
            vhost_mode: options.get_or_default("vhost_mode")?,
            fds,
            rate_limiter_config: RateLimiterConfig::from_options(&options)?,
            offload_tso: options.toggle("offload_tso", true)?,
            offload_ufo: options.toggle("offload_ufo", true)?,
            offload_csum: options.toggle("offload_csum", true)?,
            vhost: options.get_or_default("vhost")?,
        })
    }

    /// Pairs of queues.
    pub fn pairs(&self) -> u16 {
        u16::try_from(self.num_queues / 2).unwrap_or(u16::MAX)
    }

    /// Checks what can be checked without the host. `vcpus` is the most that the machine can have.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self, vcpus: u32) -> Result<(), ConfigError> {
        if self.vhost_user && self.vhost_socket.is_none() {
            return Err(VhostUserConfigError::NoSocket { option: "--net vhost_user=on" }.into());
        }
        Ok(self.check(vcpus)?)
    }

    fn check(&self, vcpus: u32) -> Result<(), NetError> {
        let queues = self.num_queues;
        if queues < 2 || !queues.is_multiple_of(2) || self.pairs() > MAX_PAIRS {
            return Err(NetError::Queues { queues });
        }
        if let Some(fds) = &self.fds {
            if 2 * fds.len() != queues {
                return Err(NetError::DescriptorCount { fds: fds.len(), queues });
            }
            if let Some(fd) = fds.reserved() {
                return Err(NetError::ReservedDescriptor { fd });
            }
        }
        if u32::from(self.pairs()) > vcpus {
            return Err(NetError::MorePairsThanVcpus { queues, vcpus });
        }
        if !self.queue_size.is_power_of_two() || self.queue_size < 2 {
            return Err(NetError::QueueSize { size: self.queue_size });
        }
        if let Some(mtu) = self.mtu.filter(|mtu| *mtu < MIN_MTU) {
            return Err(NetError::Mtu { mtu });
        }
        if !self.offload_csum && (self.offload_tso || self.offload_ufo) {
            return Err(NetError::Checksums);
        }
        for (key, mac) in [("mac", Some(self.mac)), ("host_mac", self.host_mac)] {
            if let Some(mac) = mac.filter(|mac| mac.is_multicast()) {
                return Err(NetError::GroupAddress { key, mac });
            }
        }
        if let Some(mask) = self.mask
            && self.ip.is_none_or(|ip| ip.is_ipv4() != mask.is_ipv4())
        {
            return Err(NetError::Mask { mask, ip: self.ip });
        }
        if self.vhost == VhostChoice::On && self.rate_limiter_config.as_ref().is_some_and(|c| c.limits()) {
            return Err(NetError::LimitedVhost);
        }
        Ok(())
    }
}

impl VmConfig {
    /// Checks all network devices.
    pub(super) fn validate_net(&self) -> Result<(), ConfigError> {
        let vcpus = self.cpus.boot_vcpus.max(self.cpus.max_vcpus);
        self.net.iter().flatten().try_for_each(|net| net.validate(vcpus))
    }
}

/// Numbers of descriptors.
struct Numbers(Vec<i32>);

impl OptionValue for Numbers {
    const EXPECTED: &'static str = "a list of open file descriptors such as [3,4]";

    fn parse(text: &str) -> Option<Self> {
        IntegerList::parse(text)?.0.into_iter().map(|n| n.try_into().ok()).collect::<Option<_>>().map(Self)
    }
}

#[cfg(test)]
mod tests;
