//! A network interface (VIRTIO 1.2, section 5.1) behind a backend: a switch in user space, or passt.

use std::path::PathBuf;

use super::device::{ConfigSource, Description, VhostUser};
use super::error::VhostUserError;
use super::peer::Mode;
use crate::virtio::device::{DeviceType, F_RINGS};

const F_CSUM: u64 = 1;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
/// GUEST_TSO4, GUEST_TSO6, GUEST_ECN; HOST_TSO4, HOST_TSO6, HOST_ECN.
const F_TSO: u64 = 7 << 7 | 7 << 11;
/// GUEST_UFO, HOST_UFO.
const F_UFO: u64 = 1 << 10 | 1 << 14;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_CTRL_VQ: u64 = 1 << 17;
/// VIRTIO_NET_F_MQ.
pub(super) const F_MQ: u64 = 1 << 22;
const CONTROL_QUEUE_SIZE: u16 = 64;

/// What the operator wants of the interface.
#[derive(Clone, Debug)]
pub struct NetSettings {
    /// The socket.
    pub socket: PathBuf,
    /// Who listens there.
    pub mode: Mode,
    /// The guest's link address.
    pub mac: [u8; 6],
    /// Largest packet, if it is to be told.
    pub mtu: Option<u16>,
    /// Queues for packets, two for each pair.
    pub num_queues: u16,
    /// Descriptors of each.
    pub queue_size: u16,
    /// Whether segments of TCP may be put together.
    pub tso: bool,
    /// Whether fragments of UDP may be put together.
    pub ufo: bool,
    /// Whether checksums may be left out.
    pub csum: bool,
}

/// A network interface.
///
/// # Errors
/// See [`VhostUserError`].
pub fn new(name: &str, settings: &NetSettings) -> Result<VhostUser, VhostUserError> {
    let NetSettings { num_queues, queue_size, .. } = *settings;
    let pairs = num_queues / 2;
    let rings = usize::from(pairs) * 2;
    let several = pairs > 1;
    let mut passed = F_RINGS | F_MRG_RXBUF;
    for (wanted, bits) in [
        (settings.csum, F_CSUM | F_GUEST_CSUM),
        (settings.tso && settings.csum, F_TSO),
        (settings.ufo && settings.csum, F_UFO),
        (several, F_MQ),
    ] {
        passed |= if wanted { bits } else { 0 };
    }
    let mut queue_sizes = vec![queue_size; rings];
    let (mut own, mtu) = (F_MAC, settings.mtu.unwrap_or(0));
    if several {
        own |= F_CTRL_VQ;
        queue_sizes.push(CONTROL_QUEUE_SIZE);
    }
    if settings.mtu.is_some() {
        own |= F_MTU;
    }
    // Address, status (not offered), pairs, MTU.
    let config = [&settings.mac[..], &[0, 0], &pairs.to_le_bytes(), &mtu.to_le_bytes()].concat();
    VhostUser::new(Description {
        name: name.to_owned(),
        device_type: DeviceType::NET,
        queue_sizes,
        rings: Some(rings),
        certain_queues: 2,
        socket: settings.socket.clone(),
        mode: settings.mode,
        passed,
        own,
        config: ConfigSource::Own(config),
        resumes: true,
        control_queue: several,
    })
}
