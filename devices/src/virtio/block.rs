//! The block device (VIRTIO 1.2, section 5.2): a [`Disk`] for the guest, with a thread for each queue.
//!
//! A raw image is read and written by io_uring, many requests at a time, where the host has it; else, and for other images, each queue does one
//! request after the other. What fails on the host fails for the guest: the request's status says so, and the log, not too often.

mod config;
mod request;
mod worker;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use log::{info, warn};

use self::config::ConfigLayout;
use self::worker::QueueTask;
use super::device::{Activation, Active, DeviceError, DeviceType, F_RINGS, Interrupt, Saved, VirtioDevice};
use super::worker::{Worker, Workers};
use crate::block::counters::Counters;
use crate::block::{Disk, Image, SECTOR};
use crate::rate_limit::Limiter;

/// VIRTIO_BLK_F_SIZE_MAX and those that follow: section 5.2.3.
const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Bytes of VIRTIO_BLK_T_GET_ID.
const SERIAL_LEN: usize = 20;
/// How often a disk's failures are told.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);

/// How a disk is shown to the guest.
#[derive(Debug, Default)]
pub struct BlockOptions {
    /// Queues, at least one.
    pub num_queues: u16,
    /// Descriptors of each: a power of two.
    pub queue_size: u16,
    /// Processors of the host for the threads of some queues.
    pub affinity: Vec<(u16, Vec<usize>)>,
    /// Serial number; made from the file's numbers if absent.
    pub serial: Option<String>,
    /// Limits, perhaps those of a group.
    pub limiter: Option<Arc<Limiter>>,
    /// Whether io_uring is left alone.
    pub disable_io_uring: bool,
}

/// Why a disk cannot have another size.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// It is only read.
    #[error("disk {name} is readonly and cannot be resized; resize the image, and add it anew")]
    ReadOnly {
        /// The disk.
        name: String,
    },
    /// No number of sectors.
    #[error("disk {name} cannot have {size} bytes: a disk is a whole number of sectors of 512 bytes")]
    Sectors {
        /// The disk.
        name: String,
        /// What was asked for.
        size: u64,
    },
    /// The host.
    #[error("disk {name} cannot be made {size} bytes: {source}; see that its file system has room")]
    Host {
        /// The disk.
        name: String,
        /// What was asked for.
        size: u64,
        /// How it failed.
        source: std::io::Error,
    },
}

/// The device.
#[derive(Debug)]
pub struct Block {
    shared: Arc<Shared>,
    options: BlockOptions,
    features: u64,
}

/// What the device and the threads of its queues have in common.
#[derive(Debug)]
struct Shared {
    name: String,
    disk: Disk,
    serial: [u8; SERIAL_LEN],
    limiter: Option<Arc<Limiter>>,
    counters: Counters,
    /// The cache mode that the driver has chosen: whether a write may wait for a flush to be safe.
    writeback: AtomicBool,
    /// The driver does not know of flushes: every write is made safe.
    no_flush: AtomicBool,
    complaints: Mutex<Complaints>,
    /// The way to the driver of now.
    interrupt: Mutex<Option<Weak<dyn Interrupt>>>,
}

#[derive(Debug, Default)]
struct Complaints {
    last: Option<Instant>,
    kept_quiet: u64,
}

impl Shared {
    /// Sectors that there are.
    fn sectors(&self) -> u64 {
        self.disk.image.size() / SECTOR
    }

    /// Whether a write must be on stable storage when it is done.
    fn is_writethrough(&self) -> bool {
        self.no_flush.load(Ordering::Relaxed) || !self.writeback.load(Ordering::Relaxed)
    }

    /// Tells of a failed access: the first, and then what has come in between.
    fn complain(&self, what: &str, error: &std::io::Error) {
        let mut complaints = self.complaints.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if complaints.last.is_some_and(|last| now.saturating_duration_since(last) < COMPLAINT_INTERVAL) {
            complaints.kept_quiet = complaints.kept_quiet.saturating_add(1);
            return;
        }
        complaints.last = Some(now);
        let others = std::mem::take(&mut complaints.kept_quiet);
        drop(complaints);
        let others =
            if others == 0 { String::new() } else { format!(" ({others} more since the last such line)") };
        warn!(
            "disk {} ({}): {what} failed, and the guest is told so: {error}{others}; look at the host's file system and its storage",
            self.name,
            self.disk.path.display()
        );
    }
}

