//! The differentiated system description table: every device of the machine (ACPI 6.5, section 5.2.11.1).
//!
//! ```text
//! \_SB.MBRD  registers and configuration space that nothing else may use
//! \_SB.PCI0  the PCI Express hierarchy; PCI1 and so on: that of the other segments
//! \_SB.PWRB  power button
//! \_SB.GED   generic event device
//! \_SB.MEMn  memory devices that are added later
//! \_SB.COM1  serial port
//! \_SB.RTC   real-time clock
//! \_SB.Cnnn  processors
//! \_S5       soft-off, the only sleep state
//! ```

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, EISAName, IO, Interrupt, Memory32Fixed, Name, Package,
    ResourceTemplate, Scope, ZERO,
};

use crate::event_abi;
use crate::memory_abi;
use crate::notify_abi;
use crate::ops::Terms;
use crate::pci_root::{self, device};
use crate::platform::{AddressRange, LegacyDeviceDescription, PlatformDescription};
use crate::pm1;
use crate::{processor_abi, processors};

const SERIAL_PORT_COUNT: u8 = 8;
const RTC_PORT_COUNT: u8 = 2;

/// The contents of the table, without its header.
pub(crate) fn contents(platform: &PlatformDescription) -> Vec<u8> {
    let mut system_bus = Terms::new();
    motherboard(&mut system_bus, platform);
    for pci in &platform.pci {
        let nodes = platform.numa.iter().flat_map(|numa| &numa.pci_nodes);
        let node = nodes.into_iter().find(|(segment, _)| *segment == pci.segment).map(|(_, node)| *node);
        pci_root::host_bridge(&mut system_bus, pci, platform.power_notification, node);
    }
    crate::event_device::event_device(&mut system_bus, platform);
    if let Some(registers) = platform.memory_slots {
        crate::memory_devices::memory_devices(&mut system_bus, registers);
    }
    if let Some(serial) = platform.serial {
        legacy_device(&mut system_bus, "COM1", "PNP0501", serial, SERIAL_PORT_COUNT);
    }
    if let Some(rtc) = platform.rtc {
        legacy_device(&mut system_bus, "RTC_", "PNP0B00", rtc, RTC_PORT_COUNT);
    }
    processors::processors(&mut system_bus, platform);

    let mut dsdt = Terms::new();
    dsdt.push(&Scope::new("\\_SB_".into(), vec![&system_bus]));
    let soft_off = pm1::SLEEP_TYPE_SOFT_OFF;
    dsdt.push(&Name::new("\\_S5_".into(), &Package::new(vec![&soft_off, &soft_off, &ZERO, &ZERO])));
    dsdt.0
}

/// Claims what the drivers of other devices must not be given. Linux uses enhanced configuration space only when it is
/// claimed like this (PCI Firmware Specification 3.3, section 4.1.2).
fn motherboard(terms: &mut Terms, platform: &PlatformDescription) {
    let memory = |base: u64, size: u64| FixedMemory(AddressRange { base, size });
    let ports = |base: u16, count: u8| IO::new(base, base, 1, count);
    let configuration = platform.pci.iter().map(|pci| Box::new(FixedMemory(pci.ecam)) as Box<dyn Aml>);
    let mut resources: Vec<Box<dyn Aml>> = configuration.collect();
    let rest: [Box<dyn Aml>; 5] = [
        Box::new(memory(platform.power_notification, notify_abi::PAGE_SIZE)),
        Box::new(memory(platform.event_device.address, event_abi::block_size(platform.pci.len()))),
        Box::new(memory(platform.reset.address, 1)),
        Box::new(ports(platform.fixed_hardware.event_block, pm1::EVENT_BLOCK_SIZE)),
        Box::new(ports(platform.fixed_hardware.control_block, pm1::CONTROL_BLOCK_SIZE)),
    ];
    resources.extend(rest);
    if let Some(hotplug) = platform.processor_hotplug {
        resources.push(Box::new(memory(hotplug.registers, processor_abi::BLOCK_SIZE)));
    }
    if let Some(registers) = platform.memory_slots {
        resources.push(Box::new(memory(registers, memory_abi::BLOCK_SIZE)));
    }
    let mut board = Terms::new();
    board.push(&Name::new("_HID".into(), &EISAName::new("PNP0C02")));
    board.push(&Name::new("_UID".into(), &ZERO));
    let resources = resources.iter().map(AsRef::as_ref).collect();
    board.push(&Name::new("_CRS".into(), &ResourceTemplate::new(resources)));
    device(terms, "MBRD", &board);
}

/// A fixed range of memory space, above or below 4 GiB.
struct FixedMemory(AddressRange);

impl Aml for FixedMemory {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let AddressRange { base, size } = self.0;
        match (u32::try_from(base), u32::try_from(size)) {
            (Ok(base), Ok(size)) => Memory32Fixed::new(true, base, size).to_aml_bytes(sink),
            _ => {
                let last = base.saturating_add(size.saturating_sub(1));
                AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, base, last, None)
                    .to_aml_bytes(sink);
            }
        }
    }
}

/// A device at ISA ports and with an ISA interrupt. The clock must name its interrupt, or Linux gives it no alarm where
/// there is no legacy interrupt controller.
fn legacy_device(terms: &mut Terms, name: &str, id: &str, at: LegacyDeviceDescription, port_count: u8) {
    let mut children = Terms::new();
    children.push(&Name::new("_HID".into(), &EISAName::new(id)));
    children.push(&Name::new("_UID".into(), &ZERO));
    let ports = IO::new(at.port, at.port, 1, port_count);
    let interrupt = Interrupt::new(true, true, false, false, u32::from(at.irq));
    children.push(&Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])));
    device(terms, name, &children);
}
