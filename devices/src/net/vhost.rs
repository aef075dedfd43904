//! Packets moved by the host's kernel (`/dev/vhost-net`): it gets the rings, the doorbells and the interrupts as eventfds, and the tap's files.
//!
//! What the driver settles by the control queue is still for this process.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use log::warn;
use vhost::net::VhostNet;
use vhost::vhost_kern::net::Net as KernelNet;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::control::{Control, Mover};
use super::shared::Shared;
use super::tap::Tap;
use crate::virtio::Memory;
use crate::virtio::device::{
    Active, DeviceError, F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED, F_VERSION_1, Interrupt,
};
use crate::virtio::queue::ActiveQueue;
use crate::virtio::ring::RingPosition;
use crate::virtio::worker::Worker;

/// Features that are the kernel's to have, and not the tap's.
const KERNELS: u64 =
    F_INDIRECT_DESC | F_EVENT_IDX | F_RING_PACKED | F_VERSION_1 | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// The kernel does not move packets.
#[derive(Debug, thiserror::Error)]
#[error(
    "vhost-net cannot be used: {source}; load the module (modprobe vhost_net), give this user /dev/vhost-net, or write vhost=off"
)]
pub struct VhostError {
    source: vhost::Error,
}

impl From<vhost::Error> for VhostError {
    fn from(source: vhost::Error) -> Self {
        Self { source }
    }
}

fn host(what: &'static str) -> impl Fn(vhost::Error) -> DeviceError {
    move |error| {
        let source = match error {
            vhost::Error::VhostOpen(e) | vhost::Error::IoctlError(e) | vhost::Error::IOError(e) => e,
            other => io::Error::other(other),
        };
        DeviceError::Host { what: format!("vhost-net: {what}"), source }
    }
}

/// The kernel's part of a device, whether or not it is at work.
#[derive(Debug)]
pub struct Vhost {
    features: u64,
    active: Mutex<Weak<Mutex<Pairs>>>,
}

impl Vhost {
    /// Finds out whether the kernel does it.
    ///
    /// # Errors
    /// It does not.
    pub fn open() -> Result<Self, VhostError> {
        let kernel = KernelNet::new(Memory::new(GuestMemoryMmap::new()))?;
        Ok(Self { features: kernel.get_features()?, active: Mutex::default() })
    }

    /// What of `features` can be offered.
    pub(super) fn restrict(&self, features: u64) -> u64 {
        features & (self.features | !KERNELS)
    }

    /// Has the kernel serve these pairs of queues, and a thread of ours the control queue.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn activate(
        &self,
        queues: Vec<(u16, ActiveQueue, ActiveQueue)>,
        mut control: Control,
    ) -> Result<Box<dyn Active>, DeviceError> {
        let features = control.features.0 & self.features & KERNELS;
        let pairs = queues.into_iter().zip(control.tap.files());
        let pairs = pairs
            .map(|((_, receive, send), file)| Pair::new([receive, send], Arc::clone(file), features))
            .collect::<Result<Vec<_>, _>>()?;
        let in_use = control.shared.pairs().into();
        control.broken = pairs.iter().flat_map(Pair::broken).collect();
        let (tap, shared) = (Arc::clone(&control.tap), Arc::clone(&control.shared));
        let mut pairs = Pairs { pairs, in_use, tap, shared };
        if !control.interrupt.begins_paused() {
            pairs.start()?;
        }
        let pairs = Arc::new(Mutex::new(pairs));
        *self.active.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&pairs);
        let interrupt = Arc::clone(&control.interrupt);
        control.mover = Box::new(Kernel(Arc::clone(&pairs)));
        let control = control.start()?;
        Ok(Box::new(ActiveVhost { control, pairs, interrupt }))
    }

    /// Guest memory is another than before.
    pub(super) fn memory_changed(&self) {
        let active = self.active.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        if let Some(pairs) = active {
            for pair in &lock(&pairs).pairs {
                if let Err(e) = pair.tell_memory() {
                    warn!("the kernel does not take the guest's new memory for its packets: {e}");
                }
            }
        }
    }
}

fn lock(pairs: &Mutex<Pairs>) -> MutexGuard<'_, Pairs> {
    pairs.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A pair of queues as the kernel has it.
struct Pair {
    kernel: KernelNet<Memory>,
    queues: [ActiveQueue; 2],
    calls: [EventFd; 2],
    /// Signalled by the kernel when the driver has broken a ring.
    errors: [Arc<EventFd>; 2],
    file: Arc<File>,
    running: bool,
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pair").field("running", &self.running).finish_non_exhaustive()
    }
}