impl Block {
    /// A device called `name` for this disk.
    pub fn new(name: &str, disk: Disk, options: BlockOptions) -> Self {
        let mut features =
            F_RINGS | F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_FLUSH | F_CONFIG_WCE;
        if disk.readonly {
            features |= F_RO;
        } else {
            features |= F_WRITE_ZEROES | if disk.sparse { F_DISCARD } else { 0 };
        }
        if options.num_queues > 1 {
            features |= F_MQ;
        }
        let mut serial = [0; SERIAL_LEN];
        let text = options.serial.as_deref().unwrap_or(&disk.serial);
        serial.iter_mut().zip(text.bytes()).for_each(|(byte, from)| *byte = from);
        let shared = Shared {
            name: name.to_owned(),
            disk,
            serial,
            limiter: options.limiter.clone(),
            counters: Counters::default(),
            writeback: AtomicBool::new(true),
            no_flush: AtomicBool::new(false),
            complaints: Mutex::default(),
            interrupt: Mutex::default(),
        };
        Self { shared: Arc::new(shared), options, features }
    }

    /// Gives the disk another size, and tells the driver.
    ///
    /// # Errors
    /// See [`ResizeError`].
    pub fn resize(&self, size: u64) -> Result<(), ResizeError> {
        let name = || self.shared.name.clone();
        if self.shared.disk.readonly {
            return Err(ResizeError::ReadOnly { name: name() });
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(ResizeError::Sectors { name: name(), size });
        }
        self.shared.disk.image.resize(size).map_err(|source| ResizeError::Host {
            name: name(),
            size,
            source,
        })?;
        info!("disk {} has {size} bytes now", self.shared.name);
        let interrupt = self.shared.interrupt.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(interrupt) = interrupt.as_ref().and_then(Weak::upgrade) {
            interrupt.config();
        }
        Ok(())
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.shared.disk.image.size()
    }

    fn layout(&self) -> ConfigLayout {
        ConfigLayout {
            sectors: self.shared.sectors(),
            queue_size: self.options.queue_size,
            num_queues: self.options.num_queues,
            topology: self.shared.disk.image.topology(),
            writeback: self.shared.writeback.load(Ordering::Relaxed),
            unmaps: self.shared.disk.sparse,
        }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::BLOCK
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.options.queue_size; self.options.num_queues.max(1).into()]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.layout().read(offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if let Some(writeback) = ConfigLayout::written(offset, data) {
            self.shared.writeback.store(writeback, Ordering::Relaxed);
        }
    }

    fn activate(&self, activation: Activation) -> Result<Box<dyn Active>, DeviceError> {
        let shared = &self.shared;
        shared.no_flush.store(!activation.has(F_FLUSH), Ordering::Relaxed);
        if !activation.has(F_CONFIG_WCE) {
            shared.writeback.store(true, Ordering::Relaxed);
        }
        *shared.interrupt.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Arc::downgrade(&activation.interrupt));
        let by_uring = !self.options.disable_io_uring && matches!(shared.disk.image, Image::Raw(_));
        let mut workers = Vec::new();
        for queue in activation.queues {
            let index = queue.index();
            let affinity = self.options.affinity.iter().find(|(queue, _)| *queue == index);
            let cpus = affinity.map(|(_, cpus)| cpus.clone()).unwrap_or_default();
            let task = QueueTask::new(queue, Arc::clone(shared), cpus, by_uring);
            let name = format!("{}_q{index}", shared.name);
            workers.push(Worker::start(&name, Box::new(task), Arc::clone(&activation.interrupt))?);
        }
        Ok(Box::new(Workers(workers)))
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.shared.counters.list()
    }

    fn save(&self) -> Result<Saved, String> {
        Ok(serde_json::json!({
            "size": self.shared.disk.image.size(),
            "writeback": self.shared.writeback.load(Ordering::Relaxed),
        }))
    }

    fn restore(&self, saved: &Saved) -> Result<(), String> {
        let size = self.shared.disk.image.size();
        let then = saved.get("size").and_then(Saved::as_u64);
        if then.is_some_and(|then| then != size) {
            return Err(format!(
                "disk {} ({}) had {} bytes when it was saved and has {size} now: restore the image that belongs to the snapshot",
                self.shared.name,
                self.shared.disk.path.display(),
                then.unwrap_or(0)
            ));
        }
        if let Some(writeback) = saved.get("writeback").and_then(Saved::as_bool) {
            self.shared.writeback.store(writeback, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
