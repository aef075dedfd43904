//! What happens to a slot of the emulated host from outside: its button is pressed, its device is pulled out and put back, its power
//! supply fails and is repaired. (PCI Express 5.0, section 6.7, hot-plug; PCI-to-PCI Bridge 1.2, section 3.2.5.)

use std::thread;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::firmware;
use crate::host::{Host, sysfs};
use crate::qemu::device_id;
use crate::rpc::wait_for;
use crate::spec::{address, port};
use crate::timeline::Lane;

/// How long the host's kernel may take to find a device or to let it go.
const PATIENCE: Duration = Duration::from_secs(30);
/// A second (PCI Express 5.0, section 6.7.1.8), and some more.
const SWITCHED_OFF: Duration = Duration::from_millis(2500);
/// Secondary and subordinate bus number, and Interrupt Line, in a port's configuration space.
const SECONDARY_BUS: usize = 0x19;
const INTERRUPT_LINE: usize = 0x3c;
/// The PCI Express capability, and in it Slot Control and Slot Status.
const PCI_EXPRESS: u8 = 0x10;
const SLOT_CONTROL: usize = 0x18;
const SLOT_STATUS: usize = 0x1a;
/// Bits of Slot Control: power controller and power indicator off; Hot-Plug Interrupt Enable.
const POWER_OFF: u16 = 1 << 10 | 3 << 8;
const INTERRUPT: u16 = 1 << 5;
/// Bit of Slot Status, cleared by writing one: the button was pressed.
const BUTTON: u16 = 1;

impl Host {
    /// Presses the button of a hotplug slot: the host lets the device go as soon as nobody has it, and QEMU then takes it away.
    pub fn unplug(&self, slot: usize) -> Result<()> {
        self.note(format!("[button of slot {slot} pressed]"));
        self.qemu.unplug(&device_id(slot, 0))
    }

    /// Pulls the device out of a hotplug slot without a warning: nothing there answers any more, at once.
    pub fn pull(&self, slot: usize) -> Result<()> {
        self.note(format!("[device pulled out of slot {slot}]"));
        self.unheard(slot, |at, control| {
            // QEMU takes the device of a slot that is switched off. The host hears of it when the slot is on again: as of a device that
            // has been pulled out of a slot with power.
            self.write_config(
                &port(slot),
                at + SLOT_CONTROL,
                &((control & !INTERRUPT) | POWER_OFF).to_le_bytes(),
            )
        })
    }

    /// Puts the NIC back into its hotplug slot, waits until the host has found it, and gives it to VFIO.
    pub fn plug(&self, slot: usize) -> Result<()> {
        let device = self.spec.slots[slot].functions[0];
        wait_for(&format!("slot {slot} is empty"), PATIENCE, || {
            Ok(if self.qemu.has(&device_id(slot, 0))? { Err("still there".to_owned()) } else { Ok(()) })
        })?;
        // The host has just switched the slot off, and does not look at it for a second.
        thread::sleep(SWITCHED_OFF);
        self.unheard(slot, |at, _| {
            self.qemu.plug(device, slot)?;
            // QEMU presses the button as well, which the host would take for a wish to have the device back.
            self.write_config(&port(slot), at + SLOT_STATUS, &BUTTON.to_le_bytes())
        })?;
        self.note(format!("[device put into slot {slot}]"));
        let bdf = address(slot, 0);
        let directory = sysfs(&bdf, "");
        wait_for(&format!("host: {bdf} is found"), PATIENCE, || {
            let found = self.probe(&format!("test -e {directory}"))?.status == 0;
            Ok(if found { Ok(()) } else { Err("absent".to_owned()) })
        })?;
        self.sh(&format!(
            "cd {directory} && echo vfio-pci >driver_override && {{ [ -e driver ] || echo {bdf} >/sys/bus/pci/drivers_probe; }}; \
             test -e driver"
        ))
        .map(drop)
    }

