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
    let devfn = |device, function| DevFn::new(device, function).unwrap();
    let function = |device, number, resource: Option<u8>| FunctionDescription {
        devfn: devfn(device, number),
        resource: resource.map(ResourceIndex),
        place: None,
    };
    PlatformDescription {
        processors: vec![0, 1, 2, 3],
        interrupts: InterruptDescription {
            local_apic_address: 0xfee0_0000,
            io_apic_id: 0,
            io_apic_address: 0xfec0_0000,
        },
        pci: PciDescription {
            ecam: AddressRange { base: 0xe000_0000, size: 0x1000_0000 },
            mmio32: AddressRange { base: 0xc000_0000, size: 0x2000_0000 },
            mmio64: Some(AddressRange { base: 0x80_0000_0000, size: 0x70_0000_0000 }),
            io: PortRange { base: 0x1000, size: 0xf000 },
            intx_gsi_base: 16,
            root_ports: vec![
                RootPortDescription {
                    devfn: devfn(1, 0),
                    resource: Some(ResourceIndex(0)),
                    functions: vec![function(0, 0, Some(1)), function(0, 1, Some(200))],
                },
                RootPortDescription {
                    devfn: devfn(2, 0),
                    resource: None,
                    functions: vec![function(0, 0, None)],
                },
            ],
            functions: vec![
                function(3, 0, Some(33)),
                // An empty place, and one whose function can go.
                FunctionDescription { place: Some(10), ..function(10, 0, Some(34)) },
                FunctionDescription { place: Some(5), ..function(5, 0, None) },
            ],
        },
        power_notification: NOTIFICATION,
        event_device: EventDeviceDescription { address: EVENTS, gsi: 10 },
        fixed_hardware: FixedHardwareDescription { event_block: 0x600, control_block: 0x604, sci: 9 },
        reset: ResetDescription { address: 0xfed3_0000, value: 1 },
        serial: Some(LegacyDeviceDescription { port: 0x3f8, irq: 4 }),
        rtc: Some(LegacyDeviceDescription { port: 0x70, irq: 8 }),
    }
}

/// The tables of `platform`.
pub fn tables(platform: &PlatformDescription) -> AcpiTables {
    tables::generate(platform).unwrap().place(AREA).unwrap()
}
