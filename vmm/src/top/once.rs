//! One look as text or JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::board::{Board, Vm};
use super::columns::{Medium, Sheet};
use super::sockets::Source;
use crate::client::report::DevicePower;
use crate::table::{Cell, Tone};

/// Version of the JSON form; it changes when something in it gets another meaning or goes.
const JSON_VERSION: u32 = 1;

/// All VMs, each above its devices.
pub fn table(board: &Board, source: &Source) -> String {
    let mut text = String::new();
    if board.vms().is_empty() {
        let _ = match source {
            Source::Directory(directory) => writeln!(
                text,
                "No virtual machine runs: there is no VMM with a status socket in {}.",
                directory.display()
            ),
            Source::Named(_) => writeln!(text, "No virtual machine runs."),
        };
    }
    let sheet = Sheet::new(board, Medium::Once);
    let line = |text: &mut String, cells: Vec<Cell>| {
        text.push_str("  ");
        cells.iter().for_each(|cell| text.push_str(&cell.ansi()));
        text.push('\n');
    };
    for (number, (vm, rows)) in board.vms().iter().zip(&sheet.rows).enumerate() {
        if number > 0 {
            text.push('\n');
        }
        heading(vm).iter().for_each(|cell| text.push_str(&cell.ansi()));
        text.push('\n');
        if !rows.is_empty() {
            line(&mut text, sheet.line(&sheet.head()));
        }
        rows.iter().for_each(|row| line(&mut text, sheet.line(row)));
    }
    if let Some(watts) = board.platform {
        let _ = writeln!(text, "\nplatform {watts:.1} W");
    }
    text
}

/// What is said of a VM as a whole.
pub fn heading(vm: &Vm) -> Vec<Cell> {
    let place = || vm.socket.display().to_string();
    let mut cells = vec![Cell::new(vm.pid.map_or_else(place, |pid| format!("VM {pid}")), Tone::Strong)];
    let name = vm.name.as_ref().map(|name| Cell::plain(format!("  {name}")));
    match &vm.answer {
        Ok(answer) => {
            let tone = if answer.power.state == "Running" { Tone::Good } else { Tone::Notice };
            cells.push(Cell::new(format!("  {}", answer.power.state), tone));
            cells.extend(name);
            let devices = match answer.power.devices.len() {
                0 => "  no assigned device".to_owned(),
                1 => "  1 device".to_owned(),
                number => format!("  {number} devices"),
            };
            cells.push(Cell::new(devices, Tone::Dim));
        }
        Err(error) => {
            cells.extend(name);
            cells.push(Cell::new(format!("  {error}"), Tone::Bad));
        }
    }
    cells
}

/// The same for programs: what each VMM has said, with what is known besides.
pub fn json(board: &Board) -> Result<String, serde_json::Error> {
    let vms: Vec<Value> = board.vms().iter().map(vm_json).collect();
    let mut value = json!({"version": JSON_VERSION, "vms": vms});
    if let Some(watts) = board.platform {
        value["platform_watts"] = rounded(watts);
    }
    Ok(format!("{}\n", serde_json::to_string_pretty(&value)?))
}

fn vm_json(vm: &Vm) -> Value {
    let mut value = json!({"pid": vm.pid, "socket": vm.socket.display().to_string(), "name": vm.name});
    match &vm.answer {
        Err(error) => value["error"] = error.as_str().into(),
        Ok(answer) => {
            value["state"] = answer.power.state.as_str().into();
            let raw =
                answer.raw["devices"].as_array().into_iter().flatten().filter(|device| !device.is_null());
            let device = |(mut raw, device): (Value, &DevicePower)| {
                if let Some(percent) = device.residency() {
                    raw["low_power_percent"] = rounded(percent);
                }
                if let Some(draw) = answer.draw.get(&device.bdf) {
                    raw["watts"] = rounded(draw.watts);
                    raw["watts_of_port"] = draw.shared.into();
                }
                raw
            };
            value["devices"] = raw.cloned().zip(&answer.power.devices).map(device).collect();
        }
    }
    value
}

/// Three decimals: what is measured has no more.
fn rounded(value: f64) -> Value {
    ((value * 1000.0).round() / 1000.0).into()
}
