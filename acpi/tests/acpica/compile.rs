//! Every table disassembles, and what comes out compiles to the same table.

use acpi::platform::PlatformDescription;
use acpi::tables;

use crate::sample;
use crate::tools::Scratch;

fn disassemble(platform: &PlatformDescription, signature: [u8; 4]) -> (Scratch, String) {
    let scratch = Scratch::new();
    let tables = sample::tables(platform);
    scratch.write("table.aml", &tables.table(signature).unwrap().bytes);
    let (disassembled, output) = scratch.run("iasl", &["-d", "table.aml"]);
    assert!(disassembled, "{output}");
    for complaint in ["corrupt", "Invalid", "Warning", "Could not", "Unknown", "Incorrect checksum"] {
        assert!(!output.contains(complaint), "{complaint}: {output}");
    }
    let source = scratch.read("table.dsl");
    (scratch, source)
}

/// Compiles the disassembly again: no error, no warning, and the same bytes from the header on.
fn round_trip(platform: &PlatformDescription, signature: [u8; 4]) {
    let (scratch, source) = disassemble(platform, signature);
    assert!(!source.contains("Unknown"), "{source}");
    let (compiled, output) = scratch.run("iasl", &["-oa", "-p", "again", "table.dsl"]);
    assert!(compiled, "{output}\n{source}");
    assert!(output.contains("0 Errors, 0 Warnings"), "{output}\n{source}");
}

#[test]
fn the_dsdt_decompiles_and_compiles_without_errors_or_warnings() {
    round_trip(&sample::machine(), *b"DSDT");
}

#[test]
fn the_dsdt_of_a_machine_full_of_devices_compiles() {
    let mut platform = sample::machine();
    platform.processors = (0..300).collect();
    platform.pci[0].root_ports = (0..120)
        .map(|i| acpi::platform::RootPortDescription {
            devfn: pci::DevFn::from_bits(8 + i),
            resource: Some(acpi::ResourceIndex(i)),
            functions: vec![acpi::platform::FunctionDescription {
                devfn: pci::DevFn::from_bits(0),
                resource: Some(acpi::ResourceIndex(120 + i)),
                place: None,
            }],
        })
        .collect();
    platform.pci[0].functions.clear();
    round_trip(&platform, *b"DSDT");
}

#[test]
fn the_data_tables_decompile_and_compile() {
    for signature in [*b"FACP", *b"APIC", *b"MCFG", *b"XSDT"] {
        let (scratch, source) = disassemble(&sample::machine(), signature);
        let (compiled, output) = scratch.run("iasl", &["-ve", "-p", "again", "table.dsl"]);
        assert!(compiled, "{output}\n{source}");
    }
}

#[test]
fn a_node_with_a_resource_lists_it_in_every_state_and_a_node_without_has_only_its_address() {
    let (_scratch, source) = disassemble(&sample::machine(), *b"DSDT");
    for object in [
        "PowerResource (PWRR",
        "Name (_PR0,",
        "Name (_PR2,",
        "Name (_PR3,",
        "Name (_S0W, 0x04)",
        "Method (_DSM, 4",
    ] {
        // The port, its two functions, and two places on bus 0.
        assert_eq!(source.matches(object).count(), 5, "{object}\n{source}");
    }
    for address in ["0x00010000", "0x00020000", "0x00030000"] {
        assert!(source.contains(address), "{address}\n{source}");
    }
    for forbidden in ["_EJ0", "_PS0", "_PS3", "_PRW"] {
        assert!(!source.contains(forbidden), "{forbidden}\n{source}");
    }
    assert!(source.contains(r"Name (\_S5,"), "{source}");
    for state in ["_S1", "_S2", "_S3,", "_S4"] {
        assert!(!source.contains(&format!(r"Name (\{state}")), "soft-off is the only sleep state\n{source}");
    }
    assert_eq!(source.matches("Method (_STA,").count(), 5, "only power resources have a status\n{source}");
}

#[test]
fn the_machine_has_the_event_and_control_blocks_of_fixed_hardware() {
    let (_scratch, fixed) = disassemble(&sample::machine(), *b"FACP");
    let field = |source: &str, name: &str, value: &str| {
        let found = source.lines().any(|line| line.contains(name) && line.trim_end().ends_with(value));
        assert!(found, "{name} : {value}\n{source}");
    };
    field(&fixed, "PM1A Event Block Address", "00000600");
    field(&fixed, "PM1A Control Block Address", "00000604");
    field(&fixed, "SCI Interrupt", "0009");
    field(&fixed, "RTC Century Index", "32");
    field(&fixed, "Hardware Reduced (V5)", "0");
    field(&fixed, "RTC wake not in fixed reg space", "0");
    field(&fixed, "Low Power S0 Idle (V5)", "1");
    field(&fixed, "Reset Register Supported (V2)", "1");
    field(&fixed, "8042 Present on ports 60/64 (V2)", "0");
}

#[test]
fn processors_past_the_reach_of_a_local_apic_are_x2apics() {
    let mut platform = sample::machine();
    platform.processors = vec![0, 254, 255, 4096];
    let (_scratch, source) = disassemble(&platform, *b"APIC");
    assert_eq!(source.matches("[Processor Local APIC]").count(), 2, "{source}");
    assert_eq!(source.matches("[Processor Local x2APIC]").count(), 2, "{source}");
    assert_eq!(source.matches("x2APIC NMI").count(), 1, "{source}");
}

#[test]
fn tables_placed_anywhere_point_at_each_other_and_have_their_foreseen_size() {
    let platform = sample::machine();
    for area in [sample::AREA, 0x3fff_0000] {
        let unplaced = tables::generate(&platform).unwrap();
        let size = unplaced.size();
        let placed = unplaced.place(area).unwrap();
        let last = placed.tables.last().unwrap();
        assert_eq!((placed.rsdp, last.address + last.bytes.len() as u64), (area, area + size));
        assert!(placed.tables.windows(2).all(|t| t[0].address + t[0].bytes.len() as u64 <= t[1].address));
        for table in placed.tables.iter().filter(|table| &table.signature != b"FACS") {
            let sum = table.bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum, 0, "checksum of {}", String::from_utf8_lossy(&table.signature));
        }
        let pointer = |table: [u8; 4], at: usize| {
            let bytes = &placed.table(table).unwrap().bytes;
            u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
        };
        let address = |table: [u8; 4]| placed.table(table).unwrap().address;
        assert_eq!(pointer(*b"RSDP", 24), address(*b"XSDT"));
        for (at, table) in [(36, *b"FACP"), (44, *b"APIC"), (52, *b"MCFG")] {
            assert_eq!(pointer(*b"XSDT", at), address(table));
        }
        assert_eq!(pointer(*b"FACP", 132), address(*b"FACS"));
        assert_eq!(pointer(*b"FACP", 140), address(*b"DSDT"));
    }
    assert!(tables::generate(&platform).unwrap().place(sample::AREA + 1).is_err());
}
