//! Interrupts of an assigned function on the host's side: which mechanism VFIO signals, and into which eventfds.
//!
//! Follows `include/uapi/linux/vfio.h` (`VFIO_DEVICE_SET_IRQS`). Every call here wakes the function, so none is made
//! while the guest has it switched off; what changed meanwhile is made up for by [`HostIrqs::apply`] afterwards.
//!
//! As many host vectors are armed as the guest has use for, not as many as its table has: hosts with many
//! functions run out of vectors otherwise. They are armed together, when the driver enables the capability; where it
//! uses more later and the kernel cannot add to armed vectors, they are disarmed and armed again.

use std::io;
use std::sync::Arc;

use log::{debug, warn};
use pci::interrupt::{IntxLine, MsiVector};
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
};

use super::open::Handle;
use super::set_irqs::{self, ArmError};

/// What the guest wants signalled.
#[derive(Clone, Debug)]
pub enum Wanted {
    /// Nothing.
    None,
    /// The INTx line.
    Intx,
    /// Message vectors, by number; at least one.
    Vectors {
        /// VFIO's index of MSI or MSI-X.
        index: u32,
        /// The vectors.
        vectors: Vec<Arc<dyn MsiVector>>,
    },
}

impl Wanted {
    /// MSI vectors, by number.
    pub fn msi(vectors: Vec<Arc<dyn MsiVector>>) -> Self {
        Self::vectors_of(VFIO_PCI_MSI_IRQ_INDEX, vectors)
    }

    /// MSI-X vectors, by table entry.
    pub fn msix(vectors: Vec<Arc<dyn MsiVector>>) -> Self {
        Self::vectors_of(VFIO_PCI_MSIX_IRQ_INDEX, vectors)
    }

    /// A driver may enable a capability before it has programmed any vector: VFIO cannot arm none.
    fn vectors_of(index: u32, vectors: Vec<Arc<dyn MsiVector>>) -> Self {
        if vectors.is_empty() { Self::None } else { Self::Vectors { index, vectors } }
    }

    fn index(&self) -> Option<u32> {
        match self {
            Self::None => None,
            Self::Intx => Some(VFIO_PCI_INTX_IRQ_INDEX),
            Self::Vectors { index, .. } => Some(*index),
        }
    }

    fn vectors(&self) -> &[Arc<dyn MsiVector>] {
        match self {
            Self::Vectors { vectors, .. } => vectors,
            Self::None | Self::Intx => &[],
        }
    }

    /// Whether arming `other` instead of `self` would change nothing.
    fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Vectors { vectors, .. }, Self::Vectors { vectors: others, .. }) => {
                self.index() == other.index()
                    && vectors.len() == others.len()
                    && vectors.iter().zip(others).all(|(vector, other)| Arc::ptr_eq(vector, other))
            }
            _ => self.index() == other.index(),
        }
    }
}

/// What of a function's interrupts is armed on the host.
#[derive(Debug)]
pub struct HostIrqs {
    armed: Wanted,
    intx: Option<Arc<dyn IntxLine>>,
}

impl HostIrqs {
    /// Nothing armed. `intx`: the function's line, when it has one.
    pub fn new(intx: Option<Arc<dyn IntxLine>>) -> Self {
        Self { armed: Wanted::None, intx }
    }

    /// Whether the function can use INTx.
    pub fn has_intx(&self) -> bool {
        self.intx.is_some()
    }

    /// Arms what the guest wants, if it is not armed already. The function must be powered.
    ///
    /// What the host refuses is logged: the guest then sees a device whose interrupts do not come.
    pub fn apply(&mut self, handle: &Handle, wanted: Wanted) {
        if self.armed.same(&wanted) {
            return;
        }
        // What is armed can be changed in place, but more vectors only where the kernel can add to them.
        let in_place = self.armed.index() == wanted.index()
            && (wanted.vectors().len() <= self.armed.vectors().len()
                || wanted.index().is_some_and(|index| !handle.irq_count(index).1));
        if !in_place {
            self.disarm(handle);
        }
        if let Err(e) = self.arm(handle, &wanted) {
            warn!("device {}: its interrupts cannot be armed: {e}", handle.name());
            // A call that fails takes the vectors away that were armed before it.
            let old = self.armed.clone();
            self.disarm(handle);
            let rest = match (&wanted, e) {
                (Wanted::Vectors { index, vectors }, ArmError::TooFew { available, .. }) => {
                    Wanted::vectors_of(*index, vectors.iter().take(available).cloned().collect())
                }
                _ => old,
            };
            if let Err(e) = self.arm(handle, &rest) {
                warn!("device {}: its driver will wait for interrupts in vain: {e}", handle.name());
            }
        }
    }

    fn arm(&mut self, handle: &Handle, wanted: &Wanted) -> Result<(), ArmError> {
        match wanted {
            Wanted::None => {}
            Wanted::Intx => self.arm_intx(handle)?,
            Wanted::Vectors { index, vectors } => set_irqs::arm(handle, *index, vectors)?,
        }
        debug!("device {}: interrupts armed: {wanted:?}", handle.name());
        self.armed = wanted.clone();
        Ok(())
    }

    /// Disarms INTx, if that is what is armed. [`apply`](Self::apply) arms it again.
    pub fn quiesce_intx(&mut self, handle: &Handle) {
        if matches!(self.armed, Wanted::Intx) {
            self.disarm(handle);
        }
    }

    fn disarm(&mut self, handle: &Handle) {
        let armed = std::mem::replace(&mut self.armed, Wanted::None);
        if let Some(index) = armed.index()
            && let Err(e) = handle.device().disable_irq(index)
        {
            warn!("device {}: its interrupts cannot be disarmed: {e}", handle.name());
        }
    }

    fn arm_intx(&self, handle: &Handle) -> Result<(), ArmError> {
        let Some(line) = &self.intx else { return Ok(()) };
        let device = handle.device();
        device
            .enable_irq(VFIO_PCI_INTX_IRQ_INDEX, vec![line.trigger()])
            .and_then(|()| device.set_irq_resample_fd(VFIO_PCI_INTX_IRQ_INDEX, vec![line.resample()]))
            .map_err(|e| ArmError::Refused(io::Error::other(e)))
    }
}
