//! Assigned PCI functions: from the host's sysfs to a function on the guest's bus.
//!
//! [`host`] finds a function and its IOMMU group, [`check`] says why it cannot be assigned, [`bind`] hands it to
//! vfio-pci and back, unless the host still uses it ([`usage`]). [`open`] opens it, [`dma`] maps guest memory for it, [`layout`] reads what it consists of
//! ([`config`], [`bar`]), and [`function`] is the result on the guest's bus, with its interrupts in [`irq`].

pub mod bar;
pub mod bind;
pub mod check;
pub mod config;
pub mod dma;
pub mod doorbell;
pub mod function;
pub mod host;
pub mod host_signals;
pub mod irq;
pub mod layout;
pub mod open;
pub mod set_irqs;
pub mod usage;
