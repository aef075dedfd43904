//! One connection to a backend: what was negotiated, the memory it was shown, its rings.
//!
//! Every call waits for the backend. Only the keeper calls, and cuts the connection when it takes too long.

use std::fmt;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::config_space;
use super::error::VhostUserError;
use super::notices::Notices;
use crate::virtio::device::{F_RING_PACKED, F_VERSION_1};
use crate::virtio::queue::ActiveQueue;
use crate::virtio::ring::{RingPosition, load_index};

const PROTOCOL: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// Parts of memory in a table, of a backend that takes no single ones.
const TABLE_MAX: u64 = 8;
/// Bit 15 of a packed ring's position: the wrap counter.
const WRAP: u16 = 1 << 15;

/// A connection.
pub(super) struct Link {
    frontend: Frontend,
    stream: UnixStream,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    notices: Option<Notices>,
    slots: u64,
    regions: Vec<VhostUserMemoryRegionInfo>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { features, protocol, slots, .. } = self;
        write!(f, "Link(features {features:#x}, protocol {protocol:?}, {slots} slots)")
    }
}

impl Link {
    /// Negotiates over `stream`. `certain` is how many queues every backend of the kind has.
    pub(super) fn new(stream: UnixStream, queues: usize, certain: usize) -> Result<Self, VhostUserError> {
        use VhostUserError as E;
        let line = stream.try_clone().map_err(E::host("another descriptor of a socket"))?;
        let mut frontend = Frontend::from_stream(line, queues as u64);
        frontend.set_owner().map_err(E::request("SET_OWNER"))?;
        let features = frontend.get_features().map_err(E::request("GET_FEATURES"))?;
        if features & F_VERSION_1 == 0 {
            return Err(E::Lacks("VIRTIO_F_VERSION_1"));
        }
        let mut protocol = VhostUserProtocolFeatures::empty();
        if features & PROTOCOL != 0 {
            let there = frontend.get_protocol_features().map_err(E::request("GET_PROTOCOL_FEATURES"))?;
            protocol = there & wanted();
            // A channel for notices is of use only if the configuration can be read.
            if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
                protocol.remove(VhostUserProtocolFeatures::BACKEND_REQ);
            }
            frontend.set_protocol_features(protocol).map_err(E::request("SET_PROTOCOL_FEATURES"))?;
        }
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if queues > certain {
            if !protocol.contains(VhostUserProtocolFeatures::MQ) {
                return Err(E::Queues { there: certain as u64, wanted: queues });
            }
            let there = frontend.get_queue_num().map_err(E::request("GET_QUEUE_NUM"))?;
            if there < queues as u64 {
                return Err(E::Queues { there, wanted: queues });
            }
        }
        let mut slots = TABLE_MAX;
        if protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            slots = frontend.get_max_mem_slots().map_err(E::request("GET_MAX_MEM_SLOTS"))?;
        }
        let mut notices = None;
        if protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            let (here, there) = Notices::new().map_err(E::host("a channel for the backend's notices"))?;
            frontend.set_backend_request_fd(&there).map_err(E::request("SET_BACKEND_REQ_FD"))?;
            notices = Some(here);
        }
        Ok(Self { frontend, stream, features, protocol, notices, slots, regions: Vec::new() })
    }

    /// What the backend offers, with bits of the protocol.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// Closed by the backend, or to be cut from here.
    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Where it tells of changes.
    pub(super) fn notices(&mut self) -> &mut Option<Notices> {
        &mut self.notices
    }

    /// Where it tells of changes, to be waited for.
    pub(super) fn notice_stream(&self) -> Option<&UnixStream> {
        self.notices.as_ref().map(Notices::stream)
    }

    /// Whether the device's configuration is the backend's.
    pub(super) fn has_config(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::CONFIG)
    }

    /// The device's configuration, of the first of `sizes` that the backend has.
    pub(super) fn config(&mut self, sizes: &[u32]) -> Result<Option<Vec<u8>>, VhostUserError> {
        let read = |size: &u32| config_space::read(&self.stream, *size).transpose();
        sizes
            .iter()
            .find_map(read)
            .transpose()
            .map_err(|source| VhostUserError::Answer { what: "GET_CONFIG", source })
    }

    /// Writes to the device's configuration.
    pub(super) fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), VhostUserError> {
        let result = self.frontend.set_config(offset, VhostUserConfigFlags::WRITABLE, data);
        result.map_err(VhostUserError::request("SET_CONFIG"))
    }

    /// Shows the backend guest memory as it is now.
    pub(super) fn share(&mut self, memory: &GuestMemoryMmap) -> Result<(), VhostUserError> {
        use VhostUserError as E;
        let regions = regions(memory)?;
        if regions.len() as u64 > self.slots {
            return Err(E::Slots { wanted: regions.len(), there: self.slots });
        }
        if !self.protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            let changed = regions.len() != self.regions.len()
                || !regions.iter().all(|region| contains(&self.regions, region));
            if changed {
                self.frontend.set_mem_table(&regions).map_err(E::request("SET_MEM_TABLE"))?;
            }
        } else {
            for gone in self.regions.iter().filter(|region| !contains(&regions, region)) {
                self.frontend.remove_mem_region(gone).map_err(E::request("REM_MEM_REG"))?;
            }
            for new in regions.iter().filter(|region| !contains(&self.regions, region)) {
                self.frontend.add_mem_region(new).map_err(E::request("ADD_MEM_REG"))?;
            }
        }
        self.regions = regions;
        Ok(())
    }

    /// Negotiates `features` with the device and shows it memory.
    pub(super) fn begin(&mut self, features: u64, memory: &GuestMemoryMmap) -> Result<(), VhostUserError> {
        let acked = (features | PROTOCOL) & self.features;
        self.frontend.set_features(acked).map_err(VhostUserError::request("SET_FEATURES"))?;
        self.share(memory)
    }

    /// Starts rings where their positions are. They are not enabled yet.
    pub(super) fn start(
        &mut self,
        queues: &[&ActiveQueue],
        features: u64,
        memory: &GuestMemoryMmap,
    ) -> Result<(), VhostUserError> {
        use VhostUserError as E;
        let packed = features & F_RING_PACKED != 0;
        for queue in queues {
            let layout = queue.layout();
            let (index, number) = (queue.index(), usize::from(queue.index()));
            let host = |address| {
                let pointer = memory.get_host_address(GuestAddress(address));
                pointer.map(|pointer| pointer.addr() as u64).map_err(|_| E::Ring(index))
            };
            let config = VringConfigData {
                queue_max_size: layout.size,
                queue_size: layout.size,
                flags: 0,
                desc_table_addr: host(layout.descriptors)?,
                used_ring_addr: host(layout.device)?,
                avail_ring_addr: host(layout.driver)?,
                log_addr: None,
            };
            let base = base(queue.shared_position().get(), packed);
            let call = queue.interrupt().queue_event(index).map_err(E::host("an interrupt's eventfd"))?;
            self.frontend.set_vring_num(number, layout.size).map_err(E::request("SET_VRING_NUM"))?;
            self.frontend.set_vring_addr(number, &config).map_err(E::request("SET_VRING_ADDR"))?;
            self.frontend.set_vring_base(number, base).map_err(E::request("SET_VRING_BASE"))?;
            self.frontend.set_vring_call(number, &call).map_err(E::request("SET_VRING_CALL"))?;
            self.frontend.set_vring_kick(number, queue.kick()).map_err(E::request("SET_VRING_KICK"))?;
        }
        Ok(())
    }

    /// Enables rings, or disables them.
    pub(super) fn enable(&mut self, queues: &[&ActiveQueue], enable: bool) -> Result<(), VhostUserError> {
        // Without the protocol's features they are enabled as soon as they are started.
        if self.features & PROTOCOL == 0 {
            return Ok(());
        }
        queues.iter().try_for_each(|queue| {
            let result = self.frontend.set_vring_enable(usize::from(queue.index()), enable);
            result.map_err(VhostUserError::request("SET_VRING_ENABLE"))
        })
    }

    /// Stops rings, and notes how far they have come.
    pub(super) fn stop(
        &mut self,
        queues: &[&ActiveQueue],
        features: u64,
        memory: &GuestMemoryMmap,
    ) -> Result<(), VhostUserError> {
        let packed = features & F_RING_PACKED != 0;
        self.enable(queues, false)?;
        for queue in queues {
            let number = usize::from(queue.index());
            let base =
                self.frontend.get_vring_base(number).map_err(VhostUserError::request("GET_VRING_BASE"))?;
            let [low, high, ..] = base.to_le_bytes();
            let base = u16::from_le_bytes([low, high]);
            queue.shared_position().set(position(base, packed, queue, memory));
        }
        Ok(())
    }

    /// Has the device forget the driver, and the memory that it was shown: after a reboot other memory is at the same addresses, of the guest and
    /// of this process.
    pub(super) fn reset(&mut self) -> Result<(), VhostUserError> {
        for region in std::mem::take(&mut self.regions) {
            if self.protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
                self.frontend.remove_mem_region(&region).map_err(VhostUserError::request("REM_MEM_REG"))?;
            }
        }
        if self.protocol.contains(VhostUserProtocolFeatures::RESET_DEVICE) {
            self.frontend.reset_device().map_err(VhostUserError::request("RESET_DEVICE"))?;
        }
        Ok(())
    }
}

