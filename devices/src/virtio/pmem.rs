//! Persistent memory (VIRTIO 1.2, section 5.19): a file of the host in the guest's address space, and one queue of flushes.
//!
//! The memory stands beside guest RAM and is no part of it: no device reaches it, neither assigned ones by DMA nor the VMM's own through their
//! queues. A file can lose pages at any time, and only a vCPU that runs into that can be helped; see [`mod@file`].

pub mod file;
pub mod guard;

use std::fmt::Debug;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::warn;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

pub use self::file::{MappedFile, PmemError};
use self::guard::Guard;
use super::MemoryView;
use super::chain::Chain;
use super::device::{Activation, Active, DeviceError, DeviceType, F_RINGS, Saved, VirtioDevice};
use super::queue::{ActiveQueue, Served};
use super::worker::{Event, Handler, Watch, Worker};

const QUEUE_SIZE: u16 = 256;
/// Tokens of what the worker watches beside its queue.
const CHANGES: u32 = 0;
const TIMER: u32 = 1;
/// VIRTIO_PMEM_REQ_TYPE_FLUSH.
const FLUSH: u32 = 0;
const DONE: u32 = 0;
const FAILED: u32 = 1;

/// Where persistent memory can stand in a guest.
pub trait Places: Debug + Send + Sync {
    /// Shows `file` to the guest until the result is dropped, at guest address `at` if that is given.
    ///
    /// # Errors
    /// There is no room, or KVM refuses.
    fn place(&self, file: &Arc<MappedFile>, at: Option<u64>) -> io::Result<Box<dyn Placed>>;
}

/// A place that is taken. When its drop returns, the guest cannot reach the memory any more.
pub trait Placed: Debug + Send + Sync {
    /// Guest address.
    fn start(&self) -> u64;
}

/// The device, in one machine.
#[derive(Debug)]
pub struct Pmem {
    name: String,
    file: Arc<MappedFile>,
    places: Arc<dyn Places>,
    /// None while it is being moved, and after a move that failed.
    placed: Mutex<Option<Box<dyn Placed>>>,
}

impl Pmem {
    /// A device called `name` over `file`, which is shown to the guest.
    ///
    /// # Errors
    /// Of [`Places::place`].
    pub fn new(name: &str, file: Arc<MappedFile>, places: Arc<dyn Places>) -> io::Result<Self> {
        let placed = Mutex::new(Some(places.place(&file, None)?));
        Ok(Self { name: name.to_owned(), file, places, placed })
    }

    fn placed(&self) -> MutexGuard<'_, Option<Box<dyn Placed>>> {
        self.placed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self) -> u64 {
        self.placed().as_ref().map_or(0, |placed| placed.start())
    }
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> DeviceType {
        DeviceType::PMEM
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        F_RINGS
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&self.start().to_le_bytes());
        config[8..].copy_from_slice(&self.file.size().to_le_bytes());
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        config.iter().skip(from).zip(data).for_each(|(value, byte)| *byte = *value);
    }

    fn activate(&self, mut activation: Activation) -> Result<Box<dyn Active>, DeviceError> {
        let queue = activation.take_queue(0)?;
        let file = Arc::clone(&self.file);
        let guard = Guard::new(&file).map_err(DeviceError::host("watching the file"))?;
        let handler = Flusher { name: self.name.clone(), queue, file, guard, complained: false };
        Ok(Box::new(Worker::start(&self.name, Box::new(handler), activation.interrupt)?))
    }

    fn save(&self) -> Result<Saved, String> {
        if !self.file.keeps_writes() {
            return Err(
                "what the guest has written there is in no file that could be opened again (discard_writes=on, or a directory in place of a \
                 file); remove the device first"
                    .to_owned(),
            );
        }
        self.file.flush().map_err(|e| format!("its file cannot be written: {e}"))?;
        Ok(serde_json::json!({ "start": self.start() }))
    }

    fn restore(&self, saved: &Saved) -> Result<(), String> {
        let start = saved["start"].as_u64().ok_or("start is no address")?;
        if start == self.start() {
            return Ok(());
        }
        let mut placed = self.placed();
        // Its old place may overlap the new one.
        drop(placed.take());
        let moved = self.places.place(&self.file, Some(start));
        *placed = Some(moved.map_err(|e| format!("it cannot be at {start:#x} again: {e}"))?);
        Ok(())
    }
}

struct Flusher {
    name: String,
    queue: ActiveQueue,
    file: Arc<MappedFile>,
    guard: Guard,
    /// The last flush failed, and the log has it.
    complained: bool,
}

impl Handler for Flusher {
    fn doorbells(&self) -> Vec<(u16, Arc<EventFd>)> {
        vec![(self.queue.index(), Arc::clone(self.queue.kick()))]
    }

    fn start(&mut self, watch: &Watch) -> Result<(), DeviceError> {
        let added = watch.add(self.guard.changes(), EventSet::IN, CHANGES);
        added
            .and_then(|()| watch.add(self.guard.timer(), EventSet::IN, TIMER))
            .map_err(DeviceError::host("watching the file"))
    }

    fn event(&mut self, event: Event, _watch: &Watch) -> Result<(), DeviceError> {
        match event {
            Event::Ready(CHANGES, _) => {
                self.guard.changed();
                return Ok(());
            }
            Event::Ready(..) => {
                self.guard.look();
                return Ok(());
            }
            // Also when the driver starts and after a pause: it may have written.
            Event::Kick(_) => self.guard.flushed(),
        }
        // All that wait at this moment: one flush is enough for them.
        let mut flushes = Vec::new();
        self.queue.serve::<DeviceError>(|view, chain| {
            if request(view, &chain)? == FLUSH {
                flushes.push(chain);
                return Ok(Served::Kept);
            }
            answer(view, &chain, FAILED)?;
            Ok(Served::Done(chain, 4))
        })?;
        if flushes.is_empty() {
            return Ok(());
        }
        let status = self.flush();
        let view = self.queue.view();
        for chain in flushes {
            answer(&view, &chain, status)?;
            self.queue.push(&view, chain, 4)?;
        }
        Ok(self.queue.notify(&view)?)
    }
}

impl Flusher {
    fn flush(&mut self) -> u32 {
        match self.file.flush() {
            Ok(()) => {
                self.complained = false;
                DONE
            }
            Err(e) => {
                if !std::mem::replace(&mut self.complained, true) {
                    warn!(
                        "device {}: a flush has failed, and the guest is told: {e}; see the host's kernel log (dmesg)",
                        self.name
                    );
                }
                FAILED
            }
        }
    }
}

/// What is asked for.
fn request(view: &MemoryView, chain: &Chain) -> Result<u32, DeviceError> {
    if chain.readable_len() < 4 || chain.writable_len() < 4 {
        return Err(DeviceError::Protocol(format!(
            "a request of {} bytes with {} for the answer; both are 4 bytes",
            chain.readable_len(),
            chain.writable_len()
        )));
    }
    let mut request = [0; 4];
    chain.reader(view).read_exact(&mut request).map_err(DeviceError::host("reading a request"))?;
    Ok(u32::from_le_bytes(request))
}

fn answer(view: &MemoryView, chain: &Chain, status: u32) -> Result<(), DeviceError> {
    let written = chain.writer(view).write_all(&status.to_le_bytes());
    written.map_err(DeviceError::host("answering a request"))
}

#[cfg(test)]
mod tests;
