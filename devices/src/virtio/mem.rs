//! Memory that the guest plugs and unplugs in blocks (VIRTIO 1.2, section 5.15), as much as it is asked to have.
//!
//! The memory slot and the mapping are there for the whole region from the start, so a guest that touches blocks which it has not plugged takes memory
//! of the host, up to the region's size, until it plugs and unplugs them. Assigned devices reach plugged blocks only; see [`blocks`].

pub mod blocks;

use std::io::{Read, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use log::warn;
use vmm_sys_util::eventfd::EventFd;

use self::blocks::{Blocks, Plugged};
use super::MemoryView;
use super::chain::Chain;
use super::device::{Activation, Active, DeviceError, DeviceType, F_RINGS, Interrupt, Saved, VirtioDevice};
use super::queue::{ActiveQueue, Served};
use super::worker::{Event, Handler, Watch, Worker};

const QUEUE_SIZE: u16 = 128;

/// The configuration has the region's node.
const F_ACPI_PXM: u64 = 1 << 0;
/// The driver leaves unplugged memory alone, also for reading: where pages come from a pool there may be none.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

/// Bytes of a request's head and of a whole one.
const HEAD: usize = 8;
const REQUEST: usize = 24;
/// Bytes of an answer without and with a state.
const ANSWER: u32 = 8;
const STATE_ANSWER: u32 = 10;

/// The device, in one machine.
#[derive(Debug)]
pub struct Mem {
    name: String,
    node: u16,
    shared: Arc<Shared>,
    /// The way to the driver while there is one.
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

#[derive(Debug)]
struct Shared {
    blocks: Blocks,
    /// Bytes that the guest is asked to have.
    requested: AtomicU64,
}

impl Mem {
    /// A device called `name` for `blocks` in the guest's node `node`, of which the guest is asked to have `requested` bytes, rounded up to blocks.
    pub fn new(name: &str, node: u32, blocks: Blocks, requested: u64) -> Self {
        let shared = Shared { blocks, requested: AtomicU64::new(0) };
        let requested = shared.round(requested).min(shared.blocks.len());
        shared.requested.store(requested, Ordering::Release);
        let node = u16::try_from(node).unwrap_or(0);
        Self { name: name.to_owned(), node, shared: Arc::new(shared), interrupt: Mutex::new(None) }
    }

    /// What the operator calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its blocks.
    pub fn blocks(&self) -> &Blocks {
        &self.shared.blocks
    }
}

impl Shared {
    fn requested(&self) -> u64 {
        self.requested.load(Ordering::Acquire)
    }

    fn round(&self, size: u64) -> u64 {
        size.checked_next_multiple_of(self.blocks.block_size()).unwrap_or(u64::MAX)
    }

    fn plug(&self, name: &str, range: Range<usize>) -> u16 {
        let blocks = &self.blocks;
        let size = u64::try_from(range.len()).unwrap_or(u64::MAX).saturating_mul(blocks.block_size());
        if blocks.plugged_size().saturating_add(size) > self.requested() {
            return NACK;
        }
        if blocks.look(range.clone()) != Plugged::None {
            return ERROR;
        }
        answer_of(name, "plugged", blocks.plug(range))
    }

    fn unplug(&self, name: &str, range: Range<usize>) -> u16 {
        if self.blocks.look(range.clone()) != Plugged::All {
            return ERROR;
        }
        answer_of(name, "unplugged", self.blocks.unplug(range))
    }

    /// The answer to a request, and the state that is asked for.
    fn answer(&self, name: &str, request: &Request) -> (u16, Option<Plugged>) {
        let range = self.blocks.range(request.address, request.blocks);
        match (request.kind, range) {
            (UNPLUG_ALL, _) => (answer_of(name, "unplugged", self.blocks.unplug_all()), None),
            (PLUG, Some(range)) => (self.plug(name, range), None),
            (UNPLUG, Some(range)) => (self.unplug(name, range), None),
            (STATE, Some(range)) => (ACK, Some(self.blocks.look(range))),
            _ => (ERROR, None),
        }
    }
}

/// What the host cannot do now, the guest may try again: Linux does after some time.
fn answer_of(name: &str, what: &str, result: std::io::Result<()>) -> u16 {
    match result {
        Ok(()) => ACK,
        Err(e) => {
            warn!("device {name}: blocks cannot be {what}, the guest will try again: {e}");
            BUSY
        }
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> DeviceType {
        DeviceType::MEM
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        F_RINGS | F_ACPI_PXM | F_UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Shared { blocks, .. } = &*self.shared;
        let size = blocks.len();
        // All of the region is usable.
        let fields = [
            blocks.block_size(),
            self.node.into(),
            blocks.start(),
            size,
            size,
            blocks.plugged_size(),
            self.shared.requested(),
        ];
        let bytes = fields.iter().flat_map(|field| field.to_le_bytes());
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        bytes.skip(from).zip(data).for_each(|(value, byte)| *byte = value);
    }

    fn activate(&self, mut activation: Activation) -> Result<Box<dyn Active>, DeviceError> {
        let queue = activation.take_queue(0)?;
        let interrupt = Arc::clone(&activation.interrupt);
        *self.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = Some(interrupt);
        let shared = Arc::clone(&self.shared);
        let handler = Servant { name: self.name.clone(), queue, shared };
        Ok(Box::new(Worker::start(&self.name, Box::new(handler), activation.interrupt)?))
    }

    fn resize(&self, size: u64) -> Result<(), String> {
        let (wanted, limit) = (self.shared.round(size), self.shared.blocks.len());
        if wanted > limit {
            return Err(format!("{size} bytes are more than the {limit} of its hotplug_size"));
        }
        self.shared.requested.store(wanted, Ordering::Release);
        if let Some(interrupt) = &*self.interrupt.lock().unwrap_or_else(PoisonError::into_inner) {
            interrupt.config();
        }
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("plugged_bytes", self.shared.blocks.plugged_size()),
            ("requested_bytes", self.shared.requested()),
        ]
    }

    fn save(&self) -> Result<Saved, String> {
        Ok(serde_json::json!({ "requested": self.shared.requested(), "plugged": self.shared.blocks.runs() }))
    }

    fn restore(&self, saved: &Saved) -> Result<(), String> {
        let requested = saved["requested"].as_u64().ok_or("requested is no size")?;
        let runs: Vec<(u64, u16)> = serde_json::from_value(saved["plugged"].clone())
            .map_err(|e| format!("plugged is no list of blocks: {e}"))?;
        let blocks = &self.shared.blocks;
        blocks.unplug_all().map_err(|e| e.to_string())?;
        for (first, count) in runs {
            let address = first.saturating_mul(blocks.block_size()).saturating_add(blocks.start());
            let range =
                blocks.range(address, count).filter(|range| blocks.look(range.clone()) == Plugged::None);
            let range = range.ok_or_else(|| format!("{count} blocks from {first} on are not its own"))?;
            blocks.plug(range).map_err(|e| e.to_string())?;
        }
        self.shared.requested.store(self.shared.round(requested).min(blocks.len()), Ordering::Release);
        Ok(())
    }
}

/// One request; fields that its kind does not have are 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Request {
    kind: u16,
    address: u64,
    blocks: u16,
}

struct Servant {
    name: String,
    queue: ActiveQueue,
    shared: Arc<Shared>,
}

impl Handler for Servant {
    fn doorbells(&self) -> Vec<(u16, Arc<EventFd>)> {
        vec![(self.queue.index(), Arc::clone(self.queue.kick()))]
    }

    fn event(&mut self, _event: Event, _watch: &Watch) -> Result<(), DeviceError> {
        let Self { name, queue, shared } = self;
        queue
            .serve::<DeviceError>(|view, chain| {
                let request = read_request(view, &chain)?;
                let (kind, state) = shared.answer(name, &request);
                let mut answer = [0; STATE_ANSWER as usize];
                answer[..2].copy_from_slice(&kind.to_le_bytes());
                let code: u16 = match state {
                    None | Some(Plugged::All) => 0,
                    Some(Plugged::None) => 1,
                    Some(Plugged::Some) => 2,
                };
                answer[8..].copy_from_slice(&code.to_le_bytes());
                let len = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX).min(answer.len());
                let mut writer = chain.writer(view);
                writer.write_all(&answer[..len]).map_err(DeviceError::host("answering a request"))?;
                let written = writer.written();
                Ok(Served::Done(chain, written))
            })
            .map(drop)
    }
}

fn read_request(view: &MemoryView, chain: &Chain) -> Result<Request, DeviceError> {
    let mut bytes = [0; REQUEST];
    let len = usize::try_from(chain.readable_len()).unwrap_or(usize::MAX).min(REQUEST);
    let read = chain.reader(view).read_exact(&mut bytes[..len]);
    read.map_err(DeviceError::host("reading a request"))?;
    let field = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let kind = field(0);
    let (needs, answer) = match kind {
        UNPLUG_ALL => (HEAD, ANSWER),
        STATE => (REQUEST, STATE_ANSWER),
        _ => (REQUEST, ANSWER),
    };
    if len < needs || chain.writable_len() < answer {
        return Err(DeviceError::Protocol(format!(
            "a request of {len} bytes with {} for the answer; type {kind} has {needs} and {answer}",
            chain.writable_len()
        )));
    }
    let mut address = [0; 8];
    address.copy_from_slice(&bytes[8..16]);
    Ok(Request { kind, address: u64::from_le_bytes(address), blocks: field(16) })
}

#[cfg(test)]
mod tests;
