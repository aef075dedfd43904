//! A host in a temporary directory, for tests: a root port that the firmware cuts from power, and below it a network card of two
//! functions on vfio-pci, asleep in D3cold. Nothing is in the way, so that each test changes one thing.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use pci::Bdf;
use vmm_sys_util::tempdir::TempDir;

use super::checks::examine;
use super::finding::{Check, Finding, Report, Severity};
use super::host::Host;

pub const PORT: &str = "0000:00:01.0";
pub const NIC: &str = "0000:01:00.0";
pub const SIBLING: &str = "0000:01:00.1";

/// The host. Removed when dropped.
#[derive(Debug)]
pub struct Tree {
    directory: TempDir,
    /// What the doctor is given.
    pub host: Host,
}

impl Tree {
    pub fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let host = Host::at(directory.as_path());
        let tree = Self { directory, host };
        for driver in ["vfio-pci", "pcieport", "igb", "pci-stub"] {
            fs::create_dir_all(tree.path(&format!("sys/bus/pci/drivers/{driver}"))).unwrap();
        }
        tree.add("devices/pci0000:00/0000:00:01.0", 0x06_04_00, Some("pcieport"), Some(1));
        tree.write(&format!("{}/max_link_speed", tree.of(PORT)), "8.0 GT/s PCIe");
        tree.write(&format!("{}/secondary_bus_number", tree.of(PORT)), "1");
        for directory in ["power_resources_D0", "power_resources_D3hot"] {
            fs::create_dir_all(tree.path(&format!("{}/firmware_node/{directory}", tree.of(PORT)))).unwrap();
        }
        tree.add("devices/pci0000:00/0000:00:01.0/0000:01:00.0", 0x02_00_00, Some("vfio-pci"), Some(9));
        tree.add("devices/pci0000:00/0000:00:01.0/0000:01:00.1", 0x02_00_00, Some("vfio-pci"), Some(9));
        for (file, text) in [
            ("sys/class/dmi/id/bios_date", "04/01/2024"),
            ("sys/module/vfio_pci/parameters/disable_idle_d3", "N"),
            ("sys/firmware/acpi/tables/DMAR", ""),
            ("proc/sys/kernel/osrelease", "6.12.95-amd64"),
            ("proc/cmdline", "root=/dev/vda1 intel_iommu=on quiet"),
            ("proc/self/mountinfo", "25 1 254:1 / / rw - ext4 /dev/vda1 rw"),
            ("proc/swaps", "Filename Type Size Used Priority"),
            ("dev/kvm", ""),
            ("dev/vfio/vfio", ""),
            ("dev/vfio/9", ""),
            (
                "dev/kmsg",
                "6,345,812345,-;pci 0000:01:00.0: PME# supported from D0 D3hot D3cold\n\
                 6,346,812399,-;pci 0000:01:00.1: PME# supported from D0 D3hot D3cold",
            ),
            ("lib/modules/6.12.95-amd64/modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/a.ko"),
        ] {
            tree.write(file, text);
        }
        tree
    }

    pub fn root(&self) -> &Path {
        self.directory.as_path()
    }

    pub fn path(&self, relative: &str) -> PathBuf {
        self.root().join(relative)
    }

    /// The directory of a device, relative to the root.
    pub fn of(&self, bdf: &str) -> String {
        format!("sys/bus/pci/devices/{bdf}")
    }

    pub fn write(&self, relative: &str, text: &str) {
        let path = self.path(relative);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("{text}\n")).unwrap();
    }

    /// Changes an attribute of a device.
    pub fn set(&self, bdf: &str, attribute: &str, text: &str) {
        self.write(&format!("{}/{attribute}", self.of(bdf)), text);
    }

    pub fn remove(&self, relative: &str) {
        let path = self.path(relative);
        if path.is_dir() && !path.is_symlink() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
            .unwrap();
    }

    /// Adds a function whose directory is `place` below `sys`, asleep without power.
    pub fn add(&self, place: &str, class: u32, driver: Option<&str>, group: Option<u32>) {
        let bdf = place.rsplit('/').next().unwrap();
        let real = self.path("sys").join(place);
        fs::create_dir_all(&real).unwrap();
        fs::create_dir_all(self.path("sys/bus/pci/devices")).unwrap();
        symlink(&real, self.path(&self.of(bdf))).unwrap();
        for (name, text) in [
            ("vendor", "0x8086"),
            ("device", "0x10c9"),
            ("class", &format!("0x{class:06x}")),
            ("driver_override", "(null)"),
            ("d3cold_allowed", "1"),
            ("power_state", "D3cold"),
            ("power/control", "auto"),
            ("power/runtime_status", "suspended"),
            ("power/wakeup", "disabled"),
            ("reset_method", "flr bus"),
        ] {
            self.set(bdf, name, text);
        }
        if let Some(driver) = driver {
            self.bind(bdf, driver);
        }
        if let Some(group) = group {
            let directory = self.path(&format!("sys/kernel/iommu_groups/{group}"));
            fs::create_dir_all(directory.join("devices")).unwrap();
            symlink(&real, directory.join("devices").join(bdf)).unwrap();
            symlink(&directory, real.join("iommu_group")).unwrap();
        }
    }

    pub fn bind(&self, bdf: &str, driver: &str) {
        let link = self.path(&format!("{}/driver", self.of(bdf)));
        let _ = fs::remove_file(&link);
        symlink(self.path(&format!("sys/bus/pci/drivers/{driver}")), link).unwrap();
    }

    /// Gives a device a network interface.
    pub fn interface(&self, bdf: &str, name: &str, flags: &str) {
        let real = self.path(&self.of(bdf)).canonicalize().unwrap().join("virtio0/net").join(name);
        fs::create_dir_all(&real).unwrap();
        fs::write(real.join("flags"), flags).unwrap();
        fs::create_dir_all(self.path("sys/class/net")).unwrap();
        let _ = symlink(&real, self.path(&format!("sys/class/net/{name}")));
    }

    /// Takes the firmware's power resources from the port.
    pub fn without_pr3(self) -> Self {
        self.remove(&format!("{}/firmware_node", self.of(PORT)));
        self
    }

    /// Gives a device power resources of its own, named as ACPI devices.
    pub fn own_pr3(&self, bdf: &str, resource: &str) {
        for state in ["D0", "D3hot"] {
            let directory = format!("{}/firmware_node/power_resources_{state}/{resource}", self.of(bdf));
            fs::create_dir_all(self.path(&directory)).unwrap();
        }
    }

    /// A device, and whoever is above it, awake.
    pub fn wake(&self, bdf: &str) {
        for device in [bdf, PORT] {
            self.set(device, "power/runtime_status", "active");
            self.set(device, "power_state", "D0");
        }
    }

    pub fn examine(&self) -> Report {
        self.examine_device(NIC)
    }

    pub fn examine_device(&self, bdf: &str) -> Report {
        examine(&self.host, bdf.parse::<Bdf>().unwrap()).unwrap()
    }

    /// The only blocker there is, which must be of this check and about this subject, with a reading and something to do.
    pub fn blocker(&self, check: Check, subject: &str) -> Finding {
        let report = self.examine();
        assert_eq!(report.severity, Severity::Blocker, "{report:#?}");
        let blockers: Vec<_> = report.findings.iter().filter(|f| f.severity == Severity::Blocker).collect();
        assert_eq!(blockers.len(), 1, "{blockers:#?}");
        let blocker = blockers[0].clone();
        assert_eq!((blocker.check, blocker.subject.as_str()), (check, subject), "{blocker:#?}");
        assert!(!blocker.read.is_empty() && blocker.remedy.is_some(), "{blocker:#?}");
        assert_eq!(report.verdict, format!("blocked by {}", check.name()));
        blocker
    }

    /// The only warning there is, without any blocker.
    pub fn warning(&self, check: Check, subject: &str) -> Finding {
        let report = self.examine();
        assert_eq!(report.severity, Severity::Warning, "{report:#?}");
        let warnings: Vec<_> = report.findings.iter().filter(|f| f.severity == Severity::Warning).collect();
        assert_eq!(warnings.len(), 1, "{warnings:#?}");
        let warning = warnings[0].clone();
        assert_eq!((warning.check, warning.subject.as_str()), (check, subject), "{warning:#?}");
        warning
    }
}