    /// Has the firmware's `_ON` of a fragile slot leave it dead from now on.
    pub fn break_power(&self, slot: usize) -> Result<()> {
        self.note(format!("[power supply of slot {slot} fails from now on]"));
        self.write_config(&port(slot), INTERRUPT_LINE, &[firmware::BROKEN])
    }

    /// Repairs that, and what it has done.
    pub fn mend_power(&self, slot: usize) -> Result<()> {
        self.note(format!("[power supply of slot {slot} repaired]"));
        let bus = u8::try_from(slot + 1).unwrap_or(u8::MAX);
        self.write_config(&port(slot), INTERRUPT_LINE, &[0])?;
        self.write_config(&port(slot), SECONDARY_BUS, &[bus, bus])
    }

    /// Does something to a slot of which the host hears only when it is done. The closure is given the place of the port's PCI Express
    /// capability and its Slot Control.
    fn unheard(&self, slot: usize, act: impl FnOnce(usize, u16) -> Result<()>) -> Result<()> {
        let control = sysfs(&port(slot), "power/control");
        // A port that goes to sleep in between would switch its interrupt off and on by itself.
        self.sh(&format!("echo on >{control}"))?;
        let config = self.config(&port(slot))?;
        let word = |at: usize| Some(u16::from_le_bytes([*config.get(at)?, *config.get(at + 1)?]));
        let found = capability(&config, PCI_EXPRESS).and_then(|at| Some((at, word(at + SLOT_CONTROL)?)));
        let Some((at, old)) = found else {
            return Err(Error::Check(format!("the port of slot {slot} has no PCI Express capability")));
        };
        self.write_config(&port(slot), at + SLOT_CONTROL, &(old & !INTERRUPT).to_le_bytes())?;
        let done = act(at, old);
        self.write_config(&port(slot), at + SLOT_CONTROL, &(old | INTERRUPT).to_le_bytes())?;
        self.sh(&format!("echo auto >{control}"))?;
        done
    }

    fn note(&self, text: String) {
        self.timeline.record(Lane::Host, text);
    }

    /// The first 256 bytes of a function's configuration space. Wakes it.
    fn config(&self, bdf: &str) -> Result<Vec<u8>> {
        let text = self.sh(&format!("head -c 256 {} | xxd -p -c 256", sysfs(bdf, "config")))?;
        let digits: Vec<char> = text.chars().filter(char::is_ascii_hexdigit).collect();
        let byte = |pair: &[char]| u8::from_str_radix(&String::from_iter(pair), 16).ok();
        Ok(digits.chunks(2).filter_map(byte).collect())
    }

    /// Writes to a function's configuration space in one access, if aligned. Wakes it.
    fn write_config(&self, bdf: &str, at: usize, bytes: &[u8]) -> Result<()> {
        let octal: String = bytes.iter().map(|byte| format!("\\{byte:03o}")).collect();
        self.sh(&format!(
            "printf '{octal}' | dd of={} bs={} oflag=seek_bytes seek={at} count=1 conv=notrunc status=none",
            sysfs(bdf, "config"),
            bytes.len()
        ))
        .map(drop)
    }
}

/// Where the capability `id` is in a function's configuration space (PCI 3.0, section 6.7).
fn capability(config: &[u8], id: u8) -> Option<usize> {
    let mut at = usize::from(*config.get(0x34)?);
    // A list can hold no more than fit between 0x40 and 0x100.
    for _ in 0..48 {
        match config.get(at..at + 2) {
            Some([found, _]) if *found == id => return Some(at),
            Some([_, next]) if *next >= 0x40 => at = usize::from(*next),
            _ => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capability_is_found_and_a_list_in_a_circle_ends() {
        let mut config = vec![0; 256];
        config[0x34] = 0x40;
        config[0x40..0x42].copy_from_slice(&[0x01, 0x90]);
        config[0x90..0x92].copy_from_slice(&[PCI_EXPRESS, 0x40]);
        assert_eq!(capability(&config, PCI_EXPRESS), Some(0x90));
        assert_eq!(capability(&config, 0x05), None);
    }
}
