//! The network device as its transport sees it: features, configuration, activation.

use std::io;
use std::sync::Arc;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use log::{debug, info};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};

use super::control::{Control, Workers as WorkersMover};
use super::pair::{PairSpec, QueuePair};
use super::shared::Shared;
use super::tap::{Offloads, Tap};
use super::vhost::{Vhost, VhostError};
use crate::rate_limit::{Limiter, RateLimit};
use crate::virtio::device::{Activation, Active, DeviceError, DeviceType, F_RINGS, Saved, VirtioDevice};
use crate::virtio::worker::{Worker, Workers};

/// Descriptors of the control queue.
const CONTROL_SIZE: u16 = 64;

const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// Features of the driver's that are offloads, with the tap's for each.
const OFFLOADS: [(u64, Offloads); 5] = [
    (bit(VIRTIO_NET_F_GUEST_CSUM), Offloads::CSUM),
    (bit(VIRTIO_NET_F_GUEST_TSO4), Offloads::TSO4),
    (bit(VIRTIO_NET_F_GUEST_TSO6), Offloads::TSO6),
    (bit(VIRTIO_NET_F_GUEST_ECN), Offloads::ECN),
    (bit(VIRTIO_NET_F_GUEST_UFO), Offloads::UFO),
];

/// What the tap may leave unfinished for a driver with these features. Nothing can be left without the checksum.
pub(super) fn offloads_of(features: u64) -> Offloads {
    let all = OFFLOADS.iter().filter(|(feature, _)| features & feature != 0);
    let offloads = all.fold(Offloads::empty(), |sum, (_, offload)| sum | *offload);
    if offloads.contains(Offloads::CSUM) { offloads } else { Offloads::empty() }
}

/// Features that were negotiated.
#[derive(Clone, Copy, Debug)]
pub struct Features(pub u64);

impl Features {
    fn has(self, feature: u32) -> bool {
        self.0 & bit(feature) != 0
    }

    /// Whether there can be more than one pair of queues.
    pub fn has_many_queues(self) -> bool {
        self.has(VIRTIO_NET_F_MQ)
    }

    /// Whether offloads can change.
    pub fn has_changing_offloads(self) -> bool {
        self.has(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
    }

    /// Those that are offloads of the driver's.
    pub fn guest_offloads(self) -> u64 {
        OFFLOADS.iter().fold(0, |sum, (feature, _)| sum | (self.0 & feature))
    }
}

/// What of the work the guest may be spared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OffloadChoice {
    /// Segmentation of TCP.
    pub tso: bool,
    /// Fragmentation of UDP.
    pub ufo: bool,
    /// Checksums.
    pub csum: bool,
}

/// Who moves the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VhostUse {
    /// This process.
    Never,
    /// The host's kernel, and it is an error if it does not.
    Always,
    /// The host's kernel if it does.
    IfPossible,
}

/// What a network device is to be.
#[derive(Clone, Debug)]
pub struct NetSpec {
    /// What the operator calls it: the threads are named after it.
    pub name: String,
    /// The guest's link address.
    pub mac: [u8; 6],
    /// Descriptors of each queue for packets.
    pub queue_size: u16,
    /// What of the work the guest may be spared.
    pub offloads: OffloadChoice,
    /// Limits of each way.
    pub limit: RateLimit,
    /// Who moves the packets.
    pub vhost: VhostUse,
}

/// The device.
#[derive(Debug)]
pub struct Net {
    spec: NetSpec,
    tap: Arc<Tap>,
    pairs: u16,
    features: u64,
    shared: Arc<Shared>,
    limiters: [Option<Arc<Limiter>>; 2],
    vhost: Option<Vhost>,
    /// What a driver elsewhere has settled, until the device is activated here.
    restored: Mutex<Option<Settled>>,
}

/// What is saved: what the driver has settled with the device and knows of.
#[derive(Debug, Serialize, Deserialize)]
struct Settled {
    pairs: u16,
    offloads: u32,
    /// The host's link address, which the guest knows, if there is nothing else that keeps it.
    #[serde(default)]
    host_mac: Option<[u8; 6]>,
}

