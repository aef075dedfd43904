//! The machine's buses while they are filled: each device has its range, and no two have the same.

use std::sync::Arc;

use vm_device::bus::{MmioAddress, MmioRange, PioAddress, PioRange};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};
use vm_device::{DeviceMmio, DevicePio};

use crate::machine::MachineError;

/// The buses.
#[derive(Default)]
pub struct Buses(IoManager);

impl Buses {
    /// Puts a device on the bus of memory.
    ///
    /// # Errors
    /// The place is taken.
    pub fn mmio(
        &mut self,
        name: &'static str,
        base: u64,
        size: u64,
        device: Arc<dyn DeviceMmio + Send + Sync>,
    ) -> Result<(), MachineError> {
        let range = MmioRange::new(MmioAddress(base), size).map_err(|_| MachineError::Address(name))?;
        self.0.register_mmio(range, device).map_err(|_| MachineError::Address(name))
    }

    /// Puts a device on the bus of ports.
    ///
    /// # Errors
    /// The place is taken.
    pub fn pio(
        &mut self,
        name: &'static str,
        base: u16,
        size: u16,
        device: Arc<dyn DevicePio + Send + Sync>,
    ) -> Result<(), MachineError> {
        let range = PioRange::new(PioAddress(base), size).map_err(|_| MachineError::Address(name))?;
        self.0.register_pio(range, device).map_err(|_| MachineError::Address(name))
    }

    /// As vCPUs use them.
    pub fn finish(self) -> Arc<IoManager> {
        Arc::new(self.0)
    }
}
