//! Each blocker on a host that has only that one, and what the doctor must not do.

mod output;
mod trial;

use std::fs;
use std::io;
use std::os::unix::fs::symlink;

use devices::vfio::check::LockLimit;
use rustix::fs::inotify;

use super::finding::{Check, Severity};
use super::fixture::{NIC, PORT, SIBLING, Tree};
use super::host::WAKING;

/// Words of a blocker's remedy.
fn remedy(tree: &Tree, check: Check, subject: &str) -> String {
    tree.blocker(check, subject).remedy.unwrap()
}

/// 256 bytes of configuration space with the capability at 0x40, or without.
fn config(pmc: Option<u16>) -> Vec<u8> {
    let mut bytes = vec![0; 256];
    if let Some(pmc) = pmc {
        (bytes[6], bytes[0x34], bytes[0x40]) = (0x10, 0x40, 0x01);
        bytes[0x42..0x44].copy_from_slice(&pmc.to_le_bytes());
    }
    bytes
}

#[test]
fn a_host_with_nothing_in_the_way_is_all_well() {
    let report = Tree::new().examine();
    assert_eq!(report.severity, Severity::Ok, "{report:#?}");
    assert_eq!(report.verdict, "is without power now");
    assert!(report.findings.iter().all(|finding| !finding.read.is_empty()), "{report:#?}");
}

#[test]
fn a_kernel_before_6_1_is_a_blocker() {
    for release in ["6.0.19-generic", "5.15.0-130-generic", "4.19.0"] {
        let tree = Tree::new();
        tree.write("proc/sys/kernel/osrelease", release);
        assert!(remedy(&tree, Check::Kernel, "host").contains("6.1"));
    }
    for release in ["6.1.0-28-cloud-amd64", "6.12-rc3", "7.0.0"] {
        let tree = Tree::new();
        tree.write("proc/sys/kernel/osrelease", release);
        assert_eq!(tree.examine().of(Check::Kernel)[0].severity, Severity::Ok, "{release}");
    }
}

#[test]
fn a_host_without_an_iommu_is_told_what_to_switch_on() {
    let tree = Tree::new();
    tree.remove(&format!("{}/iommu_group", tree.of(NIC)));
    assert!(remedy(&tree, Check::Iommu, NIC).contains("intel_iommu=on"));
    tree.write("proc/cmdline", "quiet intel_iommu=off");
    assert!(remedy(&tree, Check::Iommu, NIC).contains("without intel_iommu=off"));
    tree.write("proc/cmdline", "quiet");
    tree.remove("sys/firmware/acpi/tables/DMAR");
    assert!(remedy(&tree, Check::Iommu, NIC).contains("firmware's settings"));
    tree.write("sys/firmware/acpi/tables/IVRS", "");
    assert!(remedy(&tree, Check::Iommu, NIC).contains("AMD-Vi"));
}

#[test]
fn a_kernel_without_vfio_pci_is_a_blocker_and_one_that_has_not_loaded_it_is_none() {
    let tree = Tree::new();
    tree.bind(NIC, "igb");
    tree.bind(SIBLING, "igb");
    tree.remove("sys/bus/pci/drivers/vfio-pci");
    assert_eq!(tree.examine().of(Check::VfioModule)[0].severity, Severity::Info);
    tree.remove("lib/modules/6.12.95-amd64/modules.dep");
    let report = tree.examine();
    let found = report.of(Check::VfioModule)[0];
    assert_eq!(found.severity, Severity::Blocker);
    assert!(found.remedy.as_deref().unwrap().contains("modprobe vfio-pci"));
    tree.write("lib/modules/6.12.95-amd64/modules.builtin", "kernel/drivers/vfio/pci/vfio-pci.ko");
    assert_eq!(tree.examine().of(Check::VfioModule)[0].severity, Severity::Info);
}

#[test]
fn a_missing_back_end_of_vfio_is_a_blocker() {
    let tree = Tree::new();
    tree.remove("dev/vfio/vfio");
    let blocker = tree.blocker(Check::VfioNode, "host");
    assert!(blocker.meaning.contains("vfio/vfio does not exist"), "{blocker:?}");
    assert!(blocker.remedy.unwrap().contains("vfio_iommu_type1"));
}

