//! Processors that come and go: their tables, and their methods run by ACPICA's interpreter.

use acpi::event_abi::{EVENT_PROCESSORS, NOTIFY_EJECT_REQUEST};
use acpi::platform::{PlatformDescription, ProcessorHotplugDescription};
use acpi::processor_abi::{
    ADDED_OFFSET, EJECT_OFFSET, LEAVING_OFFSET, OST_EJECTION_IN_PROGRESS, PRESENT_OFFSET, STATUS_OFFSET,
};
use acpi::tables::{self, TableError};

use crate::sample;
use crate::tools::Scratch;

/// Where the registers are.
const REGISTERS: u64 = 0xfed5_0000;

/// Two processors of four, and no devices but those that every machine has.
pub fn machine() -> PlatformDescription {
    let mut platform = sample::machine();
    platform.processors = vec![0, 1, 2, 3];
    platform.processor_hotplug = Some(ProcessorHotplugDescription { registers: REGISTERS, present: 2 });
    platform.pci[0].functions.clear();
    platform.pci[0].root_ports.clear();
    platform
}

/// More than one word of registers.
fn large() -> PlatformDescription {
    PlatformDescription { processors: (0..70).collect(), ..machine() }
}

/// Runs commands of the interpreter's debugger with every byte of memory space at `fill`, and returns what it printed.
pub fn interpret(platform: &PlatformDescription, fill: u8, commands: &[&str]) -> String {
    let scratch = Scratch::new();
    scratch.write("dsdt.aml", &sample::tables(platform).table(*b"DSDT").unwrap().bytes);
    let (_, output) =
        scratch.run("acpiexec", &["-fv", &fill.to_string(), "-b", &commands.join("; "), "dsdt.aml"]);
    for failure in ["ACPI Error", "ACPI Warning", "failed with status", "AE_NOT_FOUND"] {
        assert!(!output.contains(failure), "{output}");
    }
    output
}

pub fn integers(output: &str) -> Vec<u64> {
    let values = output.lines().filter_map(|line| line.trim().strip_prefix("[Integer] = "));
    values.map(|value| u64::from_str_radix(value.trim(), 16).unwrap()).collect()
}

pub fn notified(output: &str) -> Vec<&str> {
    output.lines().filter(|line| line.contains("Received a")).collect()
}

#[test]
fn the_tables_of_a_machine_with_processors_to_come_decompile_and_compile() {
    for platform in [machine(), large()] {
        let scratch = Scratch::new();
        scratch.write("table.aml", &sample::tables(&platform).table(*b"DSDT").unwrap().bytes);
        assert!(scratch.run("iasl", &["-d", "table.aml"]).0);
        let source = scratch.read("table.dsl");
        let (compiled, output) = scratch.run("iasl", &["-oa", "-p", "again", "table.dsl"]);
        assert!(compiled && output.contains("0 Errors, 0 Warnings"), "{output}\n{source}");
        let count = platform.processors.len();
        for object in ["Method (_STA,", "Name (_MAT,", "Method (_OST,"] {
            assert_eq!(source.matches(object).count(), count, "{object}\n{source}");
        }
        assert_eq!(source.matches("Method (_EJ0,").count(), count - 1, "the first cannot go\n{source}");
    }
}

#[test]
fn a_machine_whose_processors_stay_has_no_methods_for_them() {
    let tables = sample::tables(&sample::machine());
    let dsdt = &tables.table(*b"DSDT").unwrap().bytes;
    for name in [b"PREG", b"_MAT", b"_EJ0"] {
        assert!(!dsdt.windows(4).any(|window| window == name), "{}", String::from_utf8_lossy(name));
    }
}

#[test]
fn processors_that_are_to_come_are_in_the_interrupt_controller_table_and_not_enabled() {
    let tables = sample::tables(&machine());
    let madt = &tables.table(*b"APIC").unwrap().bytes;
    // Behind the header: local APICs of eight bytes, whose flags are the last four.
    let flags: Vec<u8> = madt[44..].chunks_exact(8).take_while(|c| c[..2] == [0, 8]).map(|c| c[4]).collect();
    assert_eq!(flags, [1, 1, 2, 2]);
}

