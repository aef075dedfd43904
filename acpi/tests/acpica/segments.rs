//! A machine of several PCI segments: its tables, and their methods run by ACPICA's interpreter.

use std::ops::RangeInclusive;

use acpi::event_abi::{EVENT_PLACES, EVENT_WAKE, PlaceAddress};
use acpi::notify_abi::{REQUEST_OFF, REQUEST_ON, ResourceIndex, request_offset};
use acpi::platform::{
    AddressRange, FunctionDescription, NumaDescription, PciDescription, PlatformDescription,
};
use acpi::tables::{self, TableError};
use pci::DevFn;

use crate::processors::{integers, interpret, notified};
use crate::sample;
use crate::tools::Scratch;

/// Resource of the function in segment 1, whose bit in its WAKE register is bit 1 of a byte.
const RESOURCE: u8 = 65;

/// Segment 1 has a slot with a function, and place 2 for one that comes; it is near the second node.
pub fn machine() -> PlatformDescription {
    let mut platform = sample::machine();
    platform.pci[0].functions.clear();
    platform.pci[0].root_ports = vec![sample::slot(1, Some(0), &[Some(1)])];
    platform.pci.push(PciDescription {
        functions: vec![FunctionDescription {
            devfn: DevFn::new(2, 0).unwrap(),
            resource: Some(ResourceIndex(66)),
            place: Some(2),
        }],
        root_ports: vec![sample::slot(1, Some(64), &[Some(RESOURCE)])],
        ..empty(1)
    });
    platform.numa = Some(NumaDescription { pci_nodes: vec![(1, 1)], ..sample::nodes() });
    platform
}

/// A segment with nothing in it.
fn empty(segment: u16) -> PciDescription {
    let at = u64::from(segment);
    PciDescription {
        segment,
        ecam: AddressRange { base: 0xe000_0000 + (at << 21), size: 2 << 20 },
        mmio32: AddressRange { base: 0xc000_0000 + (at << 20), size: 1 << 20 },
        mmio64: Some(AddressRange { base: 0x80_0000_0000 + (at << 30), size: 1 << 30 }),
        io: None,
        intx_gsi_base: 16,
        root_ports: Vec::new(),
        functions: Vec::new(),
    }
}

/// As many segments as there can be, each with places for functions that may come.
fn most(places: RangeInclusive<u8>) -> PlatformDescription {
    let mut platform = sample::machine();
    let first = platform.pci.remove(0);
    let place = |device| FunctionDescription {
        devfn: DevFn::new(device, 0).unwrap(),
        resource: None,
        place: Some(device),
    };
    let full = |segment| PciDescription { functions: places.clone().map(place).collect(), ..empty(segment) };
    platform.pci = (0..96).map(full).collect();
    platform.pci[0].io = first.io;
    platform
}

#[test]
fn the_tables_of_two_and_of_ninety_six_segments_decompile_and_compile() {
    for platform in [machine(), most(1..=31)] {
        let scratch = Scratch::new();
        scratch.write("table.aml", &sample::tables(&platform).table(*b"DSDT").unwrap().bytes);
        assert!(scratch.run("iasl", &["-d", "table.aml"]).0);
        let source = scratch.read("table.dsl");
        let (compiled, output) = scratch.run("iasl", &["-oa", "-p", "again", "table.dsl"]);
        assert!(compiled && output.contains("0 Errors, 0 Warnings"), "{output}");
        let segments = platform.pci.len();
        for object in ["Name (_SEG,", "Name (_CBA,", "Method (_OSC,", "Name (_PRT,"] {
            assert_eq!(source.matches(object).count(), segments, "{object}");
        }
        assert_eq!(source.matches("Method (PDSM,").count(), 1);
    }
}

#[test]
fn each_segment_has_its_number_and_its_own_addresses_and_its_node() {
    let objects = ["_SEG", "_UID", "_BBN", "_CBA", "_PXM"].map(|name| format!(r"evaluate \_SB.PCI1.{name}"));
    let objects: Vec<&str> = objects.iter().map(String::as_str).collect();
    assert_eq!(integers(&interpret(&machine(), 0, &objects)), [1, 1, 0, 0xe020_0000, 1]);
    let last = [r"evaluate \_SB.PCIF._SEG", r"evaluate \_SB.PC10._SEG", r"evaluate \_SB.PC5F._SEG"];
    assert_eq!(integers(&interpret(&most(31..=31), 0, &last)), [15, 16, 95]);
    let mcfg = sample::tables(&machine()).table(*b"MCFG").unwrap().bytes.clone();
    // Base, segment, first and last bus, from byte 44 on (PCI Firmware Specification 3.3, table 4-3).
    let entries: Vec<_> = mcfg[44..].chunks_exact(16).map(|e| (e[3], e[2], e[8], e[10], e[11])).collect();
    assert_eq!(entries, [(0xe0, 0, 0, 0, 255), (0xe0, 0x20, 1, 0, 1)]);
}

