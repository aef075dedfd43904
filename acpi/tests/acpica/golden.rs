//! The tables of a fixed machine, kept in `tests/golden` as bytes (`.aml`) and disassembled (`.dsl`), so that every change of what a
//! guest is given shows as a difference that can be read.
//!
//! The bytes decide: the text of the disassembler differs from version to version in layout and comments, which are not compared.
//! After a change that is meant, `GOLDEN=write cargo test -p acpi --test acpica golden_tables` writes both anew.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use acpi::platform::PlatformDescription;

use crate::tools::Scratch;
use crate::{processors, sample, segments};

/// What makes a machine.
type Machine = fn() -> PlatformDescription;

/// The tables that are kept, and the machine that each is of.
const TABLES: [(&str, [u8; 4], Machine); 10] = [
    ("dsdt", *b"DSDT", machine),
    ("facp", *b"FACP", machine),
    ("apic", *b"APIC", machine),
    ("mcfg", *b"MCFG", machine),
    ("srat", *b"SRAT", machine),
    ("slit", *b"SLIT", machine),
    ("dsdt_processors", *b"DSDT", processors::machine),
    ("apic_processors", *b"APIC", processors::machine),
    ("dsdt_segments", *b"DSDT", segments::machine),
    ("mcfg_segments", *b"MCFG", segments::machine),
];
/// Says that the golden tables are to be written and not compared.
const VARIABLE: &str = "GOLDEN";

/// The machine: a GPU in a slot of its own, a slot with two functions, and one whose power is not offered; two nodes with a processor
/// each, and the GPU as a third.
fn machine() -> PlatformDescription {
    let mut platform = sample::machine();
    platform.processors = vec![0, 1];
    platform.pci[0].functions.clear();
    platform.pci[0].root_ports = vec![
        sample::slot(1, Some(0), &[Some(1)]),
        sample::slot(2, Some(2), &[Some(3), Some(4)]),
        sample::slot(3, None, &[None]),
    ];
    platform.numa = Some(sample::nodes());
    platform
}

/// Nodes of [`machine`] whose power is offered: root port and function of the GPU, then those of the second slot.
const OFFERED: [&str; 5] = ["S08", "S08.S00", "S10", "S10.S00", "S10.S01"];
/// And those whose power is not.
const NOT_OFFERED: [&str; 2] = ["S18", "S18.S00"];

/// What evaluates an object of a node before it cuts power, or lets the system do it, and on which nodes. From the sources of Linux
/// 6.12 (its PCI and ACPI core, amdgpu, xe, nouveau), of NVIDIA's open modules 595 (the proprietary ones share this code), and
/// Microsoft's documentation of device power.
const WANTED: [(&str, &[&str], &[&str]); 6] = [
    // In a VM at its own node; when the hypervisor is hidden from it, at the port above.
    ("NVIDIA", &["S08.S00", "S08"], &["_PR3"]),
    ("amdgpu", &["S08"], &["_PR0", "_PR3"]),
    ("xe", &["S08"], &["_PR3", "_S0W"]),
    ("nouveau", &["S08"], &["_PR3"]),
    ("Linux", &OFFERED, &["_PR0", "_PR3", "_S0W", "_DSM"]),
    ("Windows", &OFFERED, &["_PR0", "_PR2", "_PR3", "_S0W"]),
];

fn kept(name: &str, extension: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name).with_extension(extension)
}

/// The table's bytes as they are generated now.
fn generated(signature: [u8; 4], machine: Machine) -> Vec<u8> {
    sample::tables(&machine()).table(signature).unwrap().bytes.clone()
}

/// Disassembles a table, without the comments that tell version, path and checksum.
fn disassemble(bytes: &[u8]) -> String {
    let scratch = Scratch::new();
    scratch.write("table.aml", bytes);
    let (good, output) = scratch.run("iasl", &["-d", "table.aml"]);
    assert!(good, "{output}");
    let source = scratch.read("table.dsl");
    let body = source.split_once("*/").map_or(source.as_str(), |(_, body)| body);
    format!("{}\n", body.trim())
}

