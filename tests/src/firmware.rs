//! The host's firmware table: a power resource for each slot, written for the slots a scenario declares.
//!
//! ACPI 6.5 section 7.2. `_ON` and `_OFF` store one byte to the debug console (port 0xE9) so that the test bed has the
//! firmware's own record: `'A' + slot` for on, `'a' + slot` for off.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::command::capture;
use crate::error::{Result, file_error};
use crate::spec::{FIRST_PORT, HostSpec};

/// What the host writes to a port's Interrupt Line register, which nobody else uses there, to have the next `_ON` of a fragile slot
/// leave it dead: the port's bus number becomes [`NOWHERE`], so that nothing below it can be reached, as with a slot whose power
/// supply has failed.
pub const BROKEN: u8 = 0xdd;
/// Bus 255, which no host has.
const NOWHERE: u8 = 0xff;

/// What one byte of the debug console says: the slot, and whether its power went on.
pub fn decode(byte: u8) -> Option<(usize, bool)> {
    match byte {
        b'A'..=b'Z' => Some((usize::from(byte - b'A'), true)),
        b'a'..=b'z' => Some((usize::from(byte - b'a'), false)),
        _ => None,
    }
}

/// The table's source text, or `None` when no slot has a power resource.
pub fn source(spec: &HostSpec) -> Option<String> {
    if !spec.slots.iter().any(|slot| slot.power) {
        return None;
    }
    let mut asl = String::from("DefinitionBlock (\"\", \"SSDT\", 2, \"DRMSE\", \"BEDPOWER\", 1)\n{\n");
    let powered = || spec.slots.iter().enumerate().filter(|(_, slot)| slot.power);
    for (slot, spec) in powered() {
        let port = port_name(slot);
        let _ = writeln!(asl, "  External (\\_SB.PCI0.{port}, DeviceObj)");
        for function in 0..spec.functions.len() {
            let _ = writeln!(asl, "  External (\\_SB.PCI0.{port}.S{function:02X}, DeviceObj)");
        }
        if spec.fragile {
            // Secondary and subordinate bus number, and Interrupt Line (PCI-to-PCI Bridge 1.2, section 3.2.5).
            let _ = write!(
                asl,
                "  Scope (\\_SB.PCI0.{port})\n  {{\n    OperationRegion (BCFG, PCI_Config, 0x19, 0x24)\n    \
                 Field (BCFG, ByteAcc, NoLock, Preserve) {{ BSEC, 8, BSUB, 8, Offset (0x23), BILN, 8 }}\n  }}\n",
            );
        }
    }
    asl.push_str(
        "  Scope (\\_SB)\n  {\n    OperationRegion (BDBG, SystemIO, 0xE9, 1)\n    \
         Field (BDBG, ByteAcc, NoLock, Preserve) { BDBB, 8 }\n",
    );
    for (slot, spec) in powered() {
        let index = u8::try_from(slot).unwrap_or(25).min(25);
        let (on, off) = (b'A' + index, b'a' + index);
        let delay =
            if spec.on_delay_ms > 0 { format!("Sleep ({}) ", spec.on_delay_ms) } else { String::new() };
        let dead = if spec.fragile {
            let port = format!("\\_SB.PCI0.{}", port_name(slot));
            format!(
                "If ({port}.BILN == {BROKEN:#x}) {{ {port}.BSEC = {NOWHERE:#x} {port}.BSUB = {NOWHERE:#x} }} "
            )
        } else {
            String::new()
        };
        let _ = write!(
            asl,
            "    Name (BST{slot}, One)\n    PowerResource (BPR{slot}, 0, 0)\n    {{\n      \
             Method (_STA) {{ Return (BST{slot}) }}\n      \
             Method (_ON, 0, Serialized) {{ {delay}{dead}BST{slot} = One BDBB = 0x{on:02X} }}\n      \
             Method (_OFF, 0, Serialized) {{ BST{slot} = Zero BDBB = 0x{off:02X} }}\n    }}\n",
        );
    }
    asl.push_str("  }\n");
    for (slot, spec) in powered() {
        for function in 0..spec.functions.len() {
            let _ = write!(
                asl,
                "  Scope (\\_SB.PCI0.{}.S{function:02X})\n  {{\n    \
                 Name (_PR0, Package () {{ \\_SB.BPR{slot} }})\n    \
                 Name (_PR3, Package () {{ \\_SB.BPR{slot} }})\n  }}\n",
                port_name(slot)
            );
        }
    }
    asl.push_str("}\n");
    Some(asl)
}

/// Compiles the table of `spec` to `path`; false when there is none to compile.
pub fn compile(spec: &HostSpec, path: &Path) -> Result<bool> {
    let Some(asl) = source(spec) else { return Ok(false) };
    let input = path.with_extension("asl");
    fs::write(&input, asl).map_err(file_error("write", &input))?;
    let base = path.with_extension("");
    capture(Command::new("iasl").arg("-ve").arg("-p").arg(&base).arg(&input))?;
    Ok(true)
}

/// QEMU names a device by its `device << 3 | function` in hexadecimal.
fn port_name(slot: usize) -> String {
    format!("S{:02X}", (FIRST_PORT + slot) << 3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Device, Slot};

    #[test]
    fn two_functions_of_a_slot_share_one_power_resource() {
        let asl = source(&HostSpec::new(&[Slot::with(&[Device::Igb, Device::E1000e])])).unwrap();
        assert_eq!(asl.matches("PowerResource").count(), 1);
        assert_eq!(asl.matches("_PR3").count(), 2);
        assert!(asl.contains("S80.S01"));
    }

    #[test]
    fn only_a_fragile_slot_can_be_left_dead_by_its_method() {
        let slot = Slot { fragile: true, ..Slot::new(Device::Igb) };
        let asl = source(&HostSpec::new(&[Slot::new(Device::Nvme), slot])).unwrap();
        assert_eq!(asl.matches("BILN == 0xdd").count(), 1);
        assert!(asl.contains("\\_SB.PCI0.S88.BSEC = 0xff"));
        assert!(!source(&HostSpec::new(&[Slot::new(Device::Igb)])).unwrap().contains("BILN"));
    }

    #[test]
    fn a_host_without_power_resources_has_no_table() {
        assert!(source(&HostSpec::new(&[Slot { power: false, ..Slot::new(Device::Gpu) }])).is_none());
    }

    #[test]
    fn the_debug_bytes_name_slot_and_direction() {
        assert_eq!(decode(b'A'), Some((0, true)));
        assert_eq!(decode(b'b'), Some((1, false)));
        assert_eq!(decode(b'\n'), None);
    }
}
