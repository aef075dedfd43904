//! What firmware leaves in guest memory: the ACPI tables and SMBIOS, made from the machine as it was assembled.

use acpi::platform::{
    EventDeviceDescription, FixedHardwareDescription, InterruptDescription, LegacyDeviceDescription,
    NumaDescription, PciDescription, PlatformDescription, ProcessorHotplugDescription, ResetDescription,
};
use acpi::smbios::SystemIdentity;
use arch::layout::{self, LayoutError, MemoryMap};
use devices::reset::RESET_VALUE;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The IOAPIC's own APIC ID. Nobody addresses it, but it must have one.
const IOAPIC_ID: u8 = 0;

/// The tables cannot be made or do not fit.
#[derive(Debug, thiserror::Error)]
pub enum FirmwareError {
    /// ACPI.
    #[error(transparent)]
    Acpi(#[from] acpi::tables::TableError),
    /// SMBIOS.
    #[error(transparent)]
    Smbios(#[from] acpi::smbios::SmbiosError),
    /// No room.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Guest memory does not reach that far.
    #[error("the firmware tables cannot be written to guest memory: {0}; this is a defect, please report it")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// What the tables say beyond what the memory map fixes.
#[derive(Debug)]
pub struct Description {
    /// APIC IDs in the order of the vCPUs.
    pub processors: Vec<u32>,
    /// How they come and go.
    pub processor_hotplug: Option<ProcessorHotplugDescription>,
    /// PCI segments with what is, or may come, there.
    pub pci: Vec<PciDescription>,
    /// Whether memory may be added.
    pub memory_slots: bool,
    /// What belongs to which node.
    pub numa: Option<NumaDescription>,
    /// Whether there is a serial port.
    pub serial: bool,
    /// Who made the machine.
    pub identity: SystemIdentity,
}

/// Writes all tables and returns the address of the RSDP. The map then says where they are.
pub fn write(
    memory: &GuestMemoryMmap,
    map: &mut MemoryMap,
    description: Description,
) -> Result<GuestAddress, FirmwareError> {
    let identity = description.identity.clone();
    let platform = platform(description);
    // Where the tables go depends on their size, and the addresses in them on where they go.
    let tables = acpi::tables::generate(&platform)?;
    let area = map.place_tables(tables.size())?;
    let tables = tables.place(area.0)?;
    for table in &tables.tables {
        memory.write_slice(&table.bytes, GuestAddress(table.address))?;
    }
    memory.write_slice(&acpi::smbios::build(&identity, layout::SMBIOS.0)?, layout::SMBIOS)?;
    Ok(GuestAddress(tables.rsdp))
}

fn platform(description: Description) -> PlatformDescription {
    let low = |address: u64| u32::try_from(address).unwrap_or(u32::MAX);
    let irq = |gsi: u32| u8::try_from(gsi).unwrap_or(u8::MAX);
    PlatformDescription {
        processors: description.processors,
        processor_hotplug: description.processor_hotplug,
        interrupts: InterruptDescription {
            local_apic_address: low(layout::LOCAL_APIC.start.0),
            io_apic_id: IOAPIC_ID,
            io_apic_address: low(layout::IOAPIC.start.0),
        },
        pci: description.pci,
        power_notification: layout::POWER_NOTIFICATION.start.0,
        event_device: EventDeviceDescription {
            address: layout::EVENT_DEVICE.start.0,
            gsi: layout::EVENT_DEVICE_GSI,
        },
        memory_slots: description.memory_slots.then_some(layout::MEMORY_SLOTS.start.0),
        numa: description.numa,
        fixed_hardware: FixedHardwareDescription {
            event_block: layout::PM1_EVENT_PORT,
            control_block: layout::PM1_EVENT_PORT + u16::from(acpi::pm1::EVENT_BLOCK_SIZE),
            sci: irq(layout::SCI_GSI),
        },
        reset: ResetDescription { address: layout::RESET_REGISTER.start.0, value: RESET_VALUE },
        serial: description
            .serial
            .then_some(LegacyDeviceDescription { port: layout::SERIAL_PORT, irq: irq(layout::SERIAL_GSI) }),
        rtc: Some(LegacyDeviceDescription { port: layout::CMOS_PORT, irq: irq(layout::RTC_GSI) }),
    }
}
