//! Memory devices that are added later: what ACPICA makes of their methods, and of the tables that say where memory belongs.
//!
//! The interpreter's memory space keeps what is written, so a second table fills a slot, as the VMM would.

use acpi::event_abi::EVENT_MEMORY;
use acpi::memory_abi::{SLOT_COUNT, STATUS_FILLED};
use acpi::platform::PlatformDescription;

use crate::sample;
use crate::tools::Scratch;

/// The registers of the memory slots.
const REGISTERS: u64 = 0xfed6_0000;

/// Puts 1 GiB at 5 GiB into slot 3, in node 2, and tells of it; `ASKS` reads the range back from `_CRS`.
const FILL: &str = r#"
DefinitionBlock ("", "SSDT", 2, "TEST", "DEVICE", 1) {
    External (\_SB.MBA3, FieldUnitObj)
    External (\_SB.MLN3, FieldUnitObj)
    External (\_SB.MST3, FieldUnitObj)
    External (\_SB.MPX3, FieldUnitObj)
    External (\_SB.MOS3, FieldUnitObj)
    External (\_SB.MCHG, FieldUnitObj)
    External (\_SB.GED.EVTS, FieldUnitObj)
    External (\_SB.GED._EVT, MethodObj)
    External (\_SB.MEM3._CRS, MethodObj)
    External (\_SB.MEM3._OST, MethodObj)
    Method (\FILL) {
        \_SB.MBA3 = 0x140000000
        \_SB.MLN3 = 0x40000000
        \_SB.MST3 = FILLED
        \_SB.MPX3 = 2
        \_SB.MCHG = 0x08
        \_SB.GED.EVTS = EVENT
    }
    Method (\ASKS, 1, Serialized) {
        Local0 = \_SB.MEM3._CRS ()
        CreateQWordField (Local0, Arg0, NUMB)
        Return (NUMB)
    }
    Method (\SAYS) { \_SB.MEM3._OST (1, 0x81, Buffer (4) {}) Return (\_SB.MOS3) }
    Method (\EVNT) { \_SB.GED._EVT (5) }
}
"#;

fn machine() -> PlatformDescription {
    let mut platform = sample::machine();
    platform.memory_slots = Some(REGISTERS);
    platform.numa = Some(sample::nodes());
    platform
}

fn interpret(commands: &[&str]) -> String {
    let scratch = Scratch::new();
    let tables = sample::tables(&machine());
    scratch.write("dsdt.aml", &tables.table(*b"DSDT").unwrap().bytes);
    let source =
        FILL.replace("FILLED", &STATUS_FILLED.to_string()).replace("EVENT", &EVENT_MEMORY.to_string());
    scratch.write("device.asl", source);
    let (compiled, output) = scratch.run("iasl", &["device.asl"]);
    assert!(compiled, "{output}");
    let commands = commands.join("; ");
    let (_, output) = scratch.run("acpiexec", &["-fv", "0", "-b", &commands, "dsdt.aml", "device.aml"]);
    for failure in ["ACPI Error", "ACPI Warning", "failed with status", "AE_NOT_FOUND"] {
        assert!(!output.contains(failure), "{output}");
    }
    output
}

fn integers(output: &str) -> Vec<u64> {
    let values = output.lines().filter_map(|line| line.trim().strip_prefix("[Integer] = "));
    values.map(|value| u64::from_str_radix(value.trim(), 16).unwrap()).collect()
}

#[test]
fn an_empty_slot_is_absent_and_a_filled_one_says_where_its_memory_is() {
    let before = interpret(&[r"evaluate \_SB.MEM3._STA", r"evaluate \_SB.MEM0._STA"]);
    assert_eq!(integers(&before), [0, 0], "{before}");
    let after = interpret(&[
        r"evaluate \FILL",
        r"evaluate \_SB.MEM3._STA",
        r"evaluate \_SB.MEM3._PXM",
        r"evaluate \ASKS 14",
        r"evaluate \ASKS 22",
        r"evaluate \ASKS 38",
        r"evaluate \_SB.MEM0._STA",
        r"evaluate \SAYS",
    ]);
    let expected = [0xf, 2, 0x1_4000_0000, 0x1_7fff_ffff, 0x4000_0000, 0, 0x81];
    assert_eq!(integers(&after), expected, "{after}");
}

#[test]
fn the_event_of_added_memory_notifies_the_filled_slot_alone() {
    let output = interpret(&[r"evaluate \FILL", r"evaluate \EVNT"]);
    for slot in 0..SLOT_COUNT {
        let told = output.contains(&format!("[MEM{slot}]")) && output.contains("Notify");
        assert_eq!(told, slot == 3, "slot {slot}: {output}");
    }
}

#[test]
fn the_tables_of_a_machine_whose_memory_can_grow_compile_again() {
    let tables = sample::tables(&machine());
    for (signature, options) in [
        (*b"DSDT", &["-oa", "-p", "again", "table.dsl"][..]),
        (*b"SRAT", &["-ve", "-p", "again", "table.dsl"]),
        (*b"SLIT", &["-ve", "-p", "again", "table.dsl"]),
        (*b"XSDT", &["-ve", "-p", "again", "table.dsl"]),
    ] {
        let scratch = Scratch::new();
        scratch.write("table.aml", &tables.table(signature).unwrap().bytes);
        let (good, output) = scratch.run("iasl", &["-d", "table.aml"]);
        assert!(good, "{output}");
        for complaint in ["corrupt", "Invalid", "Warning", "Could not", "Unknown", "Incorrect checksum"] {
            assert!(!output.contains(complaint), "{complaint}: {output}");
        }
        let (good, output) = scratch.run("iasl", options);
        assert!(good && !output.contains("Warning  "), "{output}");
    }
}

#[test]
fn a_machine_without_nodes_has_no_table_of_them_and_one_with_a_single_node_no_distances() {
    let tables = sample::tables(&sample::machine());
    assert!(tables.table(*b"SRAT").is_none() && tables.table(*b"SLIT").is_none());
    let mut single = machine();
    single.numa.as_mut().unwrap().nodes = 1;
    let tables = sample::tables(&single);
    assert!(tables.table(*b"SRAT").is_some() && tables.table(*b"SLIT").is_none());
}