impl Net {
    /// Over `tap`, with a pair of queues for each of its files.
    ///
    /// # Errors
    /// The host's kernel is to move the packets and does not.
    pub fn new(spec: NetSpec, tap: Tap) -> Result<Self, VhostError> {
        let pairs = u16::try_from(tap.files().len()).unwrap_or(u16::MAX);
        let now = Instant::now();
        let limiters = [(); 2].map(|()| Limiter::new(&spec.limit, now).map(Arc::new));
        let vhost = match spec.vhost {
            VhostUse::Never => None,
            VhostUse::Always => Some(Vhost::open()?),
            VhostUse::IfPossible if limiters[0].is_some() => None,
            VhostUse::IfPossible => match Vhost::open() {
                Ok(vhost) => Some(vhost),
                Err(e) => {
                    info!("{}: the VMM moves the packets itself: {e}", spec.name);
                    None
                }
            },
        };
        let mut net = Self {
            pairs,
            features: 0,
            shared: Arc::new(Shared::new(&tap)),
            tap: Arc::new(tap),
            limiters,
            vhost,
            restored: Mutex::new(None),
            spec,
        };
        net.features = net.offered();
        Ok(net)
    }

    fn offered(&self) -> u64 {
        let mut features = F_RINGS
            | bit(VIRTIO_NET_F_MAC)
            | bit(VIRTIO_NET_F_STATUS)
            | bit(VIRTIO_NET_F_MRG_RXBUF)
            | bit(VIRTIO_NET_F_CTRL_VQ)
            | bit(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS);
        let mut add = |list: &[u32]| list.iter().for_each(|feature| features |= bit(*feature));
        if self.tap.mtu().is_some() {
            add(&[VIRTIO_NET_F_MTU]);
        }
        if self.pairs > 1 {
            add(&[VIRTIO_NET_F_MQ]);
        }
        let OffloadChoice { tso, ufo, csum } = self.spec.offloads;
        if csum {
            add(&[VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM]);
        }
        if csum && tso {
            add(&[VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN]);
            add(&[VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_ECN]);
        }
        if csum && ufo {
            add(&[VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_GUEST_UFO]);
        }
        match &self.vhost {
            Some(vhost) => vhost.restrict(features),
            None => features,
        }
    }

    /// The tap.
    pub fn tap(&self) -> &Tap {
        &self.tap
    }

    /// Number of the control queue: behind all others that the driver knows of.
    fn control_index(&self, features: Features) -> u16 {
        if features.has_many_queues() { self.pairs.saturating_mul(2) } else { 2 }
    }

    /// Settles with the tap what the driver has settled with us.
    fn prepare_tap(&self, features: Features) -> io::Result<()> {
        let restored = self.restored.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (offloads, pairs) = match restored {
            Some(Settled { offloads, pairs, .. }) => (Offloads::from_bits_truncate(offloads), pairs),
            None => (offloads_of(features.0), 1),
        };
        self.shared.set_offloads(offloads);
        self.shared.set_pairs(pairs);
        let settled = self.tap.set_offloads(offloads).and_then(|()| self.tap.use_pairs(pairs.into()));
        self.tap.drop_waiting();
        settled
    }
}