#[test]
fn iommufd_will_do_instead_of_a_container() {
    let tree = Tree::new();
    tree.remove("dev/vfio/vfio");
    fs::create_dir_all(tree.path(&tree.of(NIC)).join("vfio-dev/vfio0")).unwrap();
    tree.write("dev/vfio/devices/vfio0", "");
    tree.write("dev/iommu", "");
    assert_eq!(tree.examine().severity, Severity::Ok);
}

#[test]
fn nodes_that_may_not_be_opened_are_a_blocker() {
    let mut tree = Tree::new();
    tree.host.may_open = |path| match path.file_name().unwrap().to_str() {
        Some("9") => Err(io::ErrorKind::PermissionDenied.into()),
        _ => Ok(()),
    };
    let blocker = tree.blocker(Check::VfioNode, "host");
    assert!(blocker.meaning.contains("may not open") && blocker.remedy.unwrap().contains("chown"));
}

#[test]
fn a_host_without_kvm_is_a_warning() {
    let tree = Tree::new();
    tree.remove("dev/kvm");
    assert!(tree.warning(Check::Kvm, "host").remedy.unwrap().contains("kvm_intel"));
}

#[test]
fn too_little_lockable_memory_is_a_blocker_and_a_limit_is_named() {
    let mut tree = Tree::new();
    tree.host.lock_limit = LockLimit { bytes: Some(8 << 20), used: 0 };
    assert!(remedy(&tree, Check::Memlock, "host").contains("ulimit -l"));
    tree.host.lock_limit = LockLimit { bytes: Some((2048 + 64) << 20), used: 0 };
    let report = tree.examine();
    assert_eq!(report.severity, Severity::Info);
    assert!(report.of(Check::Memlock)[0].meaning.contains("2048 MiB"));
}

#[test]
fn a_device_on_another_driver_or_none_is_a_blocker() {
    let tree = Tree::new();
    tree.bind(NIC, "igb");
    let blocker = tree.blocker(Check::Driver, NIC);
    assert!(blocker.meaning.contains("igb"));
    assert_eq!(blocker.remedy.unwrap(), format!("Run: dormouse bind {NIC}"));
    tree.remove(&format!("{}/driver", tree.of(NIC)));
    assert!(tree.blocker(Check::Driver, NIC).meaning.contains("no driver"));
}

#[test]
fn power_control_of_a_device_on_another_driver_is_left_to_bind() {
    let tree = Tree::new();
    tree.bind(NIC, "igb");
    tree.set(NIC, "power/control", "on");
    tree.blocker(Check::Driver, NIC);
    assert!(tree.examine().of(Check::PowerControl)[0].meaning.contains("binding"));
}

#[test]
fn what_the_host_uses_is_named_before_it_is_bound() {
    let tree = Tree::new();
    tree.bind(NIC, "igb");
    tree.interface(NIC, "eth0", "0x1003");
    let real = tree.path(&tree.of(NIC)).canonicalize().unwrap().join("nvme/nvme0/nvme0n1/nvme0n1p2");
    fs::create_dir_all(real.join("holders")).unwrap();
    fs::create_dir_all(tree.path("sys/class/block")).unwrap();
    symlink(&real, tree.path("sys/class/block/nvme0n1p2")).unwrap();
    tree.write(
        "proc/self/mountinfo",
        "36 1 259:2 / /home rw - ext4 /dev/nvme0n1p2 rw\n25 1 254:1 / / rw - ext4 /dev/vda1 rw",
    );
    let report = tree.examine();
    let uses: Vec<_> = report.of(Check::HostUse).iter().map(|finding| finding.meaning.clone()).collect();
    assert_eq!(uses.len(), 2, "{uses:?}");
    assert!(
        uses[0].contains("eth0 is up") && uses[1].contains("/dev/nvme0n1p2 on it is mounted"),
        "{uses:?}"
    );
    tree.interface(NIC, "eth0", "0x1002");
    tree.write("proc/self/mountinfo", "25 1 254:1 / / rw - ext4 /dev/vda1 rw");
    assert!(tree.examine().of(Check::HostUse).is_empty());
}

#[test]
fn a_partner_in_the_group_on_another_driver_is_a_blocker() {
    let tree = Tree::new();
    tree.bind(SIBLING, "igb");
    assert!(remedy(&tree, Check::Group, SIBLING).contains(&format!("dormouse bind {NIC}")));
}