fn wanted() -> VhostUserProtocolFeatures {
    use VhostUserProtocolFeatures as F;
    F::MQ | F::REPLY_ACK | F::CONFIG | F::BACKEND_REQ | F::CONFIGURE_MEM_SLOTS | F::RESET_DEVICE
}

/// Guest memory as the protocol has it.
fn regions(memory: &GuestMemoryMmap) -> Result<Vec<VhostUserMemoryRegionInfo>, VhostUserError> {
    let region = |region: &vm_memory::GuestRegionMmap| {
        let private = || VhostUserError::NotShared(region.start_addr().0);
        if region.flags() & libc::MAP_SHARED == 0 {
            return Err(private());
        }
        VhostUserMemoryRegionInfo::from_guest_region(region).map_err(|_| private())
    };
    memory.iter().map(region).collect()
}

fn contains(regions: &[VhostUserMemoryRegionInfo], wanted: &VhostUserMemoryRegionInfo) -> bool {
    let key = |region: &VhostUserMemoryRegionInfo| {
        (region.guest_phys_addr, region.memory_size, region.userspace_addr, region.mmap_offset)
    };
    regions.iter().any(|region| key(region) == key(wanted))
}

/// A position as the protocol has it. Of a packed ring that stands still, both sides are at the same place.
fn base(position: RingPosition, packed: bool) -> u16 {
    match packed {
        false => position.avail,
        true => position.avail & !WRAP | if position.avail_wrap { WRAP } else { 0 },
    }
}

fn position(base: u16, packed: bool, queue: &ActiveQueue, memory: &GuestMemoryMmap) -> RingPosition {
    if packed {
        let (place, wrap) = (base & !WRAP, base & WRAP != 0);
        RingPosition { avail: place, used: place, avail_wrap: wrap, used_wrap: wrap }
    } else {
        let used = load_index(memory, queue.layout().device).unwrap_or(base);
        RingPosition { avail: base, used, ..RingPosition::START }
    }
}
