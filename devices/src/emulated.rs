//! PCI functions that are all the machine's own: what the machine asks of them beyond answering the bus.

use pci::assign::FunctionNeeds;
use pci::bar::Bar;
use pci::{DevFn, PciFunction};

/// A function without hardware behind it.
pub trait EmulatedFunction: PciFunction {
    /// What the operator calls it.
    fn name(&self) -> &str;

    /// Its place on its bus.
    fn devfn(&self) -> DevFn;

    /// What its BARs need.
    fn needs(&self) -> FunctionNeeds;

    /// Its BARs as the guest has placed them.
    fn bars(&self) -> Vec<Bar>;

    /// Quiesces it: until [`Self::resume`] it does nothing of its own accord.
    fn pause(&self) {}

    /// Undoes [`Self::pause`].
    fn resume(&self) {}

    /// Stops it for good, and returns when it has stopped.
    fn shutdown(&self) {}

    /// The guest has more memory than before, or less.
    fn memory_changed(&self) {}

    /// Bytes of memory that the guest has given up to it.
    fn withheld_memory(&self) -> u64 {
        0
    }

    /// What it has counted.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}