#[test]
fn a_device_that_a_vm_has_is_named_with_the_process() {
    let tree = Tree::new();
    fs::create_dir_all(tree.path("proc/812/fd")).unwrap();
    symlink(tree.path("dev/vfio/9"), tree.path("proc/812/fd/14")).unwrap();
    tree.write("proc/812/comm", "dormouse");
    let report = tree.examine();
    assert_eq!(report.severity, Severity::Info);
    assert!(report.of(Check::Owner)[0].meaning.contains("Process 812 (dormouse)"));
}

#[test]
fn a_bridge_and_a_virtual_function_are_refused_by_kind() {
    let tree = Tree::new();
    assert!(tree.examine_device(PORT).of(Check::Kind)[0].meaning.contains("bridge"));
    symlink(tree.path(&tree.of(SIBLING)), tree.path(&tree.of(NIC)).join("physfn")).unwrap();
    tree.blocker(Check::Kind, NIC);
}

#[test]
fn a_device_that_is_awake_without_pm_capability_is_a_blocker() {
    let tree = Tree::new();
    tree.remove("dev/kmsg");
    tree.wake(NIC);
    tree.set(NIC, "d3cold_allowed", "0");
    fs::write(tree.path(&tree.of(NIC)).join("config"), config(None)).unwrap();
    assert!(tree.blocker(Check::PmCapability, NIC).meaning.contains("no PCI power management capability"));
    // With it, the ban is somebody's own.
    fs::write(tree.path(&tree.of(NIC)).join("config"), config(Some(0x0003))).unwrap();
    assert!(tree.blocker(Check::D3coldAllowed, NIC).meaning.contains("forbidden"));
}

#[test]
fn a_device_that_sleeps_without_pm_capability_is_blocked_by_what_follows_from_it() {
    let tree = Tree::new();
    tree.remove("dev/kmsg");
    tree.set(NIC, "power_state", "D3hot");
    tree.set(NIC, "d3cold_allowed", "0");
    fs::write(tree.path(&tree.of(NIC)).join("config"), config(None)).unwrap();
    let blocker = tree.blocker(Check::D3coldAllowed, NIC);
    assert!(blocker.meaning.contains("no PCI power management capability, or somebody has forbidden it"));
    let report = tree.examine();
    assert!(report.of(Check::PmCapability)[0].meaning.contains("cannot be known without waking"));
    // Only a device with the capability has this way to be reset.
    tree.set(NIC, "reset_method", "pm bus");
    assert!(tree.blocker(Check::D3coldAllowed, NIC).meaning.contains("has been forbidden"));
}

#[test]
fn d3cold_forbidden_for_the_device_is_a_blocker() {
    let tree = Tree::new();
    tree.set(NIC, "d3cold_allowed", "0");
    assert!(remedy(&tree, Check::D3coldAllowed, NIC).contains("0000:01:00.0/d3cold_allowed"));
}

#[test]
fn d3cold_forbidden_for_the_port_is_a_blocker() {
    let tree = Tree::new();
    tree.set(PORT, "d3cold_allowed", "0");
    assert!(remedy(&tree, Check::D3coldAllowed, PORT).contains("0000:00:01.0/d3cold_allowed"));
}

#[test]
fn power_control_of_the_device_at_on_is_a_blocker() {
    let tree = Tree::new();
    tree.set(NIC, "power/control", "on");
    let remedy = remedy(&tree, Check::PowerControl, NIC);
    assert!(remedy.contains("echo auto") && remedy.contains("0000:01:00.0/power/control"), "{remedy}");
}

#[test]
fn power_control_of_an_upstream_port_at_on_is_a_blocker() {
    let tree = Tree::new();
    tree.wake(PORT);
    tree.set(PORT, "power/control", "on");
    assert!(remedy(&tree, Check::PowerControl, PORT).contains("0000:00:01.0/power/control"));
}

#[test]
fn a_kernel_without_runtime_power_management_is_a_blocker() {
    let tree = Tree::new();
    tree.remove(&format!("{}/power/control", tree.of(NIC)));
    assert!(remedy(&tree, Check::PowerControl, NIC).contains("CONFIG_PM"));
}

