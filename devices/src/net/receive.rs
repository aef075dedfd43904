//! Packets to the guest: read from the tap straight into the driver's buffers (VIRTIO 1.2, section 5.1.6.3 and 5.1.6.4).
//!
//! With mergeable buffers a packet takes as many of them as it fills. So buffers for the longest packet are taken off the ring in advance, and what
//! a packet has left of them is kept for the next one. Where the driver has too few for that, the packet is read into memory of our own first: only
//! then is it known whether it fits.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read as _, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::warn;
use vm_memory::Bytes;

use super::shared::Shared;
use super::vectors::{Read, Vectors};
use super::{HEADER_LEN, PACKET_MAX, is_gone};
use crate::rate_limit::Limiter;
use crate::virtio::MemoryView;
use crate::virtio::chain::{Buffer, Chain};
use crate::virtio::device::DeviceError;
use crate::virtio::queue::ActiveQueue;

/// Where the header says how many buffers the packet takes (`num_buffers`).
const NUM_BUFFERS: u32 = 10;
/// Packets after which the driver is told of them, and others get their turn.
const BATCH: u32 = 64;
const TURN: u32 = 256;

/// Why receiving stops for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// The tap has no more.
    Drained,
    /// The driver has no buffer for more; it was asked to ring.
    NoBuffers,
    /// The rate limit, for so long.
    Limited(Duration),
    /// Others are to get their turn.
    Turn,
    /// There is no tap any more.
    Gone,
}

/// A chain that a packet can be put in.
#[derive(Debug)]
struct Posted {
    chain: Chain,
    room: u32,
    vectors: usize,
}

/// What there is of buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stock {
    Enough,
    Short,
    Empty,
}

/// The receiving side of a pair of queues.
#[derive(Debug)]
pub struct Receiver {
    queue: ActiveQueue,
    file: Arc<File>,
    shared: Arc<Shared>,
    limiter: Option<Arc<Limiter>>,
    mergeable: bool,
    posted: VecDeque<Posted>,
    /// Bytes of room in all of `posted`.
    room: u64,
    vectors: Vectors,
    /// A packet that has been read and not given to the driver.
    pending: Option<usize>,
    /// Where it is.
    bounce: Vec<u8>,
    /// Whether the driver has been asked to ring.
    listens: bool,
}

impl Receiver {
    /// From `file` to `queue`.
    pub fn new(
        queue: ActiveQueue,
        file: Arc<File>,
        shared: Arc<Shared>,
        limiter: Option<Arc<Limiter>>,
        mergeable: bool,
    ) -> Self {
        let vectors = Vectors::new(queue.view());
        Self {
            queue,
            file,
            shared,
            limiter,
            mergeable,
            posted: VecDeque::new(),
            room: 0,
            vectors,
            pending: None,
            bounce: Vec::new(),
            listens: true,
        }
    }

    /// The queue.
    pub fn queue(&self) -> &ActiveQueue {
        &self.queue
    }

    /// Moves packets until something is in the way.
    ///
    /// # Errors
    /// The driver has broken the ring or its own part of the protocol.
    pub fn run(&mut self) -> Result<Pause, DeviceError> {
        self.follow_memory()?;
        let result = self.packets();
        let view = self.vectors.view().clone();
        self.queue.notify(&view)?;
        result
    }

    fn packets(&mut self) -> Result<Pause, DeviceError> {
        for number in 1..=TURN {
            if let Some(Err(wait)) = self.limiter.as_ref().map(|limiter| limiter.ready(Instant::now())) {
                return Ok(Pause::Limited(wait));
            }
            let len = match self.packet()? {
                Ok(Some(len)) => len,
                Ok(None) => continue,
                Err(pause) => return Ok(pause),
            };
            let frame = len.saturating_sub(HEADER_LEN);
            self.shared.received.add(frame);
            if let Some(limiter) = &self.limiter {
                limiter.pay(frame as u64, 1);
            }
            if number % BATCH == 0 {
                let view = self.vectors.view().clone();
                self.queue.notify(&view)?;
            }
        }
        Ok(Pause::Turn)
    }

    /// Moves one packet: its length, `None` if it was dropped, or what is in the way.
    fn packet(&mut self) -> Result<Result<Option<usize>, Pause>, DeviceError> {
        if let Some(len) = self.pending {
            return self.give_pending(len);
        }
        let read = match self.fill()? {
            Stock::Empty => return Ok(Err(Pause::NoBuffers)),
            Stock::Short => {
                self.bounce.resize(PACKET_MAX + 1, 0);
                match (&*self.file).read(&mut self.bounce) {
                    Ok(len) if len > PACKET_MAX => Ok(Read::TooLong),
                    Ok(len) => {
                        self.pending = Some(len);
                        return self.give_pending(len);
                    }
                    Err(e) => Err(e),
                }
            }
            Stock::Enough => {
                let count = if self.mergeable { self.vectors.len() } else { self.posted[0].vectors };
                self.vectors.read(&self.file, count)
            }
        };
        Ok(match read {
            Ok(Read::Whole(len)) if len < HEADER_LEN => Ok(None),
            Ok(Read::Whole(len)) => {
                let count = self.count_for(len);
                let view = self.vectors.view().clone();
                self.note_count(&view, count)?;
                self.give_back(len, count)?;
                Ok(Some(len))
            }
            Ok(Read::TooLong) => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(None),
            Err(e) if is_gone(&e) => {
                warn!("packets cannot be read from the tap any more: {e}");
                Err(Pause::Gone)
            }
            Err(_) => Err(Pause::Drained),
        })
    }

