//! The control queue (VIRTIO 1.2, section 5.1.6.5): how many pairs of queues the driver uses, and what it takes unfinished.

use std::io::{Read, Write};
use std::sync::Arc;

use log::debug;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::device::{Features, offloads_of, thread_name};
use super::shared::Shared;
use super::tap::Tap;
use crate::virtio::MemoryView;
use crate::virtio::chain::Chain;
use crate::virtio::device::{DeviceError, Interrupt};
use crate::virtio::queue::{ActiveQueue, Served};
use crate::virtio::worker::{Event, Handler, Watch, Worker};

/// The longest command that is known: class, command, 64 bits.
const COMMAND_MAX: usize = 10;

/// What moves the packets, as far as its pairs are to be switched on and off.
pub trait Mover: Send {
    /// The first `pairs` pairs are to be used, and no others.
    ///
    /// # Errors
    /// The host does not do it.
    fn use_pairs(&mut self, pairs: u16) -> std::io::Result<()>;

    /// Moves nothing any more: the driver has broken a ring that is not served here.
    fn stop(&mut self) {}
}

/// Workers in this process: each looks at its pair when its doorbell rings.
pub struct Workers {
    /// What they share.
    pub shared: Arc<Shared>,
    /// The tap.
    pub tap: Arc<Tap>,
    /// Doorbells of all receive queues.
    pub doorbells: Vec<Arc<EventFd>>,
}

impl Mover for Workers {
    fn use_pairs(&mut self, pairs: u16) -> std::io::Result<()> {
        // A worker whose file is detached must know it before, and one whose file is not yet attached only after.
        if pairs < self.shared.pairs() {
            self.shared.set_pairs(pairs);
        }
        self.tap.use_pairs(pairs.into())?;
        self.shared.set_pairs(pairs);
        self.doorbells.iter().try_for_each(|doorbell| doorbell.write(1))
    }
}

/// What the thread of the control queue works on.
pub struct Control {
    /// For the log.
    pub device: String,
    /// The queue, if the driver has it.
    pub queue: Option<ActiveQueue>,
    /// The way to the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// What was negotiated.
    pub features: Features,
    /// The most pairs.
    pub pairs_max: u16,
    /// The tap.
    pub tap: Arc<Tap>,
    /// What all threads share.
    pub shared: Arc<Shared>,
    /// What moves packets.
    pub mover: Box<dyn Mover>,
    /// Numbers of queues that are not served here, and what is signalled when the driver has broken one.
    pub broken: Vec<(u16, Arc<EventFd>)>,
}

impl Control {
    /// Starts its thread.
    ///
    /// # Errors
    /// No thread or descriptor is left.
    pub fn start(self) -> Result<Worker, DeviceError> {
        let name = thread_name(&self.device, "_ctrl");
        let interrupt = Arc::clone(&self.interrupt);
        Worker::start(&name, Box::new(self), interrupt)
    }

    /// Carries a command out; whether that was possible.
    fn carry_out(&mut self, command: &[u8]) -> bool {
        let Some((&[class, what], data)) = command.split_first_chunk() else { return false };
        match (u32::from(class), u32::from(what)) {
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) if self.features.has_many_queues() => {
                let Some(pairs) = data.first_chunk().map(|bytes| u16::from_le_bytes(*bytes)) else {
                    return false;
                };
                if !(1..=self.pairs_max).contains(&pairs) {
                    return false;
                }
                self.report("using other queues", |this| {
                    this.mover.use_pairs(pairs)?;
                    this.shared.set_pairs(pairs);
                    Ok(())
                })
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET)
                if self.features.has_changing_offloads() =>
            {
                let Some(wanted) = data.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)) else {
                    return false;
                };
                // Only what was negotiated can be switched on again.
                if wanted & !self.features.guest_offloads() != 0 {
                    return false;
                }
                let offloads = offloads_of(wanted);
                self.report("changing the offloads", |this| {
                    // More room is wanted before a longer packet can come.
                    let before = this.shared.offloads();
                    this.shared.set_offloads(before | offloads);
                    this.tap.set_offloads(offloads)
                })
            }
            _ => false,
        }
    }

    fn report(&mut self, what: &str, act: impl FnOnce(&mut Self) -> std::io::Result<()>) -> bool {
        let result = act(self);
        if let Err(e) = &result {
            debug!("{}: {what}: {e}", self.device);
        }
        result.is_ok()
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some(mut queue) = self.queue.take() else { return Ok(()) };
        let result = queue.serve(|view, chain| self.answer(view, chain));
        self.queue = Some(queue);
        result.map(drop)
    }

    fn answer(&mut self, view: &MemoryView, chain: Chain) -> Result<Served, DeviceError> {
        let mut command = Vec::new();
        let read = chain.reader(view).take(COMMAND_MAX as u64).read_to_end(&mut command);
        read.map_err(DeviceError::host("reading a command of the guest"))?;
        if chain.writable_len() == 0 {
            return Err(DeviceError::Protocol("a command without room for an answer".to_owned()));
        }
        let answer = if self.carry_out(&command) { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        let [byte, ..] = answer.to_le_bytes();
        let written = chain.writer(view).write_all(&[byte]);
        written.map_err(DeviceError::host("answering a command of the guest"))?;
        Ok(Served::Done(chain, 1))
    }
}

impl Handler for Control {
    fn doorbells(&self) -> Vec<(u16, Arc<EventFd>)> {
        self.queue.iter().map(|queue| (queue.index(), Arc::clone(queue.kick()))).collect()
    }

    fn start(&mut self, watch: &Watch) -> Result<(), DeviceError> {
        for (token, (_, broken)) in (0..).zip(&self.broken) {
            watch
                .add(&**broken, EventSet::IN, token)
                .map_err(DeviceError::host("watching a ring's errors"))?;
        }
        Ok(())
    }

    fn event(&mut self, event: Event, _watch: &Watch) -> Result<(), DeviceError> {
        if let Event::Ready(token, _) = event {
            let broken = usize::try_from(token).ok().and_then(|place| self.broken.get(place));
            let queue = broken.map_or(0, |(queue, _)| *queue);
            self.mover.stop();
            return Err(DeviceError::Protocol(format!(
                "queue {queue}: the host's kernel cannot go on with this ring: the driver has broken it"
            )));
        }
        self.serve()
    }
}
