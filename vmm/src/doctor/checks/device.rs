//! Whether a guest can have the device, and whether the device itself may sleep.

use devices::vfio::host::HostFunction;
use pci::Bdf;

use super::Patient;
use crate::doctor::finding::{Check, Finding, Reading, Severity};
use crate::doctor::host::Host;
use crate::doctor::usage;

/// All findings about the device itself.
pub fn check(host: &Host, patient: &Patient) -> Vec<Finding> {
    let mut findings = kind(host, patient);
    if !findings.is_empty() {
        return findings;
    }
    findings.push(driver(host, patient));
    findings.extend(host_use(host, patient));
    findings.extend(group(host, patient));
    findings.extend(owner(patient));
    findings.push(pm_capability(patient));
    findings.push(own_power_control(host, patient));
    findings.push(d3cold_allowed(host, patient));
    findings.extend(virtual_functions(host, patient));
    findings.extend(pm_qos(host, patient.bdf()));
    findings.extend(consumers(host, patient));
    findings.extend(reset(host, patient.bdf()));
    findings.extend(console(host, patient));
    findings
}

fn kind(host: &Host, patient: &Patient) -> Vec<Finding> {
    let bdf = patient.bdf();
    if patient.function.is_bridge() {
        let meaning = format!("{bdf} is a bridge, which stays with the host.");
        let finding = Finding::device(bdf, Check::Kind, Severity::Blocker, meaning)
            .read(host.device(bdf, "class"))
            .remedy("Name a device behind it.");
        return vec![finding];
    }
    let Some(physical) = patient.function.physical_function else { return Vec::new() };
    let meaning =
        format!("{bdf} is an SR-IOV virtual function of {physical}, which has no power of its own.");
    let link = Reading::new(host.attribute(bdf, "physfn"), Some(physical.to_string()));
    let finding = Finding::device(bdf, Check::Kind, Severity::Blocker, meaning)
        .read(link)
        .remedy(format!("Assign the physical function {physical} to let it sleep."));
    vec![finding]
}

fn driver_reading(host: &Host, function: &HostFunction) -> Reading {
    Reading::new(host.attribute(function.bdf, "driver"), function.driver.clone())
}

fn driver(host: &Host, patient: &Patient) -> Finding {
    let (bdf, function) = (patient.bdf(), &patient.function);
    let reading = driver_reading(host, function);
    if function.is_bound_to_vfio() {
        let meaning = format!("{bdf} is bound to {}.", function.driver_name());
        return Finding::device(bdf, Check::Driver, Severity::Ok, meaning).read(reading);
    }
    let meaning = match function.driver.as_deref() {
        Some(driver) => format!("The host's driver {driver} has {bdf}, so no guest can have it."),
        None => format!("{bdf} has no driver; a guest can have it through vfio-pci only."),
    };
    Finding::device(bdf, Check::Driver, Severity::Blocker, meaning)
        .read(reading)
        .remedy(format!("Run: dormouse bind {bdf}"))
}

fn host_use(host: &Host, patient: &Patient) -> Vec<Finding> {
    if patient.function.is_bound_to_vfio() {
        return Vec::new();
    }
    let bdf = patient.bdf();
    let finding = |(meaning, reading)| {
        Finding::device(bdf, Check::HostUse, Severity::Warning, format!("The host uses {bdf}: {meaning}."))
            .read(reading)
            .remedy("Stop using it before you bind it.")
    };
    usage::by_host(host, &patient.function).into_iter().map(finding).collect()
}

fn group(host: &Host, patient: &Patient) -> Vec<Finding> {
    let Some(group) = &patient.group else { return Vec::new() };
    let (bdf, number) = (patient.bdf(), group.number);
    let others = || group.members.iter().filter(|other| other.bdf != bdf);
    let mut findings: Vec<Finding> = others()
        .filter(|other| other.obstructs_group())
        .map(|other| {
            let meaning = format!(
                "{} in the same IOMMU group ({number}) is with the host's driver {}; a guest gets the group whole or not at all.",
                other.bdf,
                other.driver_name()
            );
            Finding::device(other.bdf, Check::Group, Severity::Blocker, meaning)
                .read(driver_reading(host, other))
                .remedy(format!("Run: dormouse bind {bdf} (it binds the whole group)"))
        })
        .collect();
    if findings.is_empty() {
        let names: Vec<String> =
            others().map(|other| format!("{} ({})", other.bdf, other.driver_name())).collect();
        let path = host.attribute(bdf, "iommu_group/devices");
        let (meaning, names) = if names.is_empty() {
            (format!("{bdf} is alone in IOMMU group {number}."), bdf.to_string())
        } else {
            let names = names.join(", ");
            (format!("Nothing in IOMMU group {number} is in the way: {names}."), names)
        };
        findings.push(
            Finding::device(bdf, Check::Group, Severity::Ok, meaning).read(Reading::new(path, Some(names))),
        );
    }
    findings
}

