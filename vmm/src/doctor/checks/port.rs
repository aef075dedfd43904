//! Whether a PCIe port above the device may lose its power: the conditions of Linux's `pci_bridge_d3_possible`, which sysfs does not
//! show as such.

use std::fs;
use std::path::PathBuf;

use pci::Bdf;
use vfio_pm::sysfs::DevicePower;

use super::Patient;
use super::device::power_control;
use crate::doctor::finding::{Check, Finding, Reading, Severity};
use crate::doctor::host::Host;

/// Linux lets ports of x86 machines sleep whose firmware is of this year or newer.
const FIRST_YEAR: u16 = 2015;
/// Service number of hotplug in the name of a port's service device.
const SERVICE_HOTPLUG: u32 = 4;
/// Boards whose ports Linux never lets sleep: vendor and name.
const BOARDS: [(&str, &str); 3] = [
    ("Gigabyte Technology Co., Ltd.", "X299 DESIGNARE EX-CF"),
    ("Elo Touch Solutions", "Geminilake"),
    ("Hewlett-Packard", "1972"),
];

/// All findings about one port; `child` is the device below it on the way down.
pub fn check(host: &Host, port: &DevicePower, child: Bdf) -> Vec<Finding> {
    let bdf = port.bdf;
    let status = host.device(bdf, "power/runtime_status");
    let mut findings = Vec::new();
    if port.d3cold_allowed == Some(false) {
        let reading = host.device(bdf, "d3cold_allowed");
        let remedy = format!(
            "Run: echo 1 >{} (it does not help a port without a power management capability)",
            reading.path.display()
        );
        let meaning =
            format!("Port {bdf} is not allowed to go to D3cold, and it is the way of {child} there.");
        findings.push(
            Finding::device(bdf, Check::D3coldAllowed, Severity::Blocker, meaning)
                .read(reading)
                .remedy(remedy),
        );
    }
    // A port that sleeps has answered all further questions.
    if !status.is("suspended") {
        if let Some(blocker) = never_sleeps(host, bdf, child) {
            findings.push(blocker);
        } else if !port.may_suspend {
            findings.push(power_control(host, bdf));
        }
    }
    if findings.is_empty() {
        let meaning = if status.is("suspended") {
            format!("Port {bdf} sleeps.")
        } else {
            format!("Port {bdf} may sleep when all below it sleeps.")
        };
        findings.push(
            Finding::device(bdf, Check::Port, Severity::Ok, meaning)
                .reads([host.device(bdf, "power/control"), status]),
        );
    }
    findings
}

/// Why Linux does not let this port sleep, whatever its `power/control` says.
fn never_sleeps(host: &Host, bdf: Bdf, child: Bdf) -> Option<Finding> {
    let blocker = |check, meaning: String| Finding::device(bdf, check, Severity::Blocker, meaning);
    let pcie = host.presence(host.attribute(bdf, "max_link_speed"));
    if pcie.value.is_none() {
        let meaning = format!("{bdf} is a conventional PCI bridge, which Linux does not put to sleep.");
        return Some(blocker(Check::Port, meaning).read(pcie).remedy("Use a PCI Express slot."));
    }
    let driver = host.presence(host.attribute(bdf, "driver"));
    if driver.value.is_none() {
        let meaning = format!("Port {bdf} has no driver, and so nobody lets it sleep.");
        return Some(
            blocker(Check::Port, meaning)
                .read(driver)
                .remedy("Boot the host without pcie_ports=compat, on a kernel that has CONFIG_PCIEPORTBUS."),
        );
    }
    let booted = |word: &str| host.is_booted_with(word);
    if booted("pcie_port_pm=off") {
        let meaning = format!("Linux was told at boot to let no port sleep, {bdf} among them.");
        return Some(
            blocker(Check::Port, meaning)
                .read(host.command_line("pcie_port_pm"))
                .remedy("Boot the host without pcie_port_pm=off."),
        );
    }
    let slot = hotplug_slot(host, child);
    let native = native_hotplug(host, bdf);
    if let (Some(slot), None) = (&slot, &native) {
        let meaning = format!(
            "The slot below port {bdf} is hotplugged by the firmware, which must find the port awake."
        );
        return Some(
            blocker(Check::Hotplug, meaning)
                .read(slot.clone())
                .remedy("Switch hotplug of that slot off in the firmware's settings, or use another slot."),
        );
    }
    if booted("pcie_port_pm=force") {
        return None;
    }
    if let Some(native) = native {
        // Such a port sleeps if its own node has power resources or methods.
        let managed = host.presence(host.attribute(bdf, "firmware_node/power_resources_D0"));
        if managed.value.is_some() {
            return None;
        }
        let meaning = format!(
            "Port {bdf} supports hotplug, and its firmware does not say that it still does when it sleeps."
        );
        return Some(blocker(Check::Hotplug, meaning).reads([native, managed]).remedy(
            "Switch hotplug of that slot off in the firmware's settings, or boot the host with pcie_port_pm=force.",
        ));
    }
    let dmi = |name: &str| host.text(host.sysfs.join("class/dmi/id").join(name));
    let (vendor, name) = (dmi("board_vendor"), dmi("board_name"));
    if BOARDS.iter().any(|board| vendor.is(board.0) && name.is(board.1)) {
        let meaning =
            format!("Linux lets no port of this board sleep, {bdf} among them: it has proven faulty.");
        return Some(
            blocker(Check::Port, meaning)
                .reads([vendor, name])
                .remedy("Boot the host with pcie_port_pm=force, at your own risk."),
        );
    }
    old_firmware(host, bdf)
}

