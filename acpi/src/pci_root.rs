//! The PCI Express host bridge and what is below it (PCI Firmware Specification 3.3, chapter 4; ACPI 6.5, sections 6.2.11 to
//! 6.2.13).
//!
//! ```text
//! \_SB.PCI0          host bridge of segment 0: _CRS windows, _OSC, _PRT, PDSM
//! \_SB.PCI1          that of segment 1, and so on up to PCIF, PC10 and PC5F
//! \_SB.PCI0.S08      root port at device 1, function 0: _ADR, and power objects
//! \_SB.PCI0.S08.S00  the function below it: _ADR, and power objects of its own
//! ```
//!
//! A node is called `S` and its device and function in hexadecimal; the names are unique within their bus.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    GreaterEqual, IO, If, Local, Method, MethodCall, Name, NotEqual, ONE, Or, Package, PackageBuilder, Path,
    ResourceTemplate, Return, Store, Uuid, ZERO,
};
use acpi_tables::{Aml, AmlSink};
use pci::DevFn;

use crate::device_power;
use crate::event_abi::{PLACE_COUNT, PlaceAddress};
use crate::ops::Terms;
use crate::platform::{AddressRange, FunctionDescription, PciDescription};

/// Configuration mechanism 1: address and data register.
const CONFIG_PORT: u16 = 0xcf8;
const CONFIG_PORT_COUNT: u8 = 8;

/// One bus of enhanced configuration space.
const ECAM_BYTES_PER_BUS: u64 = 1 << 20;

/// The UUID of a PCI host bridge's `_OSC`.
const OSC_PCI_HOST_BRIDGE: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
const OSC_REVISION: u8 = 1;
/// Errors in the first dword that `_OSC` returns.
const OSC_UNRECOGNIZED_UUID: u8 = 1 << 2;
const OSC_UNRECOGNIZED_REVISION: u8 = 1 << 3;
const OSC_CAPABILITIES_MASKED: u8 = 1 << 4;
/// What the guest may control: native hotplug, native PME, the PCI Express capability. Not SHPC (there is none), not AER and
/// LTR (assigned devices' links belong to the host).
const OSC_GRANTED: u8 = 1 << 0 | 1 << 2 | 1 << 4;

/// How many GSIs INTx pins share.
const INTX_GSI_COUNT: u32 = 8;
/// How many interrupt pins a device may have.
const INTX_PIN_COUNT: u8 = 4;

/// The GSI of pin `pin` (0 is INTA) of a device on bus 0.
pub fn intx_gsi(intx_gsi_base: u32, device: u8, pin: u8) -> u32 {
    intx_gsi_base.saturating_add((u32::from(device) + u32::from(pin)) % INTX_GSI_COUNT)
}

/// The last bus that enhanced configuration space reaches.
pub(crate) fn last_bus(ecam: AddressRange) -> u8 {
    u8::try_from((ecam.size / ECAM_BYTES_PER_BUS).saturating_sub(1)).unwrap_or(u8::MAX)
}

/// Path of the node of a function on bus 0 of a segment, or of one below the root port `port`.
pub(crate) fn node_path(segment: u16, port: Option<DevFn>, devfn: DevFn) -> Path {
    let (root, name) = (root_name(segment), node_name(devfn));
    match port {
        Some(port) => Path::new(&format!("\\_SB_.{root}.{}.{name}", node_name(port))),
        None => Path::new(&format!("\\_SB_.{root}.{name}")),
    }
}

/// Name of the host bridge of a segment, of which there are at most 96.
fn root_name(segment: u16) -> String {
    if segment < 16 { format!("PCI{segment:X}") } else { format!("PC{segment:02X}") }
}

fn node_name(devfn: DevFn) -> String {
    format!("S{:02X}_", devfn.bits())
}

/// `Device (\_SB.PCI0)`, or that of another segment, to be put into the scope of `\_SB`.
pub(crate) fn host_bridge(
    terms: &mut Terms,
    pci: &PciDescription,
    notification_page: u64,
    proximity: Option<u32>,
) {
    let mut children = Terms::new();
    children.push(&Name::new("_HID".into(), &EISAName::new("PNP0A08")));
    children.push(&Name::new("_CID".into(), &EISAName::new("PNP0A03")));
    for (name, value) in [("_SEG", pci.segment), ("_BBN", 0), ("_UID", pci.segment)] {
        children.push(&Name::new(name.into(), &value));
    }
    children.push(&Name::new("_CBA".into(), &pci.ecam.base));
    if let Some(proximity) = proximity {
        children.push(&Name::new("_PXM".into(), &proximity));
    }
    windows(&mut children, pci);
    osc(&mut children);
    interrupt_routing(&mut children, pci);
    if pci.segment == 0 {
        device_power::shared_dsm(&mut children);
    }
    let segment = pci.segment;
    for function in &pci.functions {
        node(&mut children, segment, *function, &[], notification_page);
    }
    for port in &pci.root_ports {
        let port_itself = FunctionDescription { devfn: port.devfn, resource: port.resource, place: None };
        node(&mut children, segment, port_itself, &port.functions, notification_page);
    }
    device(terms, &root_name(segment), &children);
}