fn owner(patient: &Patient) -> Option<Finding> {
    let owner = patient.owner.as_ref()?;
    let bdf = patient.bdf();
    let meaning =
        format!("Process {} ({}) has {bdf}; its guest decides when it sleeps.", owner.pid, owner.name);
    Some(Finding::device(bdf, Check::Owner, Severity::Info, meaning).read(owner.read.clone()))
}

fn pm_capability(patient: &Patient) -> Finding {
    let bdf = patient.bdf();
    let finding = |severity, meaning: String| {
        Finding::device(bdf, Check::PmCapability, severity, meaning).reads(patient.pm.read.clone())
    };
    match patient.pm.capability {
        Some(true) => finding(Severity::Ok, format!("{bdf} has a PCI power management capability.")),
        Some(false) => finding(
            Severity::Blocker,
            format!("{bdf} has no PCI power management capability, so Linux does not take its power away."),
        )
        .remedy("Nothing: the device is made so."),
        None => finding(
            Severity::Info,
            format!(
                "Whether {bdf} has a PCI power management capability cannot be known without waking it. (It sleeps, or is used.)"
            ),
        )
        .remedy(format!(
            "`dormouse doctor {bdf} --verify` wakes it and looks. A device without the capability has d3cold_allowed 0 from the start."
        )),
    }
}

/// `power/control` of the device. With another driver than VFIO's it does not matter yet: vfio-pci sets it when it gets the device.
fn own_power_control(host: &Host, patient: &Patient) -> Finding {
    let bdf = patient.bdf();
    let finding = power_control(host, bdf);
    if finding.severity == Severity::Ok || patient.function.is_bound_to_vfio() {
        return finding;
    }
    let meaning = format!("The host does not let {bdf} sleep; binding it to vfio-pci changes that.");
    Finding::device(bdf, Check::PowerControl, Severity::Info, meaning).reads(finding.read)
}

/// `power/control` of the device, of a port above it, or of another that shares its power.
pub fn power_control(host: &Host, bdf: Bdf) -> Finding {
    let reading = host.device(bdf, "power/control");
    match reading.value.as_deref() {
        Some("auto") => Finding::device(
            bdf,
            Check::PowerControl,
            Severity::Ok,
            format!("{bdf} may sleep while the host runs."),
        )
        .read(reading),
        Some(_) => {
            let meaning = format!("The host's administrator, a udev rule or TLP keeps {bdf} awake.");
            let path = reading.path.display().to_string();
            Finding::device(bdf, Check::PowerControl, Severity::Blocker, meaning).read(reading).remedy(
                format!(
                    "Run: echo auto >{path}; then look for a udev rule or a TLP setting that sets it to on"
                ),
            )
        }
        None => {
            let meaning = format!("The kernel has no run-time power management for {bdf}.");
            Finding::device(bdf, Check::PowerControl, Severity::Blocker, meaning)
                .read(reading)
                .remedy("Boot a kernel that has CONFIG_PM.")
        }
    }
}

fn d3cold_allowed(host: &Host, patient: &Patient) -> Finding {
    let bdf = patient.bdf();
    let reading = host.device(bdf, "d3cold_allowed");
    let finding = |severity, meaning: String| Finding::device(bdf, Check::D3coldAllowed, severity, meaning);
    let write = format!("Run: echo 1 >{} (this wakes the device for a moment)", reading.path.display());
    if reading.is("1") {
        return finding(Severity::Ok, format!("{bdf} is allowed to go to D3cold.")).read(reading);
    }
    if reading.value.is_none() {
        return finding(Severity::Blocker, format!("The kernel knows no D3cold for {bdf}."))
            .read(reading)
            .remedy("Boot a kernel that has CONFIG_PM and CONFIG_ACPI.");
    }
    match patient.pm.capability {
        Some(true) => finding(Severity::Blocker, format!("{bdf} has been forbidden to go to D3cold."))
            .read(reading)
            .remedy(write),
        // One cause, one blocker: the capability's finding has said it.
        Some(false) => finding(
            Severity::Info,
            format!("{bdf} is not allowed to go to D3cold, as is every device without the capability."),
        )
        .read(reading),
        None => finding(
            Severity::Blocker,
            format!(
                "{bdf} is not allowed to go to D3cold: it has no PCI power management capability, or somebody has forbidden it."
            ),
        )
        .read(reading)
        .remedy(format!("{write}. It does not help a device without the capability.")),
    }
}

