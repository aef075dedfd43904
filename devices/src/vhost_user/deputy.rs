//! Answers in the place of a backend that has gone, so that the guest gets errors and not silence: drivers of Linux do not look at
//! DEVICE_NEEDS_RESET, and a process that waits for a file system without an answer cannot even be killed.
//!
//! Only what the driver asks from then on is answered. Of what the backend had taken nobody knows whether it is still open: a split ring does not
//! tell, and to answer a request that is not open would write to memory that is used for something else by now.

use std::io::{Read, Write};
use std::sync::Arc;

use log::debug;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::EventFd;

use super::keeper::Duty;
use crate::virtio::MemoryView;
use crate::virtio::chain::Chain;
use crate::virtio::device::{DeviceError, DeviceType, F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED};
use crate::virtio::queue::{ActiveQueue, Ring, Served};
use crate::virtio::ring::{RingError, RingFeatures, RingPosition, load_index};
use crate::virtio::worker::{Event, Handler, Watch, Worker};

/// Bytes of `fuse_in_header` up to the end of `unique`, and of `fuse_out_header` (Linux `include/uapi/linux/fuse.h`).
const FUSE_IN: usize = 16;
const FUSE_OUT: u32 = 16;
/// VIRTIO_BLK_S_IOERR.
const BLOCK_ERROR: u8 = 1;

/// Starts to answer, if there is an answer for devices of this type.
pub(super) fn start(name: &str, device_type: DeviceType, duty: &Duty) -> Option<Worker> {
    let answer: Answer = match device_type {
        DeviceType::FS => refuse_fuse,
        DeviceType::BLOCK => refuse_block,
        _ => return None,
    };
    // A packed ring does not tell where the driver is.
    if duty.features & F_RING_PACKED != 0 {
        return None;
    }
    let queues: Result<Vec<_>, RingError> = duty.queues.iter().map(|queue| take_over(queue, duty)).collect();
    let deputy = Deputy { queues: queues.ok()?, answer };
    let worker = Worker::start(name, Box::new(deputy), Arc::clone(&duty.interrupt));
    worker.inspect_err(|e| debug!("device {name}: its driver gets no errors: {e}")).ok()
}

/// The queue from what the driver asks next.
fn take_over(queue: &ActiveQueue, duty: &Duty) -> Result<ActiveQueue, RingError> {
    let view = duty.memory.memory();
    let layout = *queue.layout();
    let (avail, used) = (load_index(&view, layout.driver)?, load_index(&view, layout.device)?);
    let position = RingPosition { avail, used, ..RingPosition::START };
    let features = RingFeatures {
        packed: false,
        event_idx: duty.features & F_EVENT_IDX != 0,
        indirect: duty.features & F_INDIRECT_DESC != 0,
    };
    Ok(ActiveQueue::new(
        queue.index(),
        Ring::new(&layout, features, position, &view)?,
        layout,
        duty.memory.clone(),
        Arc::clone(queue.kick()),
        Arc::clone(&duty.interrupt),
        queue.shared_position().clone(),
    ))
}

/// How one request is refused: how many bytes were written.
type Answer = fn(&MemoryView, &Chain) -> u32;

struct Deputy {
    queues: Vec<ActiveQueue>,
    answer: Answer,
}

impl Handler for Deputy {
    fn doorbells(&self) -> Vec<(u16, Arc<EventFd>)> {
        self.queues.iter().map(|queue| (queue.index(), Arc::clone(queue.kick()))).collect()
    }

    fn event(&mut self, event: Event, _watch: &Watch) -> Result<(), DeviceError> {
        let Event::Kick(index) = event else { return Ok(()) };
        let Some(queue) = self.queues.iter_mut().find(|queue| queue.index() == index) else { return Ok(()) };
        let answer = self.answer;
        queue
            .serve(|view, chain| {
                let written = answer(view, &chain);
                Ok::<_, DeviceError>(Served::Done(chain, written))
            })
            .map(|_| ())
    }
}

/// "Transport endpoint is not connected", as for every file system whose server has gone.
fn refuse_fuse(view: &MemoryView, chain: &Chain) -> u32 {
    let mut header = [0; FUSE_IN];
    // Some requests have no answer.
    if chain.reader(view).read_exact(&mut header).is_err() || chain.writable_len() < FUSE_OUT {
        return 0;
    }
    let mut writer = chain.writer(view);
    let error = (-libc::ENOTCONN).to_le_bytes();
    let answer = [&FUSE_OUT.to_le_bytes()[..], &error, &header[8..]].concat();
    let _ = writer.write_all(&answer);
    writer.written()
}

/// The status is the last byte.
fn refuse_block(view: &MemoryView, chain: &Chain) -> u32 {
    let Some(last) = chain.writable().last() else { return 0 };
    let status = last.address.0.wrapping_add(u64::from(last.len.saturating_sub(1)));
    // In memory: the chain was checked.
    let _ = view.write_obj(BLOCK_ERROR, GuestAddress(status));
    1
}
