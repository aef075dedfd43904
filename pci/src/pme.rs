//! Where a power management event goes (PCI Express Base 6.0, section 5.3.3; PCI-PM 1.2, section 3.2.4).

use std::fmt::Debug;

use crate::bdf::DevFn;

/// The requester id of a PME message: bus number and device/function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequesterId {
    /// Bus number as the guest numbered it.
    pub bus: u8,
    /// Device and function on that bus.
    pub devfn: DevFn,
}

impl RequesterId {
    /// The 16 bits as Root Status holds them (PCI Express Base 6.0, section 7.5.3.14).
    pub fn bits(self) -> u16 {
        u16::from(self.bus) << 8 | u16::from(self.devfn.bits())
    }
}

/// Takes PME messages from the functions below and tells the guest. A root port is one.
pub trait PmeSink: Debug + Send + Sync {
    /// Latches the message in Root Status and interrupts the guest. Returns `false` when the guest has not
    /// enabled PME interrupts on this port, so that the caller can choose another way.
    fn pme(&self, from: DevFn) -> bool;

    /// The power resource of the sink itself went on or off: a port that comes back is in D0.
    fn power(&self, on: bool) {
        let _ = on;
    }
}