fn virtual_functions(host: &Host, patient: &Patient) -> Option<Finding> {
    let bdf = patient.bdf();
    let reading = host.device(bdf, "sriov_numvfs");
    reading.value.as_ref()?;
    let count = patient.power.virtual_functions;
    if count == 0 {
        let meaning = format!("{bdf} has no virtual function switched on.");
        return Some(Finding::device(bdf, Check::VirtualFunctions, Severity::Ok, meaning).read(reading));
    }
    let remedy = format!("Run: echo 0 >{}", reading.path.display());
    let meaning =
        format!("{bdf} has {count} SR-IOV virtual functions switched on and does not sleep meanwhile.");
    Some(
        Finding::device(bdf, Check::VirtualFunctions, Severity::Blocker, meaning)
            .read(reading)
            .remedy(remedy),
    )
}

fn pm_qos(host: &Host, bdf: Bdf) -> Vec<Finding> {
    let mut findings = Vec::new();
    let power_off = host.device(bdf, "power/pm_qos_no_power_off");
    if power_off.is("1") {
        let meaning = format!("PM QoS forbids to take the power of {bdf} away.");
        let remedy = format!("Run: echo 0 >{}", power_off.path.display());
        let finding = Finding::device(bdf, Check::PmQos, Severity::Blocker, meaning).read(power_off);
        findings.push(finding.remedy(remedy));
    }
    // "n/a" is how the kernel shows that no latency at all is accepted.
    let latency = host.device(bdf, "power/pm_qos_resume_latency_us");
    if latency.is("n/a") {
        let meaning = format!("PM QoS accepts no resume latency of {bdf}, so it never sleeps.");
        let remedy = format!("Run: echo 0 >{} (0 is: any latency)", latency.path.display());
        let finding = Finding::device(bdf, Check::PmQos, Severity::Blocker, meaning).read(latency);
        findings.push(finding.remedy(remedy));
    }
    findings
}

/// Devices that the kernel keeps this one awake for: the audio function of a GPU and the like.
fn consumers(host: &Host, patient: &Patient) -> Vec<Finding> {
    let bdf = patient.bdf();
    let entries = std::fs::read_dir(&patient.function.dir).into_iter().flatten().flatten();
    let mut names: Vec<Bdf> = entries
        .filter_map(|entry| {
            entry.file_name().to_str()?.strip_prefix("consumer:")?.strip_prefix("pci:")?.parse().ok()
        })
        .collect();
    names.sort_by_key(Bdf::to_string);
    let mut findings = Vec::new();
    for consumer in names {
        let link = host.sysfs.join(format!("class/devlink/pci:{bdf}--pci:{consumer}/runtime_pm"));
        let (link, status) = (host.text(link), host.device(consumer, "power/runtime_status"));
        if !link.is("1") || !status.is("active") {
            continue;
        }
        let meaning =
            format!("{consumer} is awake and keeps {bdf} awake with it: the kernel has linked their power.");
        findings.push(
            Finding::device(consumer, Check::Consumers, Severity::Blocker, meaning)
                .read(link)
                .read(status)
                .remedy(format!(
                    "Give {consumer} to the guest as well, or let it sleep: echo auto >{}",
                    host.attribute(consumer, "power/control").display()
                )),
        );
    }
    findings
}

fn reset(host: &Host, bdf: Bdf) -> Option<Finding> {
    let reading = host.device(bdf, "reset_method");
    let methods = reading.value.clone()?;
    if methods.is_empty() {
        let meaning = format!(
            "{bdf} cannot be reset: what one guest leaves in it the next one finds, and a device that hangs stays so."
        );
        return Some(
            Finding::device(bdf, Check::Reset, Severity::Warning, meaning)
                .read(reading)
                .remedy("Assign all functions of its slot together; reboot the host if it hangs."),
        );
    }
    let meaning = format!("{bdf} can be reset ({methods}).");
    Some(Finding::device(bdf, Check::Reset, Severity::Ok, meaning).read(reading))
}

fn console(host: &Host, patient: &Patient) -> Option<Finding> {
    let bdf = patient.bdf();
    let reading = host.device(bdf, "boot_vga");
    // With the host's own driver it has been named as in use.
    if !reading.is("1") || !patient.function.is_bound_to_vfio() {
        return None;
    }
    let meaning = format!(
        "{bdf} is the GPU with which the host was booted; some guest drivers never let such a GPU sleep."
    );
    Some(
        Finding::device(bdf, Check::Console, Severity::Warning, meaning)
            .read(reading)
            .remedy("Choose another primary display in the firmware's settings."),
    )
}