fn old_firmware(host: &Host, bdf: Bdf) -> Option<Finding> {
    let date = host.text(host.sysfs.join("class/dmi/id/bios_date"));
    let year: Option<u16> = date.value.as_deref().and_then(|d| d.rsplit('/').next()?.parse().ok());
    if year.is_some_and(|year| year >= FIRST_YEAR) {
        return None;
    }
    let what = match year {
        Some(year) => format!("is of {year}"),
        None => "has no date".to_owned(),
    };
    let meaning = format!(
        "The host's firmware {what}. Linux lets ports sleep from {FIRST_YEAR} on, so port {bdf} stays on."
    );
    Some(
        Finding::device(bdf, Check::Port, Severity::Blocker, meaning)
            .read(date)
            .remedy("Boot the host with pcie_port_pm=force, or update its firmware."),
    )
}

/// The hotplug slot that a device is in, whoever handles it. A slot without the attribute is only a number on the case.
fn hotplug_slot(host: &Host, child: Bdf) -> Option<Reading> {
    let address = format!("{:04x}:{:02x}:{:02x}", child.segment, child.bus, child.devfn.device());
    let slots = fs::read_dir(host.sysfs.join("bus/pci/slots")).ok()?;
    slots.flatten().find_map(|slot| {
        let power: PathBuf = slot.path().join("power");
        let here = host.text(slot.path().join("address")).is(&address);
        (here && power.exists()).then(|| Reading::new(slot.path().join("address"), Some(address.as_str())))
    })
}

/// The hotplug service of a port, there when Linux handles its hotplug itself. It is named `PORT:pcieTSS`, type and service.
fn native_hotplug(host: &Host, port: Bdf) -> Option<Reading> {
    let prefix = format!("{port}:pcie");
    let directory = host.attribute(port, "");
    let mut names =
        fs::read_dir(directory).ok()?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let name = names.find(|name| {
        let service = name.strip_prefix(&prefix).and_then(|hex| u32::from_str_radix(hex, 16).ok());
        service.is_some_and(|service| service & 0xff == SERVICE_HOTPLUG)
    })?;
    Some(host.presence(host.attribute(port, &name)))
}

/// A device whose own power is cut in a slot that Linux watches: the link goes down, which looks as if it had been pulled out.
pub fn hotplug_of_a_slot_that_is_cut(host: &Host, patient: &Patient) -> Option<Finding> {
    let port = patient.power.bridges.first()?;
    let native = native_hotplug(host, port.bdf)?;
    let meaning = format!(
        "Port {} supports hotplug. When the power of {} is cut, Linux may take it for removed.",
        port.bdf,
        patient.bdf()
    );
    Some(
        Finding::device(port.bdf, Check::Hotplug, Severity::Warning, meaning)
            .read(native)
            .remedy("If the device disappears: switch hotplug of that slot off, or keep the device in D3hot: write 0 to its d3cold_allowed."),
    )
}