/// The name of a thread of the device `name`. What tells them apart is at the end, where the kernel would cut a long name.
pub(super) fn thread_name(name: &str, suffix: &str) -> String {
    let room = 15_usize.saturating_sub(suffix.len());
    name.chars().take(room).chain(suffix.chars()).collect()
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::NET
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![self.spec.queue_size; 2 * usize::from(self.pairs)];
        sizes.push(CONTROL_SIZE);
        sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.spec.mac);
        let [link, _, _, _] = VIRTIO_NET_S_LINK_UP.to_le_bytes();
        config[6] = if self.shared.has_link() { link } else { 0 };
        config[8..10].copy_from_slice(&self.pairs.to_le_bytes());
        config[10..].copy_from_slice(&self.tap.mtu().unwrap_or(0).to_le_bytes());
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(config.get(offset..).unwrap_or_default()) {
            *to = *from;
        }
    }

    fn activate(&self, mut activation: Activation) -> Result<Box<dyn Active>, DeviceError> {
        let features = Features(activation.features);
        if let Err(e) = self.prepare_tap(features) {
            // It has gone, as it may at any time later.
            if e.raw_os_error() == Some(libc::EBADFD) {
                self.shared.cut_link();
            }
            debug!("{}: the tap {}: {e}", self.spec.name, self.tap.name());
        }
        let control_queue = activation.take_queue(self.control_index(features)).ok();
        let pairs = if features.has_many_queues() { self.pairs } else { 1 };
        let mut queues = Vec::new();
        for number in 0..pairs {
            match (activation.take_queue(2 * number), activation.take_queue(2 * number + 1)) {
                (Ok(receive), Ok(send)) => queues.push((number, receive, send)),
                // A driver need not use them all, but the first.
                (Err(e), _) | (_, Err(e)) if number == 0 => return Err(e),
                _ => break,
            }
        }
        let interrupt = activation.interrupt;
        let pairs_max = u16::try_from(queues.len()).unwrap_or(u16::MAX);
        let control = Control {
            broken: Vec::new(),
            device: self.spec.name.clone(),
            queue: control_queue,
            interrupt: Arc::clone(&interrupt),
            features,
            pairs_max,
            tap: Arc::clone(&self.tap),
            shared: Arc::clone(&self.shared),
            mover: Box::new(WorkersMover {
                shared: Arc::clone(&self.shared),
                tap: Arc::clone(&self.tap),
                doorbells: queues.iter().map(|(_, receive, _)| Arc::clone(receive.kick())).collect(),
            }),
        };
        if let Some(vhost) = &self.vhost {
            return vhost.activate(queues, control);
        }
        let mergeable = features.has(VIRTIO_NET_F_MRG_RXBUF);
        let mut workers = Vec::new();
        for ((number, receive, send), file) in queues.into_iter().zip(self.tap.files()) {
            let spec = PairSpec {
                number,
                device: self.spec.name.clone(),
                file: Arc::clone(file),
                receive,
                send,
                limiters: self.limiters.clone(),
                mergeable,
            };
            let pair = QueuePair::new(spec, &self.shared)?;
            workers.push(Worker::start(
                &thread_name(&self.spec.name, &format!("_qp{number}")),
                Box::new(pair),
                Arc::clone(&interrupt),
            )?);
        }
        if control.queue.is_some() {
            workers.push(control.start()?);
        }
        Ok(Box::new(Workers(workers)))
    }

    fn memory_changed(&self) {
        if let Some(vhost) = &self.vhost {
            vhost.memory_changed();
        }
    }

    fn save(&self) -> Result<Saved, String> {
        let settled = Settled {
            pairs: self.shared.pairs(),
            offloads: self.shared.offloads().bits(),
            host_mac: self.tap.fleeting_mac(),
        };
        serde_json::to_value(settled).map_err(|e| e.to_string())
    }

    fn restore(&self, saved: &Saved) -> Result<(), String> {
        let settled: Settled = serde_json::from_value(saved.clone()).map_err(|e| e.to_string())?;
        if settled.pairs == 0 || settled.pairs > self.pairs {
            return Err(format!(
                "{} pairs of queues were in use, and there are {}",
                settled.pairs, self.pairs
            ));
        }
        if let Some(mac) = settled.host_mac {
            self.tap.inherit_mac(mac).map_err(|e| e.to_string())?;
        }
        *self.restored.lock().unwrap_or_else(PoisonError::into_inner) = Some(settled);
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let [rx_bytes, rx_frames, tx_bytes, tx_frames] = match &self.vhost {
            Some(_) => self.tap.statistics(),
            None => {
                let ((rx_bytes, rx_frames), (tx_bytes, tx_frames)) =
                    (self.shared.received.get(), self.shared.sent.get());
                [rx_bytes, rx_frames, tx_bytes, tx_frames]
            }
        };
        vec![
            ("rx_bytes", rx_bytes),
            ("rx_frames", rx_frames),
            ("tx_bytes", tx_bytes),
            ("tx_frames", tx_frames),
        ]
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