#[test]
fn a_kernel_without_d3cold_is_a_blocker() {
    let tree = Tree::new();
    tree.remove(&format!("{}/d3cold_allowed", tree.of(NIC)));
    assert!(remedy(&tree, Check::D3coldAllowed, NIC).contains("CONFIG_ACPI"));
}

#[test]
fn firmware_without_power_resources_is_a_blocker() {
    let tree = Tree::new().without_pr3();
    let blocker = tree.blocker(Check::PowerResources, NIC);
    assert!(blocker.meaning.contains("_PR3") && blocker.read.len() == 2, "{blocker:?}");
}

#[test]
fn a_port_that_can_be_ejected_is_a_blocker() {
    let tree = Tree::new();
    tree.set(PORT, "firmware_node/eject", "");
    assert!(tree.blocker(Check::Ejectable, PORT).meaning.contains("_EJ0"));
}

#[test]
fn a_device_that_can_be_ejected_is_a_blocker_unless_the_port_cuts_its_power() {
    let tree = Tree::new();
    tree.own_pr3(NIC, "LNXPOWER:00");
    tree.set(NIC, "firmware_node/eject", "");
    assert_eq!(tree.examine().severity, Severity::Ok);
    let tree = tree.without_pr3();
    assert!(tree.blocker(Check::Ejectable, NIC).meaning.contains("_EJ0"));
}

#[test]
fn virtual_functions_that_are_switched_on_are_a_blocker() {
    let tree = Tree::new();
    tree.set(NIC, "sriov_numvfs", "2");
    assert!(remedy(&tree, Check::VirtualFunctions, NIC).contains("echo 0"));
}

#[test]
fn old_firmware_keeps_the_port_awake_unless_forced() {
    for date in ["12/31/2014", ""] {
        let tree = Tree::new();
        tree.wake(PORT);
        tree.write("sys/class/dmi/id/bios_date", date);
        assert!(remedy(&tree, Check::Port, PORT).contains("pcie_port_pm=force"));
        tree.write("proc/cmdline", "quiet pcie_port_pm=force");
        assert_ne!(tree.examine().severity, Severity::Blocker);
    }
}

#[test]
fn pcie_port_pm_off_is_a_blocker() {
    let tree = Tree::new();
    tree.wake(PORT);
    tree.write("proc/cmdline", "quiet pcie_port_pm=off");
    assert!(remedy(&tree, Check::Port, PORT).contains("without pcie_port_pm=off"));
}

#[test]
fn a_board_whose_ports_linux_never_lets_sleep_is_a_blocker() {
    let tree = Tree::new();
    tree.wake(PORT);
    tree.write("sys/class/dmi/id/board_vendor", "Hewlett-Packard");
    tree.write("sys/class/dmi/id/board_name", "1972");
    assert!(tree.blocker(Check::Port, PORT).meaning.contains("board"));
}

#[test]
fn a_conventional_bridge_and_a_port_without_driver_are_blockers() {
    let tree = Tree::new();
    tree.wake(PORT);
    tree.remove(&format!("{}/max_link_speed", tree.of(PORT)));
    assert!(tree.blocker(Check::Port, PORT).meaning.contains("conventional"));
    let tree = Tree::new();
    tree.wake(PORT);
    tree.remove(&format!("{}/driver", tree.of(PORT)));
    assert!(tree.blocker(Check::Port, PORT).meaning.contains("no driver"));
}

#[test]
fn a_slot_that_firmware_hotplugs_is_a_blocker() {
    let tree = Tree::new();
    tree.wake(PORT);
    tree.write("sys/bus/pci/slots/3/address", "0000:01:00");
    assert_ne!(tree.examine().severity, Severity::Blocker, "a slot that only has a number");
    tree.write("sys/bus/pci/slots/3/power", "1");
    assert!(tree.blocker(Check::Hotplug, PORT).meaning.contains("hotplugged by the firmware"));
    // Forcing does not help there.
    tree.write("proc/cmdline", "pcie_port_pm=force");
    tree.blocker(Check::Hotplug, PORT);
}