/// The node of a function, with those of the functions below it.
fn node(
    terms: &mut Terms,
    segment: u16,
    function: FunctionDescription,
    below: &[FunctionDescription],
    notification_page: u64,
) {
    let mut children = Terms::new();
    children.push(&Name::new("_ADR".into(), &function.devfn.adr()));
    if let Some(index) = function.resource {
        device_power::objects(&mut children, index, notification_page);
    }
    if let Some(place) = function.place {
        removal(&mut children, PlaceAddress { segment, device: place });
    }
    for function in below {
        node(&mut children, segment, *function, &[], notification_page);
    }
    device(terms, &node_name(function.devfn), &children);
}

/// What lets a function come and go: `_RMV` makes Linux handle notifications of its node as a slot's (`acpi_pcihp.c`), and `_OST` is how it says
/// that it has let go of the function. Not `_EJ0`, which would do both: Linux leaves the power of what has that alone (`pci-acpi.c`).
fn removal(terms: &mut Terms, place: PlaceAddress) {
    // Linux names slots by it, and wants each name once.
    let slot_number = u32::from(place.segment) * u32::from(PLACE_COUNT) + u32::from(place.device);
    terms.push(&Name::new("_SUN".into(), &slot_number));
    terms.push(&Name::new("_RMV".into(), &ONE));
    terms.push(&Method::new(
        "_OST".into(),
        3,
        true,
        vec![&MethodCall::new("\\_SB_.GED_.RLSE".into(), vec![&place.bits(), &Arg(0), &Arg(1)])],
    ));
}

/// `Device` with children that are known only at run time.
pub(crate) fn device(terms: &mut Terms, name: &str, children: &Terms) {
    terms.push(&Device::new(name.into(), vec![children]));
}

fn windows(terms: &mut Terms, pci: &PciDescription) {
    // The sizes are not zero and the ranges do not wrap: checked before anything is generated.
    let last = |range: AddressRange| range.base.saturating_add(range.size.saturating_sub(1));
    let mmio32 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        u32::try_from(pci.mmio32.base).unwrap_or(u32::MAX),
        u32::try_from(last(pci.mmio32)).unwrap_or(u32::MAX),
        None,
    );
    let mmio64 = pci.mmio64.map(|window| {
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, window.base, last(window), None)
    });
    let buses = AddressSpace::new_bus_number(0_u16, u16::from(last_bus(pci.ecam)));
    let config = IO::new(CONFIG_PORT, CONFIG_PORT, 1, CONFIG_PORT_COUNT);
    let io = pci
        .io
        .map(|io| AddressSpace::new_io(io.base, io.base.saturating_add(io.size.saturating_sub(1)), None));
    let mut resources: Vec<&dyn Aml> = vec![&buses];
    if pci.segment == 0 {
        resources.push(&config);
    }
    if let Some(io) = &io {
        resources.push(io);
    }
    resources.push(&mmio32);
    if let Some(mmio64) = &mmio64 {
        resources.push(mmio64);
    }
    terms.push(&Name::new("_CRS".into(), &ResourceTemplate::new(resources)));
}

/// Operating system capabilities: grants what is in [`OSC_GRANTED`], and says so when more was asked for.
fn osc(terms: &mut Terms) {
    let (errors, control) = (Path::new("CDW1"), Path::new("CDW3"));
    terms.push(&Method::new(
        "_OSC".into(),
        4,
        true,
        vec![
            &CreateDWordField::new(&errors, &Arg(3), &ZERO),
            &If::new(
                &Equal::new(&Arg(0), &Uuid::new(OSC_PCI_HOST_BRIDGE)),
                vec![
                    &If::new(&NotEqual::new(&Arg(1), &OSC_REVISION), vec![&Flag(OSC_UNRECOGNIZED_REVISION)]),
                    &If::new(
                        &GreaterEqual::new(&Arg(2), &3_u8),
                        vec![
                            &CreateDWordField::new(&control, &Arg(3), &8_u8),
                            &And::new(&Local(0), &control, &OSC_GRANTED),
                            &If::new(
                                &NotEqual::new(&Local(0), &control),
                                vec![&Flag(OSC_CAPABILITIES_MASKED)],
                            ),
                            &Store::new(&control, &Local(0)),
                        ],
                    ),
                ],
            ),
            &Else::new(vec![&Flag(OSC_UNRECOGNIZED_UUID)]),
            &Return::new(&Arg(3)),
        ],
    ));
}

/// `CDW1 |= bit`.
struct Flag(u8);

impl Aml for Flag {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let errors = Path::new("CDW1");
        Or::new(&errors, &errors, &self.0).to_aml_bytes(sink);
    }
}

/// `_PRT` for the devices there are. What is below a root port is found through the port, by the standard rotation.
fn interrupt_routing(terms: &mut Terms, pci: &PciDescription) {
    let on_bus_0 = pci.root_ports.iter().map(|port| port.devfn).chain(pci.functions.iter().map(|f| f.devfn));
    let mut devices: Vec<u8> = on_bus_0.map(DevFn::device).collect();
    devices.sort_unstable();
    devices.dedup();

    // At most 32 devices of 4 pins: well under the 255 elements of a package.
    let mut entries = PackageBuilder::new();
    for device in devices {
        for pin in 0..INTX_PIN_COUNT {
            let any_function = u32::from(device) << 16 | 0xffff;
            let gsi = intx_gsi(pci.intx_gsi_base, device, pin);
            entries.add_element(&Package::new(vec![&any_function, &pin, &ZERO, &gsi]));
        }
    }
    terms.push(&Name::new("_PRT".into(), &entries));
}
