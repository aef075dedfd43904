//! Where a wake goes: `Notify(function, 2)` through the event device at run time (ACPI 6.5, section 5.6.6), the root port's
//! native PME where the event device's interrupt is not delivered, as in suspend-to-idle (PCI Express Base 6.0, section 5.3.3).

use std::fmt::Debug;

/// Tells the guest that WAKE bits of the notification device have changed. The event device is one.
pub trait WakeSink: Debug + Send + Sync {
    /// Latches the wake event and interrupts the guest. Called from worker threads; must not block.
    fn notify(&self);
}