    /// Takes chains off the ring until there is room for the longest packet.
    fn fill(&mut self) -> Result<Stock, DeviceError> {
        let wanted = if self.mergeable { self.shared.packet_max() as u64 } else { 1 };
        loop {
            if self.room >= wanted {
                if self.listens {
                    let view = self.vectors.view().clone();
                    self.queue.disable_notification(&view)?;
                    self.listens = false;
                }
                return Ok(Stock::Enough);
            }
            let view = self.vectors.view().clone();
            let Some(chain) = self.queue.pop(&view)? else {
                self.listens = true;
                if self.queue.enable_notification(&view)? {
                    continue;
                }
                return Ok(if self.posted.is_empty() { Stock::Empty } else { Stock::Short });
            };
            let room = chain.writable_len();
            if !chain.readable().is_empty() || (room as usize) < HEADER_LEN {
                return Err(DeviceError::Protocol(format!(
                    "a receive buffer of {room} bytes to write and {} to read",
                    chain.readable_len()
                )));
            }
            let Some(vectors) = self.vectors.add(chain.writable()) else {
                self.queue.undo_pop(chain);
                if self.posted.is_empty() {
                    return Err(DeviceError::Protocol("a receive buffer in too many pieces".to_owned()));
                }
                return Ok(Stock::Short);
            };
            self.room += u64::from(room);
            self.posted.push_back(Posted { chain, room, vectors });
        }
    }

    /// How many of the posted chains `len` bytes take.
    fn count_for(&self, len: usize) -> usize {
        let mut left = len as u64;
        let full = self.posted.iter().take_while(|posted| {
            let more = left > u64::from(posted.room);
            left = left.saturating_sub(posted.room.into());
            more
        });
        full.count() + 1
    }

    /// Gives the pending packet to the driver, if there is room for it.
    fn give_pending(&mut self, len: usize) -> Result<Result<Option<usize>, Pause>, DeviceError> {
        self.fill()?;
        let room = match self.posted.front() {
            None => return Ok(Err(Pause::NoBuffers)),
            Some(_) if self.mergeable => self.room,
            Some(first) => first.room.into(),
        };
        if len as u64 > room {
            // A driver that gives all that it has will not give more.
            let hopeless = !self.mergeable || self.posted.len() >= usize::from(self.queue.layout().size / 2);
            if !hopeless {
                return Ok(Err(Pause::NoBuffers));
            }
            self.pending = None;
            return Ok(Ok(None));
        }
        self.pending = None;
        if len < HEADER_LEN {
            return Ok(Ok(None));
        }
        let (count, view) = (self.count_for(len), self.vectors.view().clone());
        let mut rest = self.bounce.get(..len).unwrap_or_default();
        for posted in self.posted.iter().take(count) {
            let (piece, behind) = rest.split_at(rest.len().min(posted.room as usize));
            let written = posted.chain.writer(&view).write_all(piece);
            written.map_err(DeviceError::host("giving a packet to the guest"))?;
            rest = behind;
        }
        self.note_count(&view, count)?;
        self.give_back(len, count)?;
        Ok(Ok(Some(len)))
    }

    /// Writes into the header how many chains the packet takes. The tap leaves that to us.
    fn note_count(&self, view: &MemoryView, count: usize) -> Result<(), DeviceError> {
        let Some(first) = self.posted.front() else { return Ok(()) };
        let count = u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes();
        write_at(view, first.chain.writable(), NUM_BUFFERS, &count)
            .map_err(DeviceError::host("writing a packet's header"))
    }

    /// Gives the first `count` chains back with a packet of `len` bytes in them.
    fn give_back(&mut self, len: usize, count: usize) -> Result<(), DeviceError> {
        let Self { queue, posted, vectors, room, .. } = self;
        let view = vectors.view().clone();
        let mut left = u32::try_from(len).unwrap_or(u32::MAX);
        let mut used = 0;
        let chains = posted.drain(..count.min(posted.len())).map(|posted| {
            *room -= u64::from(posted.room);
            used += posted.vectors;
            let written = left.min(posted.room);
            left -= written;
            (posted.chain, written)
        });
        queue.push_all(&view, chains)?;
        vectors.drop_front(used);
        Ok(())
    }

    /// Looks at guest memory as it is now: what the driver makes available next may lie in new memory.
    fn follow_memory(&mut self) -> Result<(), DeviceError> {
        let now = self.queue.view();
        if std::ptr::eq(&raw const **self.vectors.view(), &raw const *now) {
            return Ok(());
        }
        self.vectors.restart(now);
        for posted in &self.posted {
            if self.vectors.add(posted.chain.writable()) != Some(posted.vectors) {
                return Err(DeviceError::Protocol("a receive buffer is in memory that has gone".to_owned()));
            }
        }
        Ok(())
    }

    /// Puts back all that was taken off the ring in advance.
    pub fn undo(&mut self) {
        while let Some(posted) = self.posted.pop_back() {
            self.queue.undo_pop(posted.chain);
        }
        self.room = 0;
        self.vectors.clear();
    }
}

/// Writes `data` at `offset` of what `buffers` are together.
fn write_at(view: &MemoryView, buffers: &[Buffer], mut offset: u32, data: &[u8]) -> io::Result<()> {
    let mut rest = data;
    for buffer in buffers {
        if offset >= buffer.len {
            offset -= buffer.len;
            continue;
        }
        let (piece, behind) = rest.split_at(rest.len().min((buffer.len - offset) as usize));
        let address = vm_memory::GuestAddress(buffer.address.0.wrapping_add(offset.into()));
        view.write_slice(piece, address).map_err(io::Error::other)?;
        (rest, offset) = (behind, 0);
        if rest.is_empty() {
            break;
        }
    }
    Ok(())
}
