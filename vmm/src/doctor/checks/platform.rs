//! What the host needs before any guest can have the device: kernel, IOMMU, VFIO, rights, memory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use devices::vfio::bind::VFIO_PCI;
use devices::vfio::check::MEMLOCK_MARGIN;

use super::Patient;
use crate::config::MemoryConfig;
use crate::doctor::finding::{Check, Finding, Reading, Severity};
use crate::doctor::host::Host;
use crate::doctor::usage;

/// The first kernel with VFIO's low-power features.
const FIRST_KERNEL: (u32, u32) = (6, 1);

/// All findings about the host.
pub fn check(host: &Host, patient: &Patient) -> Vec<Finding> {
    let mut findings = vec![kernel(host), iommu(host, patient), vfio_module(host)];
    findings.extend(idle_d3(host, patient));
    findings.extend(vfio_nodes(host, patient));
    findings.extend([kvm(host), memlock(host)]);
    findings
}

fn kernel(host: &Host) -> Finding {
    let release = host.release();
    let mut numbers = release.value.as_deref().unwrap_or_default().split(['.', '-', '+', '_']);
    let mut number = || numbers.next().and_then(|n| n.parse().ok());
    let (severity, meaning) = match number().zip(number()) {
        Some(version) if version >= FIRST_KERNEL => {
            let meaning = format!(
                "Linux {}.{} has the low-power features of VFIO (6.1 and newer).",
                version.0, version.1
            );
            return Finding::host(Check::Kernel, Severity::Ok, meaning).read(release);
        }
        Some((major, minor)) => (
            Severity::Blocker,
            format!(
                "Linux {major}.{minor} has no low-power features in VFIO, so a guest cannot put the device to sleep."
            ),
        ),
        None => {
            (Severity::Warning, "The kernel's version cannot be told; VFIO's low power needs 6.1.".to_owned())
        }
    };
    Finding::host(Check::Kernel, severity, meaning).read(release).remedy("Boot Linux 6.1 or newer.")
}

fn iommu(host: &Host, patient: &Patient) -> Finding {
    let bdf = patient.bdf();
    let link = host.presence(host.attribute(bdf, "iommu_group"));
    if let Some(group) = &patient.group {
        let meaning = format!("{bdf} is behind an IOMMU, in group {}.", group.number);
        return Finding::device(bdf, Check::Iommu, Severity::Ok, meaning).read(link);
    }
    // The firmware's table says whether the hardware is there and switched on.
    let tables = host.sysfs.join("firmware/acpi/tables");
    let (intel, amd) = (host.presence(tables.join("DMAR")), host.presence(tables.join("IVRS")));
    let off =
        ["iommu=off", "intel_iommu=off", "amd_iommu=off"].into_iter().find(|word| host.is_booted_with(word));
    let remedy = match off {
        Some(word) => format!("Boot the host without {word}."),
        None if intel.value.is_some() => "Boot the host with intel_iommu=on.".to_owned(),
        None if amd.value.is_some() => {
            "The firmware has an AMD IOMMU; look in the host's kernel log (AMD-Vi) for why it is not used.".to_owned()
        }
        None => "Switch the IOMMU on in the firmware's settings (VT-d, AMD-Vi), and boot with intel_iommu=on on Intel."
            .to_owned(),
    };
    let meaning = format!("{bdf} is in no IOMMU group, so no guest can have it.");
    Finding::device(bdf, Check::Iommu, Severity::Blocker, meaning)
        .reads([link, intel, amd, host.command_line("iommu")])
        .remedy(remedy)
}

fn vfio_module(host: &Host) -> Finding {
    let driver = host.presence(host.functions().driver_dir(VFIO_PCI));
    if driver.value.is_some() {
        return Finding::host(Check::VfioModule, Severity::Ok, "vfio-pci is loaded.").read(driver);
    }
    let directory = host.modules.join(host.release().value.unwrap_or_default());
    let indexes = ["modules.dep", "modules.builtin"].map(|name| directory.join(name));
    let installed = indexes.iter().find_map(|index| module_line(index, "vfio-pci"));
    if let Some(line) = installed {
        return Finding::host(
            Check::VfioModule,
            Severity::Info,
            "vfio-pci is not loaded yet; `dormouse bind` loads it.",
        )
        .reads([driver, line]);
    }
    let absent = indexes.map(|index| Reading { path: index, value: None });
    Finding::host(Check::VfioModule, Severity::Blocker, "This kernel has no vfio-pci, through which a guest gets the device.")
        .read(driver)
        .reads(absent)
        .remedy("Install the package with the kernel's further modules, or build it with CONFIG_VFIO_PCI; then `modprobe vfio-pci`.")
}

/// The line of a module in an index of `depmod`, with its path.
fn module_line(index: &Path, module: &str) -> Option<Reading> {
    let text = fs::read_to_string(index).ok()?;
    let line = text
        .lines()
        .map(|line| line.split(':').next().unwrap_or(line))
        .find(|path| path.rsplit('/').next().and_then(|file| file.split('.').next()) == Some(module))?;
    Some(Reading::new(index.to_owned(), Some(line)))
}

