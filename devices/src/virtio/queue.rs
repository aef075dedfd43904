//! A queue of an active device: a ring with its doorbell and its interrupt.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use log::warn;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::chain::Chain;
use super::device::Interrupt;
use super::packed::PackedRing;
use super::ring::{QueueLayout, RingError, RingFeatures, RingPosition, SharedPosition};
use super::split::SplitRing;
use super::{Memory, MemoryView};

/// A ring of either form.
#[derive(Debug)]
pub enum Ring {
    /// Split.
    Split(SplitRing),
    /// Packed.
    Packed(PackedRing),
}

/// Calls the same method of either form.
macro_rules! either {
    ($ring:expr, $inner:ident => $call:expr) => {
        match $ring {
            Ring::Split($inner) => $call,
            Ring::Packed($inner) => $call,
        }
    };
}

impl Ring {
    /// The ring at `layout`, from `position` on.
    ///
    /// # Errors
    /// It cannot be there.
    pub fn new(
        layout: &QueueLayout,
        features: RingFeatures,
        position: RingPosition,
        memory: &GuestMemoryMmap,
    ) -> Result<Self, RingError> {
        Ok(if features.packed {
            Self::Packed(PackedRing::new(layout, features, position, memory)?)
        } else {
            Self::Split(SplitRing::new(layout, features, position, memory)?)
        })
    }

    /// How far it has been served.
    pub fn position(&self) -> RingPosition {
        either!(self, ring => ring.position())
    }
}

/// What comes of looking at one chain.
#[derive(Debug)]
pub enum Served {
    /// It goes back now, with so many bytes written.
    Done(Chain, u32),
    /// The device keeps it, to give it back later.
    Kept,
    /// The device has no use for it now, nor for those behind it.
    NotNow(Chain),
}

/// A queue between DRIVER_OK and reset. Whoever serves it has it alone.
#[derive(Debug)]
pub struct ActiveQueue {
    index: u16,
    ring: Ring,
    layout: QueueLayout,
    memory: Memory,
    kick: Arc<EventFd>,
    interrupt: Arc<dyn Interrupt>,
    position: SharedPosition,
}

impl ActiveQueue {
    /// Number `index` of its device; `kick` is written by the driver's doorbell.
    pub fn new(
        index: u16,
        ring: Ring,
        layout: QueueLayout,
        memory: Memory,
        kick: Arc<EventFd>,
        interrupt: Arc<dyn Interrupt>,
        position: SharedPosition,
    ) -> Self {
        Self { index, ring, layout, memory, kick, interrupt, position }
    }

    /// Its number.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Where it lies in guest memory.
    pub fn layout(&self) -> &QueueLayout {
        &self.layout
    }

    /// Readable when the driver has rung the doorbell.
    pub fn kick(&self) -> &Arc<EventFd> {
        &self.kick
    }

    /// Guest memory as it is now.
    pub fn view(&self) -> MemoryView {
        self.memory.memory()
    }

    /// Guest memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// How to reach the driver.
    pub fn interrupt(&self) -> &Arc<dyn Interrupt> {
        &self.interrupt
    }

    /// The position as others see it: for who serves the ring by other means (vhost).
    pub fn shared_position(&self) -> &SharedPosition {
        &self.position
    }

    /// The next chain, if there is one.
    ///
    /// # Errors
    /// The driver has broken the ring.
    pub fn pop(&mut self, view: &MemoryView) -> Result<Option<Chain>, RingError> {
        let chain = either!(&mut self.ring, ring => ring.pop(view))?;
        self.position.set(self.ring.position());
        Ok(chain)
    }

    /// Puts back the chain that was taken last, to be taken again later.
    pub fn undo_pop(&mut self, chain: Chain) {
        either!(&mut self.ring, ring => ring.undo_pop(chain));
        self.position.set(self.ring.position());
    }

