//! What the host's sysfs says about a device's power, read without waking the device (`Documentation/ABI/testing/sysfs-bus-pci`,
//! `sysfs-devices-power`, `sysfs-firmware-acpi`).
//!
//! Only attributes that the kernel answers from memory are read: never `config`, `vpd`, `rom` or the link attributes, which resume the
//! device, and never `d3cold_allowed` for writing, which does too.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use pci::Bdf;

/// Where sysfs is mounted outside tests.
pub const SYSFS: &str = "/sys";

/// A device's power could not be looked up.
#[derive(Debug, thiserror::Error)]
#[error("cannot find {bdf} in {}; is it a PCI device of this host?", .path.display())]
pub struct ReadError {
    /// The device.
    pub bdf: Bdf,
    /// Where it was looked for.
    pub path: PathBuf,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

/// The runtime power attributes of one PCI device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicePower {
    /// Its address.
    pub bdf: Bdf,
    /// The driver bound to it.
    pub driver: Option<String>,
    /// `power_state`: `D0`, `D3hot`, `D3cold`, ... as the kernel last set it.
    pub power_state: Option<String>,
    /// `power/runtime_status`: `active`, `suspended`, ...
    pub runtime_status: Option<String>,
    /// `power/control` is `auto`: the kernel may suspend it.
    pub may_suspend: bool,
    /// `d3cold_allowed`; `None` when there is no such attribute.
    pub d3cold_allowed: Option<bool>,
    /// Its firmware node lists power resources for D3hot (`_PR3`), so the platform can cut its power.
    pub has_pr3: bool,
    /// Those resources, by the names of their ACPI devices: two functions with one in common lose its power together.
    pub resources: Vec<String>,
    /// Its firmware node can be ejected (`_EJ0`), for which the kernel skips the platform's step.
    pub ejectable: bool,
}

/// What decides how deep one device can sleep on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPower {
    /// The device itself.
    pub device: DevicePower,
    /// The bridges above it, nearest first.
    pub bridges: Vec<DevicePower>,
    /// The other devices below the bridge that would cut its power: any that stays awake keeps all of them powered.
    pub neighbours: Vec<DevicePower>,
    /// It is an SR-IOV virtual function.
    pub is_virtual_function: bool,
    /// How many SR-IOV virtual functions it has enabled itself.
    pub virtual_functions: u32,
    /// Whether it has a PCI power management capability, which sysfs does not tell: for the caller to fill in from config space while
    /// the device is awake. `None` counts as having one.
    pub pm_capability: Option<bool>,
    /// vfio-pci keeps devices that no VM has open awake (`disable_idle_d3`).
    pub idle_d3_disabled: bool,
    /// Year of the host's BIOS date; ports sleep by themselves only from 2015 on.
    pub bios_year: Option<u16>,
}

impl HostPower {
    /// Reads what `sysfs` (normally [`SYSFS`]) has on a device.
    pub fn read(sysfs: &Path, bdf: Bdf) -> Result<Self, ReadError> {
        let link = sysfs.join("bus/pci/devices").join(bdf.to_string());
        let path = fs::canonicalize(&link).map_err(|source| ReadError { bdf, path: link, source })?;
        let bridge_paths: Vec<(Bdf, &Path)> = path.ancestors().skip(1).map_while(address).collect();
        let bridges: Vec<DevicePower> =
            bridge_paths.iter().map(|(bdf, path)| DevicePower::read(path, *bdf)).collect();
        let device = DevicePower::read(&path, bdf);
        let cutting = if device.has_pr3 { None } else { bridges.iter().position(|bridge| bridge.has_pr3) };
        let below = cutting.or(if bridges.is_empty() { None } else { Some(0) });
        let mut neighbours = Vec::new();
        if let Some((_, bridge)) = below.and_then(|number| bridge_paths.get(number)) {
            collect_endpoints(bridge, &mut neighbours);
            neighbours.retain(|neighbour| neighbour.bdf != bdf);
        }
        Ok(Self {
            device,
            bridges,
            neighbours,
            is_virtual_function: path.join("physfn").exists(),
            virtual_functions: text(&path.join("sriov_numvfs")).and_then(|n| n.parse().ok()).unwrap_or(0),
            pm_capability: None,
            idle_d3_disabled: text(&sysfs.join("module/vfio_pci/parameters/disable_idle_d3"))
                .is_some_and(|value| value == "Y" || value == "1"),
            bios_year: text(&sysfs.join("class/dmi/id/bios_date"))
                .and_then(|date| date.rsplit('/').next().and_then(|year| year.parse().ok())),
        })
    }

    /// The device that the platform can cut from power and this device with it: itself or a bridge above.
    pub fn cut_by(&self) -> Option<&DevicePower> {
        std::iter::once(&self.device).chain(&self.bridges).find(|device| device.has_pr3)
    }

    /// The neighbours with which it shares a power resource of its own.
    pub fn partners(&self) -> impl Iterator<Item = &DevicePower> {
        let shared =
            |other: &&DevicePower| other.resources.iter().any(|name| self.device.resources.contains(name));
        self.neighbours.iter().filter(shared)
    }

    /// Whether the device has a power management capability, as far as is known.
    pub fn has_pm_capability(&self) -> bool {
        self.pm_capability.unwrap_or(true)
    }
}