#[test]
fn a_hotplug_port_that_firmware_does_not_manage_is_a_blocker() {
    let tree = Tree::new();
    tree.wake(PORT);
    tree.set(PORT, "0000:00:01.0:pcie004/uevent", "");
    assert_ne!(tree.examine().severity, Severity::Blocker, "its node has power resources");
    tree.remove(&format!("{}/firmware_node/power_resources_D0", tree.of(PORT)));
    assert!(remedy(&tree, Check::Hotplug, PORT).contains("pcie_port_pm=force"));
}

#[test]
fn a_port_that_sleeps_needs_no_further_proof() {
    let tree = Tree::new();
    tree.write("sys/class/dmi/id/bios_date", "01/01/2010");
    tree.remove(&format!("{}/max_link_speed", tree.of(PORT)));
    assert_eq!(tree.examine().severity, Severity::Ok);
}

#[test]
fn power_of_its_own_in_a_hotplug_slot_is_a_warning() {
    let tree = Tree::new();
    tree.own_pr3(NIC, "LNXPOWER:00");
    tree.set(PORT, "0000:00:01.0:pcie004/uevent", "");
    assert!(tree.warning(Check::Hotplug, PORT).meaning.contains("take it for removed"));
}

#[test]
fn a_sibling_that_is_awake_on_the_hosts_driver_is_a_blocker() {
    let tree = Tree::new();
    // In a group of its own, so that only the power is shared.
    tree.remove(&format!("sys/kernel/iommu_groups/9/devices/{SIBLING}"));
    tree.bind(SIBLING, "igb");
    tree.wake(SIBLING);
    let blocker = tree.blocker(Check::Neighbour, SIBLING);
    assert!(
        blocker.meaning.contains("igb") && blocker.remedy.unwrap().contains("dormouse bind 0000:01:00.1")
    );
    tree.set(SIBLING, "power/runtime_status", "suspended");
    assert_eq!(tree.examine().severity, Severity::Ok);
    tree.bind(SIBLING, "pci-stub");
    assert!(tree.blocker(Check::Neighbour, SIBLING).meaning.contains("pci-stub"));
}

#[test]
fn an_empty_port_beside_the_device_is_judged_as_a_port() {
    let tree = Tree::new();
    let beside = "0000:01:01.0";
    tree.add("devices/pci0000:00/0000:00:01.0/0000:01:01.0", 0x06_04_00, Some("pcieport"), Some(3));
    tree.set(beside, "max_link_speed", "8.0 GT/s PCIe");
    tree.wake(beside);
    tree.set(beside, "power/control", "on");
    tree.blocker(Check::PowerControl, beside);
}

#[test]
fn a_sibling_that_may_not_sleep_is_a_blocker() {
    let tree = Tree::new();
    tree.set(SIBLING, "power/control", "on");
    tree.blocker(Check::PowerControl, SIBLING);
    tree.set(SIBLING, "power/control", "auto");
    tree.set(SIBLING, "d3cold_allowed", "0");
    tree.blocker(Check::D3coldAllowed, SIBLING);
}

#[test]
fn siblings_count_with_power_of_its_own_only_if_they_share_the_resource() {
    let tree = Tree::new();
    tree.own_pr3(NIC, "LNXPOWER:00");
    tree.own_pr3(SIBLING, "LNXPOWER:01");
    tree.set(SIBLING, "power/control", "on");
    assert_eq!(tree.examine().severity, Severity::Ok);
    tree.own_pr3(SIBLING, "LNXPOWER:00");
    tree.blocker(Check::PowerControl, SIBLING);
}

#[test]
fn disable_idle_d3_is_a_blocker_for_a_shared_port_and_a_warning_otherwise() {
    let tree = Tree::new();
    tree.write("sys/module/vfio_pci/parameters/disable_idle_d3", "Y");
    let blocker = tree.blocker(Check::IdleD3, "host");
    assert!(blocker.remedy.unwrap().contains("modprobe.d"));
    tree.own_pr3(NIC, "LNXPOWER:00");
    tree.warning(Check::IdleD3, "host");
}

