//! What the bus asks of a PCI function (PCI Local Bus 3.0, section 6.1; PCI Express Base 6.0, section 7.5).

use std::fmt::Debug;

use crate::bdf::DevFn;

/// Number of a BAR: 0 to 5 as in the header, [`ROM_BAR`] for the expansion ROM.
pub type BarIndex = u8;

/// The [`BarIndex`] of the expansion ROM.
pub const ROM_BAR: BarIndex = 6;

/// One function on the bus.
///
/// All calls come from vCPU threads, several at once. Offsets and lengths are as the guest chose them but
/// already cut to the space they fall in: `offset + data.len()` never passes the end of config space (4096)
/// or of the BAR. An implementation never panics, never waits for power, and answers what it cannot serve
/// with all ones; writes it cannot take are dropped.
pub trait PciFunction: Debug + Send + Sync {
    /// Reads configuration space; `data` is 1, 2 or 4 bytes within one aligned dword.
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Writes configuration space; `data` is 1, 2 or 4 bytes within one aligned dword.
    fn config_write(&self, offset: u16, data: &[u8]);

    /// Reads from a BAR that the VMM traps (no memory slot stands there now).
    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]);

    /// Writes to a BAR that the VMM traps.
    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]);
}

/// A function that has a bus below it: routes configuration cycles by its bus number registers.
pub trait PciBridge: PciFunction {
    /// `(secondary, subordinate)` bus numbers as the guest last wrote them.
    fn bus_range(&self) -> (u8, u8);

    /// The function below at `devfn` on the secondary bus, if there is one.
    fn child(&self, devfn: DevFn) -> Option<std::sync::Arc<dyn PciFunction>>;
}
