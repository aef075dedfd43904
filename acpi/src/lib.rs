//! What firmware would tell the guest: ACPI tables and AML, and SMBIOS beside them.
//!
//! Everything is generated from a [`PlatformDescription`], plain data with every address in it. The register maps that AML
//! and the VMM's devices share are data too: [`notify_abi`], [`event_abi`], [`memory_abi`], [`pm1`] and [`processor_abi`].
//!
//! ```text
//! tables::generate ── fixed         FADT, MADT, MCFG, FACS
//!                  ├─ affinity      SRAT, SLIT
//!                  └─ dsdt ─┬─ pci_root ── device_power ── power_resource
//!                           ├─ event_device
//!                           ├─ memory_devices
//!                           └─ processors
//! smbios::build
//! ```

pub mod event_abi;
pub mod memory_abi;
pub mod notify_abi;
pub mod pci_root;
pub mod platform;
pub mod pm1;
pub mod processor_abi;
pub mod smbios;
pub mod tables;

mod affinity;
mod device_power;
mod dsdt;
mod event_device;
mod fixed;
mod memory_devices;
mod ops;
mod power_resource;
mod processors;

pub use event_abi::Event;
pub use notify_abi::ResourceIndex;
pub use platform::PlatformDescription;
pub use tables::{AcpiTables, PlacedTable, TableError, UnplacedTables};
