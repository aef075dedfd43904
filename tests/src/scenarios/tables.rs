//! The guest's ACPI tables, taken out of a running guest and given to ACPICA's own tools.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::steps::vm;
use super::{E1000E, GPU, scenario};
use crate::command::{capture_text, output};
use crate::error::{Error, Result, ensure, file_error};
use crate::paths;
use crate::runner::{Case, Scenario};

pub fn table() -> Vec<Scenario> {
    vec![scenario("acpi_tables_are_accepted_by_iasl_and_acpiexec", accepted)]
}

fn accepted(case: &Case<'_>) -> Result<()> {
    let guest = case.host.start_vm(&vm(case, &[GPU, E1000E]))?;
    let dir = paths::run_dir()?;
    let names = guest.sh("cd /sys/firmware/acpi/tables && ls -p | grep -v /")?;
    for name in names.split_whitespace() {
        let hex = guest.sh(&format!("xxd -p /sys/firmware/acpi/tables/{name} | tr -d '\\n'"))?;
        let bytes = decode(&hex).ok_or_else(|| Error::Check(format!("table {name} came as {hex}")))?;
        let path = dir.join(format!("{name}.dat"));
        fs::write(&path, bytes).map_err(file_error("write", &path))?;
        disassembles(&path)?;
    }
    for wanted in ["DSDT", "FACP", "APIC", "MCFG"] {
        ensure(names.split_whitespace().any(|name| name == wanted), || format!("no {wanted}, only {names}"))?;
    }
    // ACPICA loads the namespace and evaluates every predefined name in it.
    let words = ["-b", "namespace; predefined; quit"];
    let text = capture_text(Command::new("acpiexec").args(words).arg(dir.join("DSDT.dat")))?;
    for wanted in ["_PR0", "_PR3", "_S0W"] {
        ensure(text.contains(wanted), || format!("acpiexec finds no {wanted}: {text}"))?;
    }
    ensure(!text.contains("ACPI Error"), || format!("acpiexec complains: {text}"))?;
    let _ = fs::remove_dir_all(&dir);
    guest.power_off()
}

fn disassembles(table: &Path) -> Result<()> {
    let output = output(Command::new("iasl").arg("-d").arg(table))?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let bad = !output.status.success() || text.contains("Error") || text.contains("Warning");
    ensure(!bad, || format!("iasl does not like {}: {text}", table.display()))?;
    if table.ends_with("DSDT.dat") {
        let source = table.with_extension("dsl");
        let again = output_text(
            Command::new("iasl").args(["-ve", "-p"]).arg(table.with_extension("again")).arg(&source),
        )?;
        ensure(!again.contains("Error "), || format!("iasl does not compile its own disassembly: {again}"))?;
    }
    Ok(())
}

fn output_text(command: &mut Command) -> Result<String> {
    let output = output(command)?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Ok(text)
}

fn decode(hex: &str) -> Option<Vec<u8>> {
    let hex = hex.trim().as_bytes();
    hex.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}