/// The text without what the disassembler adds for people, and without its layout.
fn essence(source: &str) -> Vec<String> {
    let code = |line: &str| {
        let line = line.split("//").next().unwrap_or_default();
        let bare = match (line.split_once("/*"), line.split_once("*/")) {
            (Some((before, _)), Some((_, after))) => format!("{before}{after}"),
            _ => line.to_owned(),
        };
        bare.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    source.lines().map(code).filter(|line| !line.is_empty()).collect()
}

/// The difference of two disassemblies as a patch, without comments and layout.
fn differences(old: &str, new: &str) -> String {
    let scratch = Scratch::new();
    scratch.write("golden.dsl", essence(old).join("\n") + "\n");
    scratch.write("generated.dsl", essence(new).join("\n") + "\n");
    scratch.run("diff", &["-u", "golden.dsl", "generated.dsl"]).1
}

#[test]
fn golden_tables_are_what_is_generated() {
    let write = match std::env::var(VARIABLE) {
        Ok(value) if value == "write" => true,
        Ok(value) => panic!("{VARIABLE}={value}: it can only be `write`, or absent"),
        Err(_) => false,
    };
    for (name, signature, machine) in TABLES {
        let (bytes, path) = (generated(signature, machine), kept(name, "aml"));
        if write {
            fs::write(&path, &bytes).unwrap();
            fs::write(kept(name, "dsl"), disassemble(&bytes)).unwrap();
        }
        let golden = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(
            golden == bytes,
            "{name} has changed. If it is meant, run {VARIABLE}=write cargo test -p acpi --test acpica golden_tables and commit.\n{}",
            differences(&disassemble(&golden), &disassemble(&bytes))
        );
    }
}

#[test]
fn golden_sources_are_the_golden_tables_disassembled() {
    for (name, ..) in TABLES {
        let source = fs::read_to_string(kept(name, "dsl")).unwrap();
        let table = disassemble(&fs::read(kept(name, "aml")).unwrap());
        assert!(essence(&source) == essence(&table), "{name}: {}", differences(&source, &table));
    }
}

/// The names of all objects by the node below the host bridge that has them, as the golden source declares them.
fn objects() -> BTreeMap<String, Vec<String>> {
    let source = fs::read_to_string(kept("dsdt", "dsl")).unwrap();
    let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let (mut scopes, mut header) = (Vec::<String>::new(), String::new());
    for line in source.lines().map(str::trim) {
        match line {
            "{" => scopes.push(std::mem::take(&mut header)),
            // A resource template ends with a parenthesis.
            _ if line.starts_with('}') => drop(scopes.pop()),
            _ => {}
        }
        let Some((kind, rest)) = line.split_once(" (") else { continue };
        let name = rest.split([',', ')']).next().unwrap_or_default().trim().to_owned();
        if ["Device", "PowerResource", "Method", "Name"].contains(&kind) {
            let path = scopes.iter().filter(|scope| !scope.is_empty()).cloned().collect::<Vec<_>>().join(".");
            all.entry(path.trim_start_matches("\\_SB.PCI0.").to_owned()).or_default().push(name.clone());
        }
        // What follows between braces belongs to it, if it has a scope of its own.
        header = if ["Device", "PowerResource", "Scope"].contains(&kind) { name } else { String::new() };
    }
    all
}

#[test]
fn golden_nodes_have_what_the_drivers_of_gpus_and_windows_look_for() {
    let all = objects();
    let of = |node: &str| all.get(node).unwrap_or_else(|| panic!("no node {node} in {all:#?}"));
    for (who, nodes, names) in WANTED {
        for node in nodes {
            for name in names {
                assert!(
                    of(node).iter().any(|object| object == name),
                    "{who} looks for {name} of {node}: {all:#?}"
                );
            }
        }
    }
    for node in OFFERED {
        assert_eq!(
            of(node).iter().filter(|name| *name == "PWRR").count(),
            1,
            "{node}: one power resource of its own"
        );
        let resource = of(&format!("{node}.PWRR"));
        assert_eq!(resource, &["_STA", "_ON", "_OFF"], "methods of {node}.PWRR");
        for harmful in ["_EJ0", "_STA", "_PRW", "_PS0", "_PS3", "_RMV"] {
            assert!(!of(node).iter().any(|object| object == harmful), "{node} has {harmful}");
        }
    }
    for node in NOT_OFFERED {
        let kept: Vec<_> = of(node).iter().filter(|name| !name.starts_with('S')).collect();
        assert_eq!(kept, ["_ADR"], "{node}");
    }
}

#[test]
fn golden_lists_of_power_resources_are_one_reference_to_the_nodes_own() {
    let scratch = Scratch::new();
    scratch.write("dsdt.aml", fs::read(kept("dsdt", "aml")).unwrap());
    for node in OFFERED {
        for list in ["_PR0", "_PR2", "_PR3"] {
            let command = format!(r"evaluate \_SB.PCI0.{node}.{list}");
            let (_, output) = scratch.run("acpiexec", &["-b", &command, "dsdt.aml"]);
            assert!(
                output.contains("Contains 1 Elements") && output.contains("Name PWRR Power"),
                "{command}: {output}"
            );
        }
        let command = format!(r"evaluate \_SB.PCI0.{node}._S0W");
        let (_, output) = scratch.run("acpiexec", &["-b", &command, "dsdt.aml"]);
        assert!(output.contains("[Integer] = 0000000000000004"), "wake from D3cold: {output}");
    }
}
