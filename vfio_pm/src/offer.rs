//! Whether a function is offered a power resource: decided once, before boot, from what the host can do, with the reason in words.
//!
//! Not offered is only what could not work at all. A host that lets the device go no deeper than D3hot still saves power and still
//! takes every step of the trip, so it is offered with a warning about what keeps it from D3cold.

use serde::{Deserialize, Serialize};

use crate::low_power::Support;
use crate::sysfs::{DevicePower, HostPower};

/// How deep the user lets a device go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PowerChoice {
    /// As deep as the host can; its power is offered to the guest.
    #[default]
    Auto,
    /// D3hot, when the guest puts it there; its power is never cut. Not offered at start.
    D3hot,
    /// Nowhere: hardware stays in D0. Not offered at start.
    Off,
}

impl PowerChoice {
    /// As it is written on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::D3hot => "d3hot",
            Self::Off => "off",
        }
    }
}

/// The decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Offer {
    /// The function gets a power resource.
    Offered {
        /// What will keep the device from D3cold, each a sentence with its remedy. Empty as far as the host can be seen through.
        warnings: Vec<String>,
    },
    /// It gets none.
    NotOffered {
        /// Why, as a sentence with its remedy.
        reason: String,
    },
}

impl Offer {
    /// Whether the function gets a power resource.
    pub fn is_offered(&self) -> bool {
        matches!(self, Self::Offered { .. })
    }
}

/// Decides for one function.
pub fn offer(host: &HostPower, support: &Support, choice: PowerChoice) -> Offer {
    match refusal(host, support, choice) {
        Some(reason) => Offer::NotOffered { reason },
        None => Offer::Offered { warnings: warnings(host) },
    }
}

fn refusal(host: &HostPower, support: &Support, choice: PowerChoice) -> Option<String> {
    let bdf = host.device.bdf;
    if choice == PowerChoice::Off {
        Some(format!("{bdf}: power=off was given; use power=auto to let the guest cut its power"))
    } else if choice == PowerChoice::D3hot {
        Some(format!(
            "{bdf}: power=d3hot was given, so it goes to D3hot at most; use power=auto to let the guest cut its power"
        ))
    } else if host.is_virtual_function {
        Some(format!(
            "{bdf} is an SR-IOV virtual function, which has no power of its own; assign the physical function to let it sleep"
        ))
    } else if !host.has_pm_capability() {
        Some(format!(
            "{bdf} has no PCI power management capability, so it cannot sleep; this is how the device is made"
        ))
    } else if !support.is_full() {
        let driver = host.device.driver.as_deref().unwrap_or("its VFIO driver");
        Some(format!(
            "the host cannot put {bdf} in low power through {driver}; it needs Linux 6.1 or newer and a driver built on vfio-pci-core"
        ))
    } else {
        None
    }
}

fn warnings(host: &HostPower) -> Vec<String> {
    let mut warnings = Vec::new();
    let bdf = host.device.bdf;
    restrictions(&host.device, &mut warnings);
    if host.virtual_functions > 0 {
        warnings.push(format!(
            "{bdf} has {} virtual functions enabled and will not sleep; write 0 to its sriov_numvfs",
            host.virtual_functions
        ));
    }
    match host.cut_by() {
        None => warnings.push(format!(
            "neither {bdf} nor a bridge above it has power resources (_PR3) in the host's firmware, so it reaches D3hot only; look for \
             a firmware setting for runtime D3 or D3cold"
        )),
        Some(by) => {
            if by.ejectable {
                warnings.push(format!(
                    "the firmware declares {} ejectable (_EJ0), for which Linux leaves the power resources alone: D3hot only",
                    by.bdf
                ));
            }
            if by.bdf == bdf {
                for partner in host.partners() {
                    warn_about_neighbour(host, partner, &mut warnings);
                }
            } else {
                warn_about_bridges(host, by, &mut warnings);
            }
        }
    }
    warnings
}

/// Power is cut by a bridge: that bridge and whatever else is below it have to sleep too.
fn warn_about_bridges(host: &HostPower, by: &DevicePower, warnings: &mut Vec<String>) {
    let bdf = host.device.bdf;
    for bridge in &host.bridges {
        restrictions(bridge, warnings);
        if bridge.bdf == by.bdf {
            break;
        }
    }
    if let Some(year) = host.bios_year.filter(|year| *year < 2015) {
        warnings.push(format!(
            "the host's BIOS is of {year}; Linux suspends ports only from 2015 on, so {} keeps {bdf} powered; boot the host with \
             pcie_port_pm=force",
            by.bdf
        ));
    }
    for neighbour in &host.neighbours {
        warn_about_neighbour(host, neighbour, warnings);
    }
}

/// Another device that has to sleep for the power to be cut.
fn warn_about_neighbour(host: &HostPower, neighbour: &DevicePower, warnings: &mut Vec<String>) {
    let bdf = host.device.bdf;
    restrictions(neighbour, warnings);
    match neighbour.driver.as_deref() {
            Some("vfio-pci") if host.idle_d3_disabled => warnings.push(format!(
                "{} shares the power of {bdf} and vfio-pci keeps it awake unless a VM has it; load vfio-pci without disable_idle_d3",
                neighbour.bdf
            )),
            Some("vfio-pci") => {}
            Some(driver) => warnings.push(format!(
                "{} (driver {driver}) shares the power of {bdf}, which stays on as long as that is awake; bind it to vfio-pci as well \
                 or let its driver suspend it",
                neighbour.bdf
            )),
            None => {}
        }
}