#[test]
fn only_the_first_segment_has_ports() {
    let scratch = Scratch::new();
    scratch.write("table.aml", &sample::tables(&machine()).table(*b"DSDT").unwrap().bytes);
    assert!(scratch.run("iasl", &["-d", "table.aml"]).0);
    let source = scratch.read("table.dsl");
    let (_, second) = source.split_once("Device (PCI1)").unwrap();
    let (resources, _) = second.split_once("Method (_OSC").unwrap();
    assert!(resources.contains("WordBusNumber") && resources.contains("QWordMemory"), "{resources}");
    assert!(!resources.contains("IO ("), "{resources}");
    assert_eq!(source.matches("0x0CF8,").count(), 2, "range minimum and maximum of one descriptor");
}

#[test]
fn a_function_of_the_second_segment_is_switched_off_and_on_by_its_own_resource() {
    let register = sample::NOTIFICATION + request_offset(ResourceIndex(RESOURCE));
    let power = r"\_SB.PCI1.S08.S00.PWRR";
    for (method, request) in [("_OFF", REQUEST_OFF), ("_ON", REQUEST_ON)] {
        let method = format!("evaluate {power}.{method}");
        let output = interpret(&machine(), 0, &[&method, &format!("evaluate {power}.REQU")]);
        assert_eq!(integers(&output).pop(), Some(request.into()), "{output}");
    }
    let dsdt = sample::tables(&machine()).table(*b"DSDT").unwrap().bytes.clone();
    let address = u32::try_from(register).unwrap().to_le_bytes();
    assert_eq!(dsdt.windows(4).filter(|window| *window == address).count(), 1);
    let output =
        interpret(&machine(), 0, &[r"evaluate \_SB.PCI1.S08._PR3", r"evaluate \_SB.PCI1.S08.S00._S0W"]);
    assert!(output.contains("PWRR") && integers(&output) == [4], "{output}");
}

#[test]
fn a_wake_in_the_second_segment_notifies_its_function() {
    let output = interpret(&machine(), u8::try_from(EVENT_WAKE).unwrap(), &[r"evaluate \_SB.GED._EVT A"]);
    // Resources 1 and 65 have that bit, 66 has not.
    let notified = notified(&output);
    assert_eq!(notified.len(), 2, "{output}");
    assert!(notified.iter().all(|line| line.contains("[S00_]") && line.contains("0x02")), "{output}");
}

#[test]
fn a_function_that_comes_to_the_second_segment_is_notified_there_and_its_removal_reported_with_the_segment() {
    // Bit 2 in every byte: EVENTS says places, and the registers of segment 1 name place 2.
    let output = interpret(&machine(), u8::try_from(EVENT_PLACES).unwrap(), &[r"evaluate \_SB.GED._EVT A"]);
    assert_eq!(notified(&output).iter().filter(|line| line.contains("[S10_]")).count(), 2, "{output}");
    let method = r"evaluate \_SB.PCI1.S10_._OST 3 0x82 (00)".replace("0x82", &0x82.to_string());
    let output = interpret(&machine(), 0, &[&method, r"evaluate \_SB.GED_.RLSD"]);
    let place = PlaceAddress { segment: 1, device: 2 };
    assert_eq!(integers(&output).pop(), Some(u64::from(place.bits() | 0x8200)), "{output}");
    let slots = [r"evaluate \_SB.PCI0.SF8_._SUN", r"evaluate \_SB.PC5F.SF8_._SUN"];
    let output = interpret(&most(31..=31), 0, &slots);
    assert_eq!(integers(&output), [31, 95 * 32 + 31], "each slot has a name of its own");
}

#[test]
fn segments_out_of_order_or_too_many_are_refused() {
    let mut platform = machine();
    platform.pci[1].segment = 2;
    assert_eq!(tables::generate(&platform).unwrap_err(), TableError::Segments(2));
    let mut platform = most(31..=31);
    platform.pci.push(empty(96));
    assert_eq!(tables::generate(&platform).unwrap_err(), TableError::Segments(97));
    platform.pci.clear();
    assert_eq!(tables::generate(&platform).unwrap_err(), TableError::Segments(0));
}
