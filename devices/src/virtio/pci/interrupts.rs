//! A virtio function's interrupts: MSI-X vectors and which cause has which, the interrupt status, and the flag of a device that has stopped
//! (VIRTIO 1.2, sections 4.1.4.5 and 4.1.5).
//!
//! Its locks are its own, so that a worker can interrupt the driver whatever a vCPU does with the function.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pci::cap::msix::{MsixCapability, MsixLayout, MsixLayoutError, MsixVectors};
use pci::interrupt::MsiAllocator;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::super::device::Interrupt;
use super::common::{CommonRegisters, NO_VECTOR};
use super::complain;

/// Bits of the interrupt status.
const STATUS_QUEUE: u8 = 1;
const STATUS_CONFIG: u8 = 2;

/// The interrupts of one function.
pub struct PciInterrupts {
    name: String,
    msix: Mutex<MsixVectors>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    status: AtomicU8,
    generation: AtomicU8,
    stopped: AtomicBool,
}

impl fmt::Debug for PciInterrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciInterrupts").field("name", &self.name).finish_non_exhaustive()
    }
}

impl PciInterrupts {
    pub(super) fn new(
        name: &str,
        layout: MsixLayout,
        allocator: Arc<dyn MsiAllocator>,
        queues: u16,
    ) -> Result<Self, MsixLayoutError> {
        Ok(Self {
            name: name.to_owned(),
            msix: Mutex::new(MsixVectors::new(MsixCapability::new(layout)?, allocator)),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            stopped: AtomicBool::new(false),
        })
    }

    fn msix(&self) -> MutexGuard<'_, MsixVectors> {
        self.msix.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signal(&self, vector: u16) {
        if vector != NO_VECTOR {
            self.msix().signal(vector);
        }
    }

    /// Takes over the vectors that the driver has chosen.
    pub(super) fn set_vectors(&self, common: &CommonRegisters) {
        self.config_vector.store(common.config_vector(), Ordering::Release);
        for (index, vector) in (0_u16..).zip(&self.queue_vectors) {
            vector.store(common.queue_vector(index), Ordering::Release);
        }
    }

    /// How often the configuration has changed.
    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    /// Whether the device has stopped and must be reset.
    pub(super) fn has_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Notes that the device has stopped, and why.
    pub(super) fn stop(&self, why: &str) {
        self.needs_reset(why);
    }

    /// The interrupt status; reading clears it.
    pub(super) fn take_status(&self) -> u8 {
        self.status.swap(0, Ordering::AcqRel)
    }

    /// As after a reset of the device. MSI-X is the function's and stays.
    pub(super) fn reset(&self) {
        self.stopped.store(false, Ordering::Release);
        self.status.store(0, Ordering::Release);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        self.queue_vectors.iter().for_each(|vector| vector.store(NO_VECTOR, Ordering::Release));
    }

    pub(super) fn capability_read(&self, at: u16, data: &mut [u8]) {
        self.msix().read(at, data);
    }

    pub(super) fn capability_write(&self, at: u16, data: &[u8]) {
        let _ = self.msix().write(at, data);
    }

    pub(super) fn table_read(&self, at: u64, data: &mut [u8]) {
        self.msix().table_read(at, data);
    }

    pub(super) fn table_write(&self, at: u64, data: &[u8]) {
        let _ = self.msix().table_write(at, data);
    }

    pub(super) fn pba_read(&self, at: u64, data: &mut [u8]) {
        self.msix().pba_read(at, data);
    }
}

impl Interrupt for PciInterrupts {
    fn queue(&self, index: u16) {
        self.status.fetch_or(STATUS_QUEUE, Ordering::AcqRel);
        if let Some(vector) = self.queue_vectors.get(usize::from(index)) {
            self.signal(vector.load(Ordering::Acquire));
        }
    }

    fn config(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.status.fetch_or(STATUS_CONFIG, Ordering::AcqRel);
        self.signal(self.config_vector.load(Ordering::Acquire));
    }

    fn needs_reset(&self, why: &str) {
        if !self.stopped.swap(true, Ordering::AcqRel) {
            complain(&self.name, why);
            self.config();
        }
    }

    fn queue_event(&self, index: u16) -> io::Result<EventFd> {
        let vector =
            self.queue_vectors.get(usize::from(index)).map_or(NO_VECTOR, |v| v.load(Ordering::Acquire));
        let mut msix = self.msix();
        if vector != NO_VECTOR {
            msix.reserve(vector);
        }
        match msix.vectors().get(vector) {
            Some(vector) => vector.eventfd().try_clone(),
            // Nobody is to hear of it.
            None => EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC),
        }
    }
}