fn idle_d3(host: &Host, patient: &Patient) -> Option<Finding> {
    let reading = host.text(host.sysfs.join("module/vfio_pci/parameters/disable_idle_d3"));
    if !patient.power.idle_d3_disabled {
        return reading.value.is_some().then(|| {
            Finding::host(Check::IdleD3, Severity::Ok, "vfio-pci lets devices sleep that no VM has.")
                .read(reading)
        });
    }
    let shared = patient.power.cut_by().is_some_and(|by| by.bdf != patient.bdf())
        && patient.power.neighbours.iter().any(|other| other.driver.as_deref() == Some(VFIO_PCI));
    let (severity, meaning) = if shared {
        let meaning = format!(
            "vfio-pci keeps devices awake that no VM has, and {} shares its power with others on vfio-pci: it stays powered unless \
             VMs have all of them.",
            patient.bdf()
        );
        (Severity::Blocker, meaning)
    } else {
        let meaning = format!("vfio-pci keeps {} awake as long as no VM has it.", patient.bdf());
        (Severity::Warning, meaning)
    };
    let remedy = "Remove disable_idle_d3 from /etc/modprobe.d or the kernel's command line, and load vfio-pci again. (If it is \
                  there because a device did not come back from D3cold, forbid that for the one device: write 0 to its \
                  d3cold_allowed.)";
    Some(Finding::host(Check::IdleD3, severity, meaning).read(reading).remedy(remedy))
}

/// Rights to the nodes that the VMM will open.
fn vfio_nodes(host: &Host, patient: &Patient) -> Vec<Finding> {
    // Without the driver there are no nodes of the device, and that has been said.
    if patient.group.is_none() || !patient.function.is_bound_to_vfio() {
        return Vec::new();
    }
    let mut wanted = vec![host.dev.join("vfio/vfio")];
    wanted.extend(usage::nodes(host, &patient.function).into_iter().take(1));
    let by_device = host.dev.join("iommu");
    let own = usage::nodes(host, &patient.function).into_iter().nth(1);
    if !wanted.iter().all(|node| node.exists())
        && let Some(own) = own.filter(|own| own.exists() && by_device.exists())
    {
        wanted = vec![by_device, own];
    }
    let findings: Vec<Finding> = wanted.iter().filter_map(|node| node_finding(host, node)).collect();
    if !findings.is_empty() {
        return findings;
    }
    let readings = wanted.into_iter().map(|node| Reading::new(node, Some("may be opened")));
    vec![Finding::host(Check::VfioNode, Severity::Ok, "This user may open VFIO's nodes.").reads(readings)]
}

fn node_finding(host: &Host, node: &Path) -> Option<Finding> {
    let error = (host.may_open)(node).err()?;
    let reading = Reading::new(node.to_owned(), Some(error.to_string()));
    let (meaning, remedy) = match error.kind() {
        io::ErrorKind::NotFound => (
            format!("{} does not exist, so no VM can be given the device.", node.display()),
            "Run `modprobe vfio-pci` and `modprobe vfio_iommu_type1`.".to_owned(),
        ),
        io::ErrorKind::PermissionDenied => (
            format!(
                "This user may not open {}, so a VM of this user cannot have the device.",
                node.display()
            ),
            format!("Run as root, or give your user access: chown $USER {}", node.display()),
        ),
        _ => (format!("{} cannot be opened.", node.display()), "Look in the host's kernel log.".to_owned()),
    };
    Some(Finding::host(Check::VfioNode, Severity::Blocker, meaning).read(reading).remedy(remedy))
}

fn kvm(host: &Host) -> Finding {
    let node: PathBuf = host.dev.join("kvm");
    match (host.may_open)(&node) {
        Ok(()) => Finding::host(Check::Kvm, Severity::Ok, "This user may open /dev/kvm.")
            .read(Reading::new(node, Some("may be opened"))),
        Err(error) => {
            let reading = Reading::new(node, Some(error.to_string()));
            Finding::host(Check::Kvm, Severity::Warning, "This user cannot run a VM here.").read(reading).remedy(
                "Switch virtualisation on in the firmware and load kvm_intel or kvm_amd; give your user access to /dev/kvm.",
            )
        }
    }
}

fn memlock(host: &Host) -> Finding {
    let path = host.proc.join("self/limits");
    let Some(limit) = host.lock_limit.bytes else {
        return Finding::host(
            Check::Memlock,
            Severity::Ok,
            "This user may lock all the memory that a guest needs.",
        )
        .read(Reading::new(path, Some("Max locked memory: no limit")));
    };
    let reading = Reading::new(path, Some(format!("Max locked memory: {} KiB", limit / 1024)));
    let room = limit.saturating_sub(MEMLOCK_MARGIN).saturating_sub(host.lock_limit.used);
    let usual = MemoryConfig::default().size;
    let remedy = "Raise it to the guest's memory and 64 MiB: `ulimit -l` in KiB, LimitMEMLOCK= in systemd, memlock in \
                  /etc/security/limits.conf.";
    if room < usual {
        let meaning = format!(
            "This user may lock {} MiB of memory, too little to give a device to a guest of {} MiB.",
            limit >> 20,
            usual >> 20
        );
        return Finding::host(Check::Memlock, Severity::Blocker, meaning).read(reading).remedy(remedy);
    }
    let meaning = format!("This user may lock memory for guests of up to {} MiB.", room >> 20);
    Finding::host(Check::Memlock, Severity::Info, meaning).read(reading).remedy(remedy)
}