    /// Looks whether the next chain is as it must be, and takes none: for a queue of which nothing is wanted now, so that a driver hears of its
    /// mistake when it makes it.
    ///
    /// # Errors
    /// The driver has broken the ring.
    pub fn look(&mut self, view: &MemoryView) -> Result<(), RingError> {
        if let Some(chain) = self.pop(view)? {
            self.undo_pop(chain);
        }
        Ok(())
    }

    /// Gives a chain back to the driver, of which `written` bytes have been written. [`Self::notify`] tells the driver.
    ///
    /// # Errors
    /// The ring is not in memory any more.
    pub fn push(&mut self, view: &MemoryView, chain: Chain, written: u32) -> Result<(), RingError> {
        either!(&mut self.ring, ring => ring.push(view, chain, written))?;
        self.position.set(self.ring.position());
        Ok(())
    }

    /// Gives several chains back at once: the driver sees all of them or none, as it must where they are one packet.
    ///
    /// # Errors
    /// The ring is not in memory any more.
    pub fn push_all(
        &mut self,
        view: &MemoryView,
        chains: impl Iterator<Item = (Chain, u32)>,
    ) -> Result<(), RingError> {
        either!(&mut self.ring, ring => ring.push_all(view, chains))?;
        self.position.set(self.ring.position());
        Ok(())
    }

    /// Interrupts the driver, if it wants to hear of what was given back since the last call.
    ///
    /// # Errors
    /// The ring is not in memory any more.
    pub fn notify(&mut self, view: &MemoryView) -> Result<(), RingError> {
        if either!(&mut self.ring, ring => ring.wants_interrupt(view))? {
            self.interrupt.queue(self.index);
        }
        Ok(())
    }

    /// Asks the driver to ring for the next chain; whether there is one already.
    ///
    /// # Errors
    /// The ring is not in memory any more.
    pub fn enable_notification(&mut self, view: &MemoryView) -> Result<bool, RingError> {
        either!(&mut self.ring, ring => ring.enable_notification(view))
    }

    /// Asks the driver not to ring for now.
    ///
    /// # Errors
    /// The ring is not in memory any more.
    pub fn disable_notification(&mut self, view: &MemoryView) -> Result<(), RingError> {
        either!(&mut self.ring, ring => ring.disable_notification(view))
    }

    /// Serves all chains there are, tells the driver, and leaves the doorbell enabled. A driver that makes more and more available is
    /// served again by its own doorbell, which is rung for it, so that the device hears of other things between.
    ///
    /// Returns whether all chains were taken: `false` after [`Served::NotNow`], with the doorbell enabled all the same.
    ///
    /// # Errors
    /// What the driver has done to the ring, or `each` returns.
    pub fn serve<E: From<RingError>>(
        &mut self,
        mut each: impl FnMut(&MemoryView, Chain) -> Result<Served, E>,
    ) -> Result<bool, E> {
        let view = self.view();
        let mut left = u32::from(self.layout.size).saturating_mul(2);
        let all = 'out: loop {
            self.disable_notification(&view)?;
            while let Some(chain) = self.pop(&view)? {
                match each(&view, chain)? {
                    Served::Done(chain, written) => self.push(&view, chain, written)?,
                    Served::Kept => {}
                    Served::NotNow(chain) => {
                        self.undo_pop(chain);
                        self.enable_notification(&view)?;
                        break 'out false;
                    }
                }
                left = left.saturating_sub(1);
                if left == 0 {
                    self.enable_notification(&view)?;
                    self.ring_own_doorbell();
                    break 'out true;
                }
            }
            if !self.enable_notification(&view)? {
                break true;
            }
        };
        self.notify(&view)?;
        Ok(all)
    }

    /// Has the queue looked at again soon.
    pub fn ring_own_doorbell(&self) {
        static COMPLAINED: AtomicBool = AtomicBool::new(false);
        if let Err(e) = self.kick.write(1)
            && !COMPLAINED.swap(true, Ordering::Relaxed)
        {
            warn!("a queue's doorbell cannot be rung: {e}");
        }
    }
}

#[cfg(test)]
mod tests;
