//! Whether the host's firmware can cut the device's power, and whether all that shares it may sleep.
//!
//! ACPI 6.5 sections 6.3.3 (`_EJ0`), 7.3.8 (`_PR0`) and 7.3.11 (`_PR3`), as Linux shows them in `firmware_node`.

use devices::vfio::bind::VFIO_PCI;
use pci::Bdf;
use vfio_pm::sysfs::DevicePower;

use super::device::power_control;
use super::{Patient, port};
use crate::doctor::finding::{Check, Finding, Reading, Severity};
use crate::doctor::host::Host;
use crate::doctor::pm;

/// The driver of PCIe ports.
const PORT_DRIVER: &str = "pcieport";

/// All findings about the way from D3hot to D3cold.
pub fn check(host: &Host, patient: &Patient) -> Vec<Finding> {
    let (by, finding) = match cutter(host, patient) {
        Ok(found) => found,
        Err(blocker) => return vec![blocker],
    };
    let own = by.bdf == patient.bdf();
    let mut findings = vec![finding];
    findings.extend(wakeup(host, patient.bdf(), patient.pm.pme_from_d3cold, own));
    if own {
        findings.extend(port::hotplug_of_a_slot_that_is_cut(host, patient));
        for other in patient.power.partners() {
            findings.extend(neighbour(host, patient, other));
        }
        return findings;
    }
    let mut child = patient.bdf();
    for bridge in &patient.power.bridges {
        findings.extend(port::check(host, bridge, child));
        if bridge.bdf == by.bdf {
            break;
        }
        child = bridge.bdf;
    }
    for other in &patient.power.neighbours {
        findings.extend(neighbour(host, patient, other));
    }
    findings
}

/// The device itself or the bridge above it that the platform cuts from power, or why there is none.
fn cutter<'a>(host: &Host, patient: &'a Patient) -> Result<(&'a DevicePower, Finding), Finding> {
    let bdf = patient.bdf();
    let chain = || std::iter::once(&patient.power.device).chain(&patient.power.bridges);
    let resources = |bdf| host.presence(host.attribute(bdf, "firmware_node/power_resources_D3hot"));
    let eject = |bdf| host.presence(host.attribute(bdf, "firmware_node/eject"));
    let with: Vec<&DevicePower> = chain().filter(|device| device.has_pr3).collect();
    if let Some(by) = with.iter().find(|device| !device.ejectable) {
        let what = if by.bdf == bdf {
            "has power resources (_PR3) of its own".to_owned()
        } else {
            format!("is below {}, which has power resources (_PR3)", by.bdf)
        };
        let meaning = format!("The host's firmware can cut the power: {bdf} {what}.");
        let finding = Finding::device(by.bdf, Check::PowerResources, Severity::Ok, meaning);
        return Ok((by, finding.reads([resources(by.bdf), eject(by.bdf)])));
    }
    if let Some(by) = with.first() {
        let meaning = format!(
            "The host's firmware declares {} ejectable (_EJ0). Linux leaves the power of such a device alone, so {bdf} gets no deeper \
             than D3hot.",
            by.bdf
        );
        return Err(Finding::device(by.bdf, Check::Ejectable, Severity::Blocker, meaning)
            .reads([resources(by.bdf), eject(by.bdf)])
            .remedy(
                "Switch PCI hotplug of that slot off in the firmware's settings (of a virtual host: ACPI hotplug with bridge support), \
                 or use another slot.",
            ));
    }
    let meaning = format!(
        "The host's firmware cannot cut the power: neither {bdf} nor a bridge above it has power resources (_PR3), so D3hot is the \
         deepest state."
    );
    let remedy = "Look in the firmware's settings for runtime D3, RTD3 or D3cold; try another slot. D3hot saves some power too.";
    Err(Finding::device(bdf, Check::PowerResources, Severity::Blocker, meaning)
        .reads(chain().map(|device| resources(device.bdf)))
        .remedy(remedy))
}

/// Whether the device is to wake the system and cannot from D3cold. `own`: its power is cut by resources of its own.
fn wakeup(host: &Host, bdf: Bdf, pme_from_d3cold: Option<bool>, own: bool) -> Option<Finding> {
    let reading = host.device(bdf, "power/wakeup");
    if !reading.is("enabled") {
        return None;
    }
    let finding = |severity, meaning: String| Finding::device(bdf, Check::Wakeup, severity, meaning);
    let remedy = format!("Run: echo disabled >{}", reading.path.display());
    Some(match pme_from_d3cold {
        Some(true) => {
            finding(Severity::Ok, format!("{bdf} is to wake the host, and can from D3cold.")).read(reading)
        }
        Some(false) => {
            // The kernel vetoes the port's D3 for it; resources of the device's own it judges by _S0W.
            let severity = if own { Severity::Warning } else { Severity::Blocker };
            let meaning =
                format!("{bdf} is to wake the host, which it cannot from D3cold; so it is not put there.");
            finding(severity, meaning).read(reading).remedy(remedy)
        }
        None => {
            let meaning = format!(
                "{bdf} is to wake the host; whether it can from D3cold cannot be known without waking it."
            );
            finding(Severity::Info, meaning).read(reading).remedy(format!("If it stays in D3hot: {remedy}"))
        }
    })
}