impl DevicePower {
    fn read(path: &Path, bdf: Bdf) -> Self {
        let firmware = path.join("firmware_node");
        Self {
            bdf,
            driver: driver(path),
            power_state: text(&path.join("power_state")),
            runtime_status: text(&path.join("power/runtime_status")),
            may_suspend: text(&path.join("power/control")).is_none_or(|control| control == "auto"),
            d3cold_allowed: text(&path.join("d3cold_allowed")).map(|allowed| allowed != "0"),
            has_pr3: firmware.join("power_resources_D3hot").is_dir(),
            resources: resources(&firmware.join("power_resources_D3hot")),
            ejectable: firmware.join("eject").exists(),
        }
    }
}

/// Names of the power resources in a list: links to their devices, beside the attributes that every directory has.
fn resources(list: &Path) -> Vec<String> {
    let entries = fs::read_dir(list).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("LNXPOWER")).collect()
}

fn text(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn driver(path: &Path) -> Option<String> {
    let target = fs::read_link(path.join("driver")).ok()?;
    Some(target.file_name()?.to_string_lossy().into_owned())
}

/// The address that a sysfs directory is named for, if it is a PCI device's.
fn address(path: &Path) -> Option<(Bdf, &Path)> {
    Some((path.file_name()?.to_str()?.parse().ok()?, path))
}

/// Devices below a bridge that are no bridges with devices of their own.
fn collect_endpoints(bridge: &Path, found: &mut Vec<DevicePower>) {
    let Ok(entries) = fs::read_dir(bridge) else { return };
    let mut children: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect();
    children.sort();
    for child in children {
        let Some((bdf, path)) = address(&child) else { continue };
        let before = found.len();
        collect_endpoints(path, found);
        if found.len() == before {
            found.push(DevicePower::read(path, bdf));
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::symlink;

    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    /// A sysfs with one root port, two functions below it and nothing that keeps them from D3cold.
    pub(crate) struct Tree {
        pub(crate) directory: TempDir,
    }

    pub(crate) const PORT: &str = "devices/pci0000:00/0000:00:01.0";
    pub(crate) const DEVICE: &str = "devices/pci0000:00/0000:00:01.0/0000:01:00.0";
    pub(crate) const NEIGHBOUR: &str = "devices/pci0000:00/0000:00:01.0/0000:01:00.1";

    impl Tree {
        pub(crate) fn new() -> Self {
            let tree = Self { directory: TempDir::new().unwrap() };
            fs::create_dir_all(tree.path("bus/pci/devices")).unwrap();
            for device in [PORT, DEVICE, NEIGHBOUR] {
                tree.write(&format!("{device}/power/control"), "auto");
                tree.write(&format!("{device}/power/runtime_status"), "suspended");
                tree.write(&format!("{device}/power_state"), "D3cold");
                tree.write(&format!("{device}/d3cold_allowed"), "1");
                fs::create_dir_all(tree.path("bus/pci/drivers/vfio-pci")).unwrap();
                symlink(tree.path("bus/pci/drivers/vfio-pci"), tree.path(device).join("driver")).unwrap();
                let name = device.rsplit('/').next().unwrap();
                symlink(tree.path(device), tree.path("bus/pci/devices").join(name)).unwrap();
            }
            fs::create_dir_all(tree.path(PORT).join("firmware_node/power_resources_D3hot")).unwrap();
            tree.write("class/dmi/id/bios_date", "04/01/2024");
            tree
        }

        pub(crate) fn path(&self, relative: &str) -> PathBuf {
            self.directory.as_path().join(relative)
        }

        pub(crate) fn write(&self, relative: &str, text: &str) {
            let path = self.path(relative);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }

        pub(crate) fn read(&self) -> HostPower {
            HostPower::read(self.directory.as_path(), "0000:01:00.0".parse().unwrap()).unwrap()
        }
    }

    #[test]
    fn a_device_below_a_port_with_power_resources_is_cut_by_it_together_with_its_neighbours() {
        let host = Tree::new().read();
        assert_eq!(host.cut_by().unwrap().bdf.to_string(), "0000:00:01.0");
        assert_eq!(host.device.power_state.as_deref(), Some("D3cold"));
        assert_eq!(host.device.driver.as_deref(), Some("vfio-pci"));
        let names: Vec<_> = host.neighbours.iter().map(|neighbour| neighbour.bdf.to_string()).collect();
        assert_eq!(names, ["0000:01:00.1"]);
        assert_eq!(
            (host.bios_year, host.virtual_functions, host.is_virtual_function),
            (Some(2024), 0, false)
        );
        assert!(host.has_pm_capability());
    }

    #[test]
    fn attributes_that_are_not_there_are_no_error() {
        let tree = Tree::new();
        for attribute in ["power/control", "power/runtime_status", "power_state", "d3cold_allowed"] {
            fs::remove_file(tree.path(DEVICE).join(attribute)).unwrap();
        }
        let host = tree.read();
        assert!(host.device.may_suspend);
        assert_eq!((host.device.d3cold_allowed, host.device.power_state.as_deref()), (None, None));
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let tree = Tree::new();
        let error = HostPower::read(tree.directory.as_path(), "0000:09:00.0".parse().unwrap()).unwrap_err();
        assert!(error.to_string().contains("0000:09:00.0"), "{error}");
    }
}
