//! A virtio function's interrupts: MSI-X vectors and which cause has which, the interrupt status, and the flag of a device that has stopped
//! (VIRTIO 1.2, sections 4.1.4.5 and 4.1.5).
//!
//! Its locks are its own, so that a worker can interrupt the driver whatever a vCPU does with the function.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pci::cap::msix::{ENTRY_LEN, MsixCapability, MsixLayout, MsixLayoutError, MsixVectors};
use pci::interrupt::MsiAllocator;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::super::device::Interrupt;
use super::common::{CommonRegisters, NO_VECTOR};
use super::complain;

/// Message Control in the MSI-X capability.
const CONTROL: u16 = 2;

/// Bits of the interrupt status.
const STATUS_QUEUE: u8 = 1;
const STATUS_CONFIG: u8 = 2;

/// What is saved of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InterruptState {
    /// Message Control.
    control: u16,
    /// The table, as the guest reads it, 32 bits at a time.
    table: Vec<u32>,
    /// Vectors with a signal that is held back.
    pending: Vec<u16>,
    status: u8,
    generation: u8,
    stopped: bool,
}

/// The interrupts of one function.
pub struct PciInterrupts {
    name: String,
    msix: Mutex<MsixVectors>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    status: AtomicU8,
    generation: AtomicU8,
    stopped: AtomicBool,
    begins_paused: AtomicBool,
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
            begins_paused: AtomicBool::new(false),
        })
    }

    /// For [`Interrupt::begins_paused`].
    pub(super) fn set_begins_paused(&self, paused: bool) {
        self.begins_paused.store(paused, Ordering::Release);
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

    pub(super) fn save(&self) -> InterruptState {
        let mut msix = self.msix();
        let mut control = [0; 2];
        msix.read(CONTROL, &mut control);
        let vectors = msix.capability().layout().vectors;
        let words = u64::from(vectors) * ENTRY_LEN / 4;
        let table = (0..words).map(|word| {
            let mut value = [0; 4];
            msix.table_read(word * 4, &mut value);
            u32::from_le_bytes(value)
        });
        let table = table.collect();
        let pending = (0..vectors).filter(|vector| {
            let mut byte = [0];
            msix.pba_read(u64::from(vector / 8), &mut byte);
            byte[0] >> (vector % 8) & 1 != 0
        });
        let pending = pending.collect();
        InterruptState {
            control: u16::from_le_bytes(control),
            table,
            pending,
            status: self.status.load(Ordering::Acquire),
            generation: self.generation.load(Ordering::Acquire),
            stopped: self.has_stopped(),
        }
    }

    /// As saved. The vectors of the causes are [`Self::set_vectors`]'s.
    pub(super) fn restore(&self, saved: &InterruptState) {
        let mut msix = self.msix();
        for (at, value) in (0..).step_by(4).zip(&saved.table) {
            let _ = msix.table_write(at, &value.to_le_bytes());
        }
        let _ = msix.write(CONTROL, &saved.control.to_le_bytes());
        saved.pending.iter().for_each(|vector| msix.signal(*vector));
        drop(msix);
        self.status.store(saved.status, Ordering::Release);
        self.generation.store(saved.generation, Ordering::Release);
        self.stopped.store(saved.stopped, Ordering::Release);
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

    fn begins_paused(&self) -> bool {
        self.begins_paused.load(Ordering::Acquire)
    }
}