/// Another device that shares the power.
fn neighbour(host: &Host, patient: &Patient, other: &DevicePower) -> Vec<Finding> {
    let (bdf, shared) = (other.bdf, patient.bdf());
    if other.driver.as_deref() == Some(PORT_DRIVER) {
        return port::check(host, other, bdf);
    }
    let mut findings: Vec<Finding> = Vec::new();
    let driver = Reading::new(host.attribute(bdf, "driver"), other.driver.clone());
    let status = host.device(bdf, "power/runtime_status");
    let awake = !status.is("suspended");
    // For a driver of the host's own there is one finding, below.
    if !other.may_suspend && other.driver.as_deref().is_none_or(|driver| driver == VFIO_PCI) {
        findings.push(power_control(host, bdf));
    }
    if other.d3cold_allowed == Some(false) {
        let reading = host.device(bdf, "d3cold_allowed");
        let remedy = format!(
            "Run: echo 1 >{} (it does not help a device without a power management capability)",
            reading.path.display()
        );
        let meaning = format!("{bdf} is not allowed to go to D3cold, and {shared} shares its power.");
        findings.push(
            Finding::device(bdf, Check::D3coldAllowed, Severity::Blocker, meaning)
                .read(reading)
                .remedy(remedy),
        );
    }
    findings.extend(
        wakeup(host, bdf, pm::evidence(host, bdf, false).pme_from_d3cold, false)
            .filter(|finding| finding.severity > Severity::Info),
    );
    let finding = |severity, meaning: String| {
        Finding::device(bdf, Check::Neighbour, severity, meaning).reads([driver.clone(), status.clone()])
    };
    match other.driver.as_deref() {
        Some(VFIO_PCI) if awake => findings.push(
            finding(Severity::Info, format!("{bdf} shares the power of {shared} and is awake; it sleeps when its VM lets it, or has none.")),
        ),
        Some("pci-stub") => findings.push(
            finding(
                Severity::Blocker,
                format!("{bdf} shares the power of {shared}, and its driver pci-stub never lets it sleep."),
            )
            .remedy(format!("Run: dormouse bind {bdf}")),
        ),
        Some(driver) if driver != VFIO_PCI && awake => findings.push(
            finding(
                Severity::Blocker,
                format!("{bdf} shares the power of {shared} and is awake: the host's driver {driver} has it."),
            )
            .remedy(format!("Give it to the guest as well, or to nobody: dormouse bind {bdf}; or let its driver suspend it.")),
        ),
        _ => findings.push(finding(
            Severity::Ok,
            format!("{bdf} shares the power of {shared} and sleeps or may sleep."),
        )),
    }
    findings
}

/// The state that the device is in. `clear`: nothing has been found that would explain less than D3cold.
pub fn state(host: &Host, patient: &Patient, clear: bool) -> Finding {
    let bdf = patient.bdf();
    let (state, status) = (host.device(bdf, "power_state"), host.device(bdf, "power/runtime_status"));
    let finding = |severity, meaning: String| Finding::device(bdf, Check::State, severity, meaning);
    let found = if status.is("error") {
        finding(
            Severity::Blocker,
            format!("Run-time power management of {bdf} has failed, and the kernel has given it up."),
        )
        .remedy(format!(
            "Look in the host's kernel log for {bdf}; then `dormouse unbind {bdf}` and bind it again."
        ))
    } else if status.is("unsupported") {
        finding(Severity::Blocker, format!("Run-time power management is switched off for {bdf}.")).remedy(
            format!("Look in the host's kernel log for {bdf}; a driver may have done it. Bind it again."),
        )
    } else if !status.is("suspended") {
        let awake = finding(Severity::Info, format!("{bdf} is awake."));
        match &patient.owner {
            None if clear => awake.remedy(
                "No VM has it. If it stays awake, something on the host reads it again and again: look for monitoring that runs \
                 lspci or reads `config`.",
            ),
            _ => awake,
        }
    } else if state.is("D3cold") {
        finding(Severity::Ok, format!("{bdf} sleeps in D3cold: it has no power."))
    } else if clear {
        let meaning = format!(
            "{bdf} sleeps, but not in D3cold, and nothing that can be seen explains it. The firmware (_S0W), the driver or a quirk \
             of the kernel may forbid it."
        );
        finding(Severity::Warning, meaning).remedy(format!("Try it: dormouse doctor {bdf} --verify"))
    } else {
        finding(Severity::Info, format!("{bdf} sleeps, but still has its power."))
    };
    // The counters are there only in kernels with CONFIG_PM_ADVANCED_DEBUG, the firmware's view only with a node.
    let more = ["firmware_node/power_state", "power/runtime_usage", "power/runtime_active_kids"];
    let more = more.map(|name| host.device(bdf, name));
    found.reads([state, status]).reads(more.into_iter().filter(|reading| reading.value.is_some()))
}
