//! News of the guest's panics on their way to operators: Cloud Hypervisor's event.

use devices::pvpanic::{Panic, PanicSink};

use crate::events::Events;

/// Panics as events.
#[derive(Debug)]
pub struct PanicTeller(pub Events);

impl PanicSink for PanicTeller {
    fn panicked(&self, panic: Panic) {
        self.0.tell_with("guest", "panic", [("event", panic.to_string())].into());
    }
}
