//! The control queue of a network device with several pairs of queues (VIRTIO 1.2, section 5.1.6.5): backends have none, so it is served here. It
//! has one command, which says how many pairs are in use.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_sys_util::eventfd::EventFd;

use super::keeper::{Desk, Job, PAIR};
use super::net::F_MQ;
use crate::virtio::MemoryView;
use crate::virtio::chain::Chain;
use crate::virtio::device::{Activation, DeviceError};
use crate::virtio::queue::{ActiveQueue, Served};
use crate::virtio::worker::{Event, Handler, Watch, Worker};

/// VIRTIO_NET_CTRL_MQ and VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.
const SET_PAIRS: [u8; 2] = [4, 0];
const OK: u8 = 0;
const ERR: u8 = 1;

/// Starts it, if the driver has enabled it, and takes it out of `activation`.
pub(super) fn start(
    name: &str,
    activation: &mut Activation,
    desk: &Arc<Desk>,
) -> Result<Option<Worker>, DeviceError> {
    // It is behind all pairs there can be, or behind the first one.
    let last = activation.queues.iter().map(ActiveQueue::index).max().filter(|last| last % 2 == 0);
    let Some(index) = last else { return Ok(None) };
    let pairs = if activation.has(F_MQ) { index / 2 } else { 1 };
    let queue = activation.take_queue(index)?;
    let handler = Control { queue, pairs, desk: Arc::clone(desk) };
    Worker::start(name, Box::new(handler), Arc::clone(&activation.interrupt)).map(Some)
}

struct Control {
    queue: ActiveQueue,
    pairs: u16,
    desk: Arc<Desk>,
}

impl Handler for Control {
    fn doorbells(&self) -> Vec<(u16, Arc<EventFd>)> {
        vec![(self.queue.index(), Arc::clone(self.queue.kick()))]
    }

    fn event(&mut self, _event: Event, _watch: &Watch) -> Result<(), DeviceError> {
        let Self { queue, pairs, desk } = self;
        queue.serve(|view, chain| Ok::<_, DeviceError>(command(*pairs, desk, view, chain))).map(|_| ())
    }
}

fn command(most: u16, desk: &Desk, view: &MemoryView, chain: Chain) -> Served {
    let mut bytes = [0; 4];
    let wanted = match chain.reader(view).read_exact(&mut bytes) {
        Ok(()) if bytes[..2] == SET_PAIRS => u16::from_le_bytes([bytes[2], bytes[3]]),
        _ => 0,
    };
    let answer = if (1..=most).contains(&wanted) {
        // It need not be waited for: the driver may use the queues from now on, and is served as soon as they are.
        desk.enabled.store(wanted * PAIR, Ordering::Relaxed);
        drop(desk.post(Job::Enable(wanted * PAIR)));
        OK
    } else {
        ERR
    };
    let mut writer = chain.writer(view);
    let _ = writer.write(&[answer]);
    let written = writer.written();
    Served::Done(chain, written)
}