/// What the host's administrator has forbidden a device.
fn restrictions(device: &DevicePower, warnings: &mut Vec<String>) {
    let bdf = device.bdf;
    if !device.may_suspend {
        warnings.push(format!(
            "the host keeps {bdf} awake; write auto to /sys/bus/pci/devices/{bdf}/power/control (a udev rule or TLP may have set it)"
        ));
    }
    if device.d3cold_allowed == Some(false) {
        warnings.push(format!(
            "the host does not let {bdf} go to D3cold; write 1 to /sys/bus/pci/devices/{bdf}/d3cold_allowed if it has been forbidden \
             there"
        ));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::sysfs::tests::{DEVICE, NEIGHBOUR, PORT, Tree};

    fn decide(tree: &Tree) -> Offer {
        offer(&tree.read(), &Support::FULL, PowerChoice::Auto)
    }

    #[test]
    fn a_host_that_can_do_it_all_offers_without_a_warning() {
        assert_eq!(decide(&Tree::new()), Offer::Offered { warnings: Vec::new() });
    }

    #[test]
    fn what_cannot_work_is_not_offered_and_says_why() {
        let refused = |host: &HostPower, support: Support, choice| match offer(host, &support, choice) {
            Offer::NotOffered { reason } => reason,
            Offer::Offered { .. } => panic!("offered"),
        };
        let tree = Tree::new();
        let mut host = tree.read();
        assert!(refused(&host, Support::FULL, PowerChoice::Off).contains("power=off"));
        assert!(refused(&host, Support::FULL, PowerChoice::D3hot).contains("power=d3hot"));
        let old = Support { entry_with_wakeup: false, ..Support::FULL };
        assert!(refused(&host, old, PowerChoice::Auto).contains("Linux 6.1"));
        host.pm_capability = Some(false);
        assert!(refused(&host, Support::FULL, PowerChoice::Auto).contains("capability"));
        fs::create_dir(tree.path(DEVICE).join("physfn")).unwrap();
        assert!(refused(&tree.read(), Support::FULL, PowerChoice::Auto).contains("SR-IOV"));
    }

    #[test]
    fn whatever_keeps_the_device_from_d3cold_is_one_warning_each() {
        type Change = fn(&Tree);
        let cases: [(&str, Change); 9] = [
            ("0000:01:00.0/power/control", |tree| tree.write(&format!("{DEVICE}/power/control"), "on")),
            ("0000:01:00.0/d3cold_allowed", |tree| tree.write(&format!("{DEVICE}/d3cold_allowed"), "0")),
            ("0000:00:01.0/power/control", |tree| tree.write(&format!("{PORT}/power/control"), "on")),
            ("sriov_numvfs", |tree| tree.write(&format!("{DEVICE}/sriov_numvfs"), "2")),
            ("_PR3", |tree| fs::remove_dir_all(tree.path(PORT).join("firmware_node")).unwrap()),
            ("_EJ0", |tree| tree.write(&format!("{PORT}/firmware_node/eject"), "")),
            ("pcie_port_pm=force", |tree| tree.write("class/dmi/id/bios_date", "12/31/2014")),
            ("disable_idle_d3", |tree| tree.write("module/vfio_pci/parameters/disable_idle_d3", "Y")),
            ("snd_hda_intel", |tree| {
                let link = tree.path(NEIGHBOUR).join("driver");
                fs::remove_file(&link).unwrap();
                symlink("../../../bus/pci/drivers/snd_hda_intel", link).unwrap();
            }),
        ];
        for (expected, change) in cases {
            let tree = Tree::new();
            change(&tree);
            let Offer::Offered { warnings } = decide(&tree) else { panic!("{expected}: not offered") };
            assert_eq!(warnings.len(), 1, "{expected}: {warnings:?}");
            assert!(warnings[0].contains(expected), "{expected}: {warnings:?}");
        }
    }

    #[test]
    fn a_neighbour_that_lists_the_same_power_resource_has_to_sleep_as_well() {
        for (own, warned) in [("LNXPOWER:00", 1), ("LNXPOWER:01", 0)] {
            let tree = Tree::new();
            for (device, resource) in [(DEVICE, "LNXPOWER:00"), (NEIGHBOUR, own)] {
                let list = tree.path(device).join("firmware_node/power_resources_D3hot");
                fs::create_dir_all(list.join(resource)).unwrap();
            }
            tree.write(&format!("{NEIGHBOUR}/power/control"), "on");
            let Offer::Offered { warnings } = decide(&tree) else { panic!("not offered") };
            assert_eq!(warnings.len(), warned, "{warnings:?}");
            assert!(
                warnings.iter().all(|warning| warning.contains("0000:01:00.1/power/control")),
                "{warnings:?}"
            );
        }
    }

    #[test]
    fn a_device_with_power_resources_of_its_own_does_not_care_about_its_neighbours() {
        let tree = Tree::new();
        fs::create_dir_all(tree.path(DEVICE).join("firmware_node/power_resources_D3hot")).unwrap();
        tree.write(&format!("{PORT}/power/control"), "on");
        tree.write(&format!("{NEIGHBOUR}/power/control"), "on");
        assert_eq!(decide(&tree), Offer::Offered { warnings: Vec::new() });
    }
}