impl Pair {
    fn new(queues: [ActiveQueue; 2], file: Arc<File>, features: u64) -> Result<Self, DeviceError> {
        let kernel = KernelNet::new(queues[0].memory().clone()).map_err(host("opening it"))?;
        kernel.set_owner().map_err(host("becoming its owner"))?;
        kernel.set_features(features).map_err(host("its features"))?;
        let call = |queue: &ActiveQueue| queue.interrupt().queue_event(queue.index());
        let calls =
            [call(&queues[0]), call(&queues[1])].map(|call| call.map_err(DeviceError::host("an interrupt")));
        let [receive, send] = calls;
        let errors = [(); 2].map(|()| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new));
        let errors = errors.map(|event| event.map_err(DeviceError::host("an eventfd for a ring's errors")));
        let [broken, torn] = errors;
        let errors = [broken?, torn?];
        let pair = Self { kernel, queues, calls: [receive?, send?], errors, file, running: false };
        pair.tell_memory().map_err(host("the guest's memory"))?;
        Ok(pair)
    }

    /// The number of each queue, and what the kernel signals when it finds that one broken.
    fn broken(&self) -> impl Iterator<Item = (u16, Arc<EventFd>)> {
        self.queues.iter().map(ActiveQueue::index).zip(self.errors.iter().map(Arc::clone))
    }

    fn tell_memory(&self) -> vhost::Result<()> {
        let memory = self.queues[0].view();
        let regions: Vec<_> = memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                ..VhostUserMemoryRegionInfo::default()
            })
            .collect();
        self.kernel.set_mem_table(&regions).map(drop)
    }

    /// From the position of each ring on.
    fn start(&mut self) -> Result<(), DeviceError> {
        if self.running {
            return Ok(());
        }
        for (number, queue) in self.queues.iter().enumerate() {
            let (call, broken) = (&self.calls[number], &self.errors[number]);
            let layout = queue.layout();
            let ring = VringConfigData {
                queue_max_size: layout.size,
                queue_size: layout.size,
                desc_table_addr: layout.descriptors,
                avail_ring_addr: layout.driver,
                used_ring_addr: layout.device,
                ..VringConfigData::default()
            };
            let kernel = &self.kernel;
            kernel.set_vring_num(number, layout.size).map_err(host("the size of a ring"))?;
            kernel
                .set_vring_base(number, queue.shared_position().get().avail)
                .map_err(host("the place in a ring"))?;
            kernel.set_vring_addr(number, &ring).map_err(host("the addresses of a ring"))?;
            kernel.set_vring_call(number, call).map_err(host("a ring's interrupt"))?;
            kernel.set_vring_err(number, broken).map_err(host("a ring's errors"))?;
            kernel.set_vring_kick(number, queue.kick()).map_err(host("a ring's doorbell"))?;
        }
        self.running = true;
        for (number, queue) in self.queues.iter().enumerate() {
            self.kernel.set_backend(number, Some(&self.file)).map_err(host("the tap"))?;
            // What the driver has told of before.
            queue.ring_own_doorbell();
        }
        Ok(())
    }

    /// When it returns the kernel touches nothing of the guest's any more.
    fn stop(&mut self) {
        if !std::mem::take(&mut self.running) {
            return;
        }
        for (number, queue) in self.queues.iter().enumerate() {
            let stopped = self.kernel.set_backend(number, None);
            match stopped.and_then(|()| self.kernel.get_vring_base(number)) {
                Ok(base) => {
                    let at = u16::try_from(base & 0xffff).unwrap_or(0);
                    queue.shared_position().set(RingPosition { avail: at, used: at, ..RingPosition::START });
                }
                Err(e) => warn!("the kernel does not let go of a ring: {e}"),
            }
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.stop();
    }
}

/// All pairs of a device.
#[derive(Debug)]
struct Pairs {
    pairs: Vec<Pair>,
    in_use: usize,
    tap: Arc<Tap>,
    shared: Arc<Shared>,
}

impl Pairs {
    fn start(&mut self) -> Result<(), DeviceError> {
        if !self.shared.has_link() {
            // A tap that has gone is nothing that the kernel would take.
            return Ok(());
        }
        self.pairs.iter_mut().take(self.in_use).try_for_each(Pair::start)
    }

    fn stop(&mut self) {
        self.pairs.iter_mut().for_each(Pair::stop);
    }

    /// The kernel cannot poll a file that is detached from the tap: attached first, detached last.
    fn use_pairs(&mut self, count: usize) -> io::Result<()> {
        self.in_use = count;
        self.pairs.iter_mut().skip(count).for_each(Pair::stop);
        self.tap.use_pairs(count)?;
        self.start().map_err(io::Error::other)
    }
}

/// The kernel's pairs, as the control queue switches them.
struct Kernel(Arc<Mutex<Pairs>>);

impl Mover for Kernel {
    fn use_pairs(&mut self, pairs: u16) -> io::Result<()> {
        lock(&self.0).use_pairs(pairs.into())
    }

    fn stop(&mut self) {
        lock(&self.0).stop();
    }
}

/// The device at work.
#[derive(Debug)]
struct ActiveVhost {
    control: Worker,
    pairs: Arc<Mutex<Pairs>>,
    interrupt: Arc<dyn Interrupt>,
}

impl Active for ActiveVhost {
    fn stop(&self) {
        self.control.stop();
        lock(&self.pairs).stop();
    }

    fn wait_stopped(&self, limit: Duration) -> bool {
        let stopped = self.control.wait_stopped(limit);
        // It may have switched pairs on after the others were stopped.
        lock(&self.pairs).stop();
        stopped
    }

    fn pause(&self) {
        self.control.pause();
        lock(&self.pairs).stop();
    }

    fn hold(&self, limit: Duration) {
        self.control.hold(limit);
        lock(&self.pairs).stop();
    }

    fn resume(&self) {
        if let Err(e) = lock(&self.pairs).start() {
            self.interrupt.needs_reset(&e.to_string());
        }
        self.control.resume();
    }
}