#[test]
fn wakeup_that_does_not_work_from_d3cold_is_a_blocker() {
    // The log is read once for a host, so each log is a host of its own.
    let with_log = |log: &str| {
        let tree = Tree::new();
        tree.write("dev/kmsg", log);
        tree.set(NIC, "power/wakeup", "enabled");
        tree
    };
    let able = with_log("6,1,2,-;pci 0000:01:00.0: PME# supported from D0 D3hot D3cold");
    assert_eq!(able.examine().of(Check::Wakeup)[0].severity, Severity::Ok);
    let unable = with_log("6,1,2,-;pci 0000:01:00.0: PME# supported from D0 D3hot");
    assert!(remedy(&unable, Check::Wakeup, NIC).contains("echo disabled"));
    let unknown = with_log("");
    assert_eq!(unknown.examine().of(Check::Wakeup)[0].severity, Severity::Info);
    unknown.wake(NIC);
    fs::write(unknown.path(&unknown.of(NIC)).join("config"), config(Some(0x4803))).unwrap();
    unknown.blocker(Check::Wakeup, NIC);
}

#[test]
fn limits_of_pm_qos_are_blockers() {
    let tree = Tree::new();
    tree.set(NIC, "power/pm_qos_no_power_off", "1");
    tree.set(NIC, "power/pm_qos_resume_latency_us", "0");
    tree.blocker(Check::PmQos, NIC);
    tree.set(NIC, "power/pm_qos_no_power_off", "0");
    tree.set(NIC, "power/pm_qos_resume_latency_us", "n/a");
    assert!(tree.blocker(Check::PmQos, NIC).meaning.contains("latency"));
}

#[test]
fn a_consumer_that_is_awake_is_a_blocker() {
    let tree = Tree::new();
    tree.write(&format!("sys/class/devlink/pci:{NIC}--pci:{SIBLING}/runtime_pm"), "1");
    tree.set(NIC, &format!("consumer:pci:{SIBLING}/status"), "active");
    assert_eq!(tree.examine().severity, Severity::Ok);
    tree.wake(SIBLING);
    tree.blocker(Check::Consumers, SIBLING);
}

#[test]
fn a_device_without_reset_and_the_consoles_gpu_are_warnings() {
    let tree = Tree::new();
    tree.set(NIC, "reset_method", "");
    tree.warning(Check::Reset, NIC);
    let tree = Tree::new();
    tree.set(NIC, "boot_vga", "1");
    tree.warning(Check::Console, NIC);
}

#[test]
fn a_failed_runtime_pm_is_a_blocker_and_unexplained_d3hot_a_warning() {
    let tree = Tree::new();
    tree.set(NIC, "power_state", "D3hot");
    assert!(tree.warning(Check::State, NIC).meaning.contains("_S0W"));
    tree.set(NIC, "power/runtime_status", "error");
    tree.blocker(Check::State, NIC);
}

#[test]
fn nothing_that_wakes_a_sleeping_device_is_opened() {
    let tree = Tree::new();
    let watch = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
    for device in [NIC, SIBLING, PORT] {
        for name in WAKING {
            let place = if name == "real_power_state" { "firmware_node/" } else { "" };
            tree.set(device, &format!("{place}{name}"), "touched");
        }
    }
    // Without the log there is the most reason to look into configuration space.
    tree.remove("dev/kmsg");
    for device in [NIC, SIBLING, PORT] {
        for name in WAKING {
            let place = if name == "real_power_state" { "firmware_node/" } else { "" };
            let path = tree.path(&format!("{}/{place}{name}", tree.of(device)));
            inotify::add_watch(&watch, &path, inotify::WatchFlags::OPEN | inotify::WatchFlags::MODIFY)
                .unwrap();
        }
    }
    let opened = || {
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        inotify::Reader::new(&watch, &mut buffer).next().is_ok()
    };
    tree.examine();
    super::survey::survey(&tree.host).unwrap();
    assert!(!opened());
    // The watch works: a device that is awake may be looked into.
    tree.wake(NIC);
    tree.examine();
    assert!(opened());
}

#[test]
fn a_device_that_a_vm_has_is_not_looked_into_even_awake() {
    let tree = Tree::new();
    tree.remove("dev/kmsg");
    tree.wake(NIC);
    tree.set(NIC, "d3cold_allowed", "0");
    fs::write(tree.path(&tree.of(NIC)).join("config"), config(None)).unwrap();
    fs::create_dir_all(tree.path("proc/812/fd")).unwrap();
    symlink(tree.path("dev/vfio/9"), tree.path("proc/812/fd/14")).unwrap();
    assert_eq!(tree.examine().of(Check::PmCapability)[0].severity, Severity::Info);
}
