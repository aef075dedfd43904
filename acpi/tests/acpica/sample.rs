//! A machine with one of everything.

use acpi::notify_abi::ResourceIndex;
use acpi::platform::*;
use acpi::tables::{self, AcpiTables};
use pci::DevFn;

/// Where the tables go.
pub const AREA: u64 = 0xe_0000;
/// The power notification device's page.
pub const NOTIFICATION: u64 = 0xfed1_0000;
/// The event device's register.
pub const EVENTS: u64 = 0xfed2_0000;

/// Port 1.0 (resource 0) with functions 0.0 (resource 1) and 0.1 (resource 200), port 2.0 without power control and
/// function 0.0 below it; function 3.0 (resource 33) on bus 0, and a.0 (resource 34) and 5.0 that come and go.
pub fn machine() -> PlatformDescription {
    PlatformDescription {
        processors: vec![0, 1, 2, 3],
        processor_hotplug: None,
        interrupts: InterruptDescription {
            local_apic_address: 0xfee0_0000,
            io_apic_id: 0,
            io_apic_address: 0xfec0_0000,
        },
        pci: vec![PciDescription {
            segment: 0,
            ecam: AddressRange { base: 0xe000_0000, size: 0x1000_0000 },
            mmio32: AddressRange { base: 0xc000_0000, size: 0x2000_0000 },
            mmio64: Some(AddressRange { base: 0x80_0000_0000, size: 0x70_0000_0000 }),
            io: Some(PortRange { base: 0x1000, size: 0xf000 }),
            intx_gsi_base: 16,
            root_ports: vec![slot(1, Some(0), &[Some(1), Some(200)]), slot(2, None, &[None])],
            functions: vec![
                function(3, 0, Some(33)),
                // An empty place, and one whose function can go.
                FunctionDescription { place: Some(10), ..function(10, 0, Some(34)) },
                FunctionDescription { place: Some(5), ..function(5, 0, None) },
            ],
        }],
        power_notification: NOTIFICATION,
        event_device: EventDeviceDescription { address: EVENTS, gsi: 10 },
        memory_slots: None,
        numa: None,
        fixed_hardware: FixedHardwareDescription { event_block: 0x600, control_block: 0x604, sci: 9 },
        reset: ResetDescription { address: 0xfed3_0000, value: 1 },
        serial: Some(LegacyDeviceDescription { port: 0x3f8, irq: 4 }),
        rtc: Some(LegacyDeviceDescription { port: 0x70, irq: 8 }),
    }
}

/// A root port on bus 0 and the functions below it, by their power resources.
pub fn slot(device: u8, resource: Option<u8>, functions: &[Option<u8>]) -> RootPortDescription {
    let functions = (0..).zip(functions).map(|(number, resource)| function(0, number, *resource));
    RootPortDescription {
        devfn: DevFn::new(device, 0).unwrap(),
        resource: resource.map(ResourceIndex),
        functions: functions.collect(),
    }
}

/// Two nodes with a processor and memory each, of which one can have more, and a function that is a node of its own.
pub fn nodes() -> NumaDescription {
    let memory =
        |base, size, node, hotplug| MemoryAffinity { range: AddressRange { base, size }, node, hotplug };
    NumaDescription {
        nodes: 3,
        processors: vec![(0, 0), (1, 1)],
        memory: vec![
            memory(0, 0x4000_0000, 0, false),
            memory(0x4000_0000, 0x4000_0000, 1, false),
            memory(0x1_0000_0000, 0x8000_0000, 1, true),
        ],
        initiators: vec![InitiatorAffinity { segment: 0, bus: 1, devfn: DevFn::new(0, 0).unwrap(), node: 2 }],
        distances: vec![(0, 1, 21), (1, 0, 21), (0, 2, 40)],
        pci_nodes: Vec::new(),
    }
}

fn function(device: u8, number: u8, resource: Option<u8>) -> FunctionDescription {
    FunctionDescription {
        devfn: DevFn::new(device, number).unwrap(),
        resource: resource.map(ResourceIndex),
        place: None,
    }
}

/// The tables of `platform`.
pub fn tables(platform: &PlatformDescription) -> AcpiTables {
    tables::generate(platform).unwrap().place(AREA).unwrap()
}