#[test]
fn status_is_the_processors_bit_in_its_word() {
    let all = ["C000", "C001", "C002", "C003"].map(|name| format!(r"evaluate \_SB.{name}._STA"));
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    // Bit 1 of every byte.
    assert_eq!(integers(&interpret(&machine(), 2, &all)), [0, 0xf, 0, 0]);
    let second_word = [r"evaluate \_SB.C020._STA", r"evaluate \_SB.C021._STA", r"evaluate \_SB.C029._STA"];
    assert_eq!(integers(&interpret(&large(), 2, &second_word)), [0, 0xf, 0xf]);
}

#[test]
fn the_interrupt_controller_entry_of_a_node_says_that_it_is_enabled() {
    let output = interpret(&machine(), 0, &[r"evaluate \_SB.C003._MAT"]);
    assert!(output.contains("00 08 03 03 01 00 00 00"), "{output}");
}

#[test]
fn the_event_device_notifies_the_processors_that_are_named_and_no_others() {
    let fill = u8::try_from(EVENT_PROCESSORS).unwrap();
    // Bit 4 of every byte: EVENTS says processors, and ADDED and LEAVING name 4, 12, 20, 28, 36, ... 68.
    let output = interpret(&large(), fill, &[r"evaluate \_SB.GED._EVT A"]);
    let lines = notified(&output);
    assert_eq!(lines.len(), 2 * 9, "{output}");
    for node in ["[C004]", "[C00C]", "[C024]", "[C044]"] {
        for value in ["0x01", "0x03"] {
            assert!(lines.iter().any(|l| l.contains(node) && l.contains(value)), "{node} {value}: {output}");
        }
    }
    assert!(notified(&interpret(&large(), 1, &[r"evaluate \_SB.GED._EVT A"])).len() == 1, "the button alone");
}

#[test]
fn an_ejection_and_what_the_guest_says_of_it_name_the_processor() {
    let ost = format!(r"evaluate \_SB.C003._OST {NOTIFY_EJECT_REQUEST} {OST_EJECTION_IN_PROGRESS} (00)");
    let output = interpret(
        &machine(),
        0,
        &[r"evaluate \_SB.C002._EJ0 1", r"evaluate \_SB.PEJT", &ost, r"evaluate \_SB.PSTS"],
    );
    assert_eq!(integers(&output), [2, 0x0084_0303], "{output}");
}

#[test]
fn the_fields_are_where_the_device_has_its_registers() {
    let scratch = Scratch::new();
    scratch.write("table.aml", &sample::tables(&machine()).table(*b"DSDT").unwrap().bytes);
    assert!(scratch.run("iasl", &["-d", "table.aml"]).0);
    let source = scratch.read("table.dsl");
    let field = source.split("Field (PREG").nth(1).and_then(|rest| rest.split('}').next()).unwrap();
    let names: Vec<&str> =
        field.lines().filter_map(|l| l.trim().split_once(',')).map(|(n, _)| n.trim()).collect();
    let offset =
        |name: &str| names.iter().filter(|n| n.len() == 4).position(|n| *n == name).unwrap() as u64 * 4;
    for (name, at) in [
        ("PPR0", PRESENT_OFFSET),
        ("PAD0", ADDED_OFFSET),
        ("PLV0", LEAVING_OFFSET),
        ("PEJT", EJECT_OFFSET),
        ("PSTS", STATUS_OFFSET),
    ] {
        assert_eq!(offset(name), at, "{name} in {field}");
    }
    assert!(source.contains("OperationRegion (PREG, SystemMemory, 0xFED50000, 0x68)"), "{source}");
}

#[test]
fn more_processors_than_the_registers_can_name_are_refused() {
    for (present, processors) in [(0, 4), (5, 4), (1, 257_u32)] {
        let mut platform = PlatformDescription { processors: (0..processors).collect(), ..machine() };
        platform.processor_hotplug = Some(ProcessorHotplugDescription { registers: REGISTERS, present });
        let result = tables::generate(&platform).map(|_| ());
        let expected =
            TableError::PresentProcessors { present, processors: usize::try_from(processors).unwrap() };
        assert_eq!(result, Err(expected), "{present} of {processors}");
    }
}
