//! Doorbells: where the guest's stores reach the queues' eventfds without an exit, and the way for those that do exit.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

/// Connects guest addresses to eventfds. `vmm` implements it on KVM's ioeventfd.
pub trait DoorbellMapper: Debug + Send + Sync {
    /// Has every store of the guest at `address` signal `event`, until the result is dropped.
    ///
    /// # Errors
    /// It cannot be; the store is then trapped like any other.
    fn map(&self, address: u64, event: &Arc<EventFd>) -> io::Result<Box<dyn Doorbell>>;
}

/// A standing connection.
pub trait Doorbell: Debug + Send + Sync {}

/// The doorbells of one function.
#[derive(Debug)]
pub(super) struct Doorbells {
    mapper: Arc<dyn DoorbellMapper>,
    events: Vec<Option<Arc<EventFd>>>,
    connected: Vec<Box<dyn Doorbell>>,
}

impl Doorbells {
    pub(super) fn new(mapper: Arc<dyn DoorbellMapper>, queues: usize) -> Self {
        Self { mapper, events: vec![None; queues], connected: Vec::new() }
    }

    /// The queue has an eventfd now.
    pub(super) fn set(&mut self, index: u16, event: Arc<EventFd>) {
        if let Some(place) = self.events.get_mut(usize::from(index)) {
            *place = Some(event);
        }
    }

    /// No queue has an eventfd any more.
    pub(super) fn forget(&mut self) {
        self.events.fill(None);
    }

    /// Connects all eventfds there are, the first at `base`.
    pub(super) fn connect(&mut self, base: u64, step: u64) -> io::Result<()> {
        self.connected.clear();
        for (index, event) in (0_u64..).zip(&self.events) {
            if let Some(event) = event {
                let address = base.wrapping_add(index.wrapping_mul(step));
                self.connected.push(self.mapper.map(address, event)?);
            }
        }
        Ok(())
    }

    pub(super) fn disconnect(&mut self) {
        self.connected.clear();
    }

    /// A store that was trapped.
    pub(super) fn ring(&self, index: u16) {
        if let Some(Some(event)) = self.events.get(usize::from(index)) {
            // It can only fail if the counter is full, and then it is readable.
            let _ = event.write(1);
        }
    }
}
