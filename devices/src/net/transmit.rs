//! Packets from the guest: written to the tap straight from the driver's buffers (VIRTIO 1.2, section 5.1.6.2).

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::warn;

use super::shared::Shared;
use super::vectors::Vectors;
use super::{HEADER_LEN, PACKET_MAX};
use crate::rate_limit::Limiter;
use crate::virtio::chain::Chain;
use crate::virtio::device::DeviceError;
use crate::virtio::queue::ActiveQueue;

/// Packets after which the driver is told that they are on their way, and others get their turn.
const BATCH: u32 = 64;
const TURN: u32 = 512;

/// Why sending stops for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// The driver has no more; it was asked to ring.
    Drained,
    /// The rate limit, for so long.
    Limited(Duration),
    /// The tap takes no more.
    Full,
    /// Others are to get their turn.
    Turn,
}

/// What became of a packet.
enum Fate {
    Sent(usize),
    Dropped,
    Full,
}

/// The sending side of a pair of queues.
#[derive(Debug)]
pub struct Sender {
    queue: ActiveQueue,
    file: Arc<File>,
    shared: Arc<Shared>,
    limiter: Option<Arc<Limiter>>,
    vectors: Vectors,
    /// A packet that is in too many pieces.
    bounce: Vec<u8>,
    /// Whether the tap has gone: what is sent is dropped.
    gone: bool,
}

impl Sender {
    /// From `queue` to `file`.
    pub fn new(
        queue: ActiveQueue,
        file: Arc<File>,
        shared: Arc<Shared>,
        limiter: Option<Arc<Limiter>>,
    ) -> Self {
        let vectors = Vectors::new(queue.view());
        Self { queue, file, shared, limiter, vectors, bounce: Vec::new(), gone: false }
    }

    /// The queue.
    pub fn queue(&self) -> &ActiveQueue {
        &self.queue
    }

    /// Whether the tap turned out to have gone.
    pub fn is_gone(&self) -> bool {
        self.gone
    }

    /// There is no tap any more.
    pub fn set_gone(&mut self) {
        self.gone = true;
    }

    /// Moves packets until something is in the way.
    ///
    /// # Errors
    /// The driver has broken the ring.
    pub fn run(&mut self) -> Result<Pause, DeviceError> {
        let view = self.queue.view();
        self.vectors.restart(view.clone());
        let pause = self.packets();
        self.vectors.clear();
        self.queue.notify(&view)?;
        pause
    }

    fn packets(&mut self) -> Result<Pause, DeviceError> {
        let view = self.vectors.view().clone();
        self.queue.disable_notification(&view)?;
        let mut number = 0;
        loop {
            let Some(chain) = self.queue.pop(&view)? else {
                if self.queue.enable_notification(&view)? {
                    self.queue.disable_notification(&view)?;
                    continue;
                }
                return Ok(Pause::Drained);
            };
            if let Some(Err(wait)) = self.limiter.as_ref().map(|limiter| limiter.ready(Instant::now())) {
                self.queue.undo_pop(chain);
                return Ok(Pause::Limited(wait));
            }
            match self.send(&chain)? {
                Fate::Sent(frame) => {
                    self.shared.sent.add(frame);
                    if let Some(limiter) = &self.limiter {
                        limiter.pay(frame as u64, 1);
                    }
                }
                Fate::Dropped => {}
                Fate::Full => {
                    self.queue.undo_pop(chain);
                    return Ok(Pause::Full);
                }
            }
            self.queue.push(&view, chain, 0)?;
            number += 1;
            if number % BATCH == 0 {
                self.queue.notify(&view)?;
            }
            if number == TURN {
                return Ok(Pause::Turn);
            }
        }
    }

    fn send(&mut self, chain: &Chain) -> Result<Fate, DeviceError> {
        let len = chain.readable_len() as usize;
        // What no driver sends is dropped, as the wire would.
        if self.gone || len <= HEADER_LEN || len > PACKET_MAX || !chain.writable().is_empty() {
            return Ok(Fate::Dropped);
        }
        self.vectors.clear();
        let written = match self.vectors.add(chain.readable()) {
            Some(_) => self.vectors.write(&self.file),
            None => {
                self.bounce.clear();
                let mut reader = chain.reader(self.vectors.view());
                reader
                    .read_to_end(&mut self.bounce)
                    .map_err(DeviceError::host("reading a packet of the guest"))?;
                (&*self.file).write(&self.bounce)
            }
        };
        match written {
            Ok(_) => Ok(Fate::Sent(len - HEADER_LEN)),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock) => Ok(Fate::Full),
            Err(e) if e.raw_os_error() == Some(libc::EBADFD) => {
                warn!("packets cannot be written to the tap any more: {e}");
                self.gone = true;
                Ok(Fate::Dropped)
            }
            // A header that makes no sense, or a tap that is down.
            Err(_) => Ok(Fate::Dropped),
        }
    }
}
