//! What is looked at before a device is opened, so that every reason not to assign it is one clear message.
//!
//! Nothing here opens the device: that would wake and reset it. The nodes that lead to it are opened and closed again: the
//! group's tells whether somebody else has it, and the device's own node does nothing before it is bound to an iommufd
//! (Linux `drivers/vfio/device_cdev.c`).

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use pci::Bdf;
use rustix::process::{Resource, getrlimit};

use super::host::{HostError, HostFunction, IommuGroup, Sysfs};
use super::open::ContextKind;

/// Pinned beside the guest's RAM: page tables of the IOMMU do not count, but what other parts lock does.
pub const MEMLOCK_MARGIN: u64 = 64 << 20;
/// Bit of `CAP_IPC_LOCK` in a capability set.
const CAP_IPC_LOCK: u32 = 14;

/// Why a device cannot be assigned. Each message is one line and names the device, the cause and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// It is no PCI device, is absent, or cannot be read.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The same device was given more than once.
    #[error("device {bdf} is given twice; each device can be assigned once")]
    Twice {
        /// The device.
        bdf: Bdf,
    },
    /// A bridge cannot be assigned.
    #[error("device {bdf} is a bridge (type 1 header), which cannot be assigned; name the device behind it")]
    Bridge {
        /// The bridge.
        bdf: Bdf,
    },
    /// There is no IOMMU.
    #[error(
        "device {bdf} is in no IOMMU group; switch the IOMMU on in the firmware (VT-d, AMD-Vi), and boot Linux with intel_iommu=on on Intel"
    )]
    NoIommu {
        /// The device.
        bdf: Bdf,
    },
    /// The host's own driver has it.
    #[error("device {bdf} is bound to {driver}, not to vfio-pci; run: dormouse bind {bdf}")]
    NotBound {
        /// The device.
        bdf: Bdf,
        /// What it is bound to.
        driver: String,
    },
    /// Others in its group are used by the host.
    #[error(
        "device {bdf} shares IOMMU group {group} with devices that the host uses: {others}; run: dormouse bind {bdf}"
    )]
    NotViable {
        /// The device.
        bdf: Bdf,
        /// The group's number.
        group: u32,
        /// The others with their drivers.
        others: String,
    },
    /// A node of VFIO does not exist.
    #[error("device {bdf}: '{node}' does not exist; run: modprobe vfio-pci")]
    NoNode {
        /// The device.
        bdf: Bdf,
        /// The node.
        node: PathBuf,
    },
    /// The kernel was built without VFIO's groups.
    #[error(
        "device {bdf}: '{node}' does not exist, because this kernel has only VFIO's device files; add: --platform iommufd=on"
    )]
    NoGroups {
        /// The device.
        bdf: Bdf,
        /// The node of the group.
        node: PathBuf,
    },
    /// There is no iommufd.
    #[error(
        "device {bdf}: '{node}' does not exist; run: modprobe iommufd (Linux 6.6 or newer), or leave out iommufd=on"
    )]
    NoIommufd {
        /// The device.
        bdf: Bdf,
        /// Its node.
        node: PathBuf,
    },
    /// The device has no file of its own.
    #[error(
        "device {bdf} has no file below '{dir}'; use Linux 6.6 or newer with CONFIG_VFIO_DEVICE_CDEV, or leave out iommufd=on"
    )]
    NoDeviceFile {
        /// The device.
        bdf: Bdf,
        /// Where VFIO's device files are.
        dir: PathBuf,
    },
    /// A node of VFIO may not be opened.
    #[error(
        "device {bdf}: no permission to open '{node}'; run as root, or give your user access: chown $USER {node}"
    )]
    NoPermission {
        /// The device.
        bdf: Bdf,
        /// The node.
        node: PathBuf,
    },
    /// Somebody else has it.
    #[error("device {bdf} is in use: '{node}' is held open by another process; stop the VM that uses it")]
    InUse {
        /// The device.
        bdf: Bdf,
        /// The node.
        node: PathBuf,
    },
    /// A node of VFIO cannot be opened for another reason.
    #[error("device {bdf}: cannot open '{node}'; `dmesg` may say more")]
    Node {
        /// The device.
        bdf: Bdf,
        /// The node.
        node: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest's RAM may not be locked.
    #[error(
        "device {bdf} needs {needed_kib} KiB of locked memory for DMA, but the limit is {limit_kib} KiB; run: ulimit -l {needed_kib} (systemd: LimitMEMLOCK={needed_kib}K)"
    )]
    Memlock {
        /// The first device.
        bdf: Bdf,
        /// What is needed.
        needed_kib: u64,
        /// What is allowed.
        limit_kib: u64,
    },
}

/// How much memory this process may lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LockLimit {
    /// Bytes in all; none when there is no limit.
    pub bytes: Option<u64>,
    /// Bytes locked already.
    pub used: u64,
}

impl LockLimit {
    /// That of this process: `RLIMIT_MEMLOCK`, unless it has `CAP_IPC_LOCK` (capabilities(7)).
    pub fn of_this_process() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        Self::from_status(&status, getrlimit(Resource::Memlock).current)
    }

    fn from_status(status: &str, limit: Option<u64>) -> Self {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(|value| value.trim().trim_end_matches(" kB").trim())
        };
        let capabilities = field("CapEff").and_then(|hex| u64::from_str_radix(hex, 16).ok()).unwrap_or(0);
        let locked_kib: u64 = field("VmLck").and_then(|kib| kib.parse().ok()).unwrap_or(0);
        let exempt = capabilities >> CAP_IPC_LOCK & 1 != 0;
        Self { bytes: if exempt { None } else { limit }, used: locked_kib.saturating_mul(1024) }
    }
}

/// The checks, over a sysfs and a `/dev`.
#[derive(Debug)]
pub struct Preflight {
    sysfs: Sysfs,
    dev: PathBuf,
    lock_limit: LockLimit,
}

impl Default for Preflight {
    fn default() -> Self {
        Self::new(Sysfs::default(), "/dev".into(), LockLimit::of_this_process())
    }
}

impl Preflight {
    /// Checks against the given surroundings.
    pub fn new(sysfs: Sysfs, dev: PathBuf, lock_limit: LockLimit) -> Self {
        Self { sysfs, dev, lock_limit }
    }

    /// Checks all devices of a machine with `guest_ram` bytes of memory, which will be opened as `kind` says: sysfs paths as
    /// given by the user. Returns them in the same order.
    ///
    /// # Errors
    /// The first reason not to start.
    pub fn check<P: AsRef<Path>>(
        &self,
        paths: &[P],
        kind: ContextKind,
        guest_ram: u64,
    ) -> Result<Vec<HostFunction>, CheckError> {
        let mut functions: Vec<HostFunction> = Vec::with_capacity(paths.len());
        let mut groups = BTreeSet::new();
        for path in paths {
            let function = self.sysfs.function_at(path.as_ref())?;
            if functions.iter().any(|other| other.bdf == function.bdf) {
                return Err(CheckError::Twice { bdf: function.bdf });
            }
            let group = self.check_function(&function)?;
            match kind {
                // Two devices of one group share its node.
                ContextKind::Container if groups.insert(group) => self.check_group(&function, group)?,
                ContextKind::Container => {}
                ContextKind::Iommufd => self.check_device_file(&function, group)?,
            }
            functions.push(function);
        }
        if let Some(first) = functions.first() {
            self.check_memlock(first.bdf, guest_ram)?;
        }
        Ok(functions)
    }

    /// What sysfs alone can tell; returns the number of the group.
    fn check_function(&self, function: &HostFunction) -> Result<u32, CheckError> {
        let bdf = function.bdf;
        if function.is_bridge() {
            return Err(CheckError::Bridge { bdf });
        }
        let group = IommuGroup::of(&self.sysfs, function)?.ok_or(CheckError::NoIommu { bdf })?;
        if !function.is_bound_to_vfio() {
            return Err(CheckError::NotBound { bdf, driver: function.driver_name().to_owned() });
        }
        let others: Vec<_> =
            group.obstructions().map(|other| format!("{} ({})", other.bdf, other.driver_name())).collect();
        if !others.is_empty() {
            return Err(CheckError::NotViable { bdf, group: group.number, others: others.join(", ") });
        }
        Ok(group.number)
    }

    /// Whether the container and the group can be opened.
    fn check_group(&self, function: &HostFunction, group: u32) -> Result<(), CheckError> {
        let bdf = function.bdf;
        let vfio = self.dev.join("vfio");
        let nodes = self
            .try_open(bdf, vfio.join("vfio"))
            .and_then(|()| self.try_open(bdf, vfio.join(group.to_string())));
        match nodes {
            Err(CheckError::NoNode { bdf, node }) if self.device_file(function).is_some() => {
                Err(CheckError::NoGroups { bdf, node })
            }
            result => result,
        }
    }

    /// Whether iommufd and the device's own node can be opened.
    fn check_device_file(&self, function: &HostFunction, group: u32) -> Result<(), CheckError> {
        let bdf = function.bdf;
        self.try_open(bdf, self.dev.join("iommu")).map_err(|e| match e {
            CheckError::NoNode { bdf, node } => CheckError::NoIommufd { bdf, node },
            e => e,
        })?;
        let dir = self.dev.join("vfio/devices");
        let file = self.device_file(function).ok_or(CheckError::NoDeviceFile { bdf, dir })?;
        self.try_open(bdf, file)?;
        // One who has the group has the device too. It need not exist, nor be open to this user.
        match self.try_open(bdf, self.dev.join("vfio").join(group.to_string())) {
            Err(e @ CheckError::InUse { .. }) => Err(e),
            _ => Ok(()),
        }
    }

    /// The device's own node.
    fn device_file(&self, function: &HostFunction) -> Option<PathBuf> {
        let name = function.vfio_device.as_ref()?;
        Some(self.dev.join("vfio/devices").join(name)).filter(|file| file.exists())
    }

    fn try_open(&self, bdf: Bdf, node: PathBuf) -> Result<(), CheckError> {
        let Err(source) = OpenOptions::new().read(true).write(true).open(&node) else { return Ok(()) };
        Err(match source.kind() {
            io::ErrorKind::NotFound => CheckError::NoNode { bdf, node },
            io::ErrorKind::PermissionDenied => CheckError::NoPermission { bdf, node },
            io::ErrorKind::ResourceBusy => CheckError::InUse { bdf, node },
            _ => CheckError::Node { bdf, node, source },
        })
    }

    fn check_memlock(&self, bdf: Bdf, guest_ram: u64) -> Result<(), CheckError> {
        let Some(limit) = self.lock_limit.bytes else { return Ok(()) };
        let needed = guest_ram.saturating_add(MEMLOCK_MARGIN).saturating_add(self.lock_limit.used);
        if needed <= limit {
            return Ok(());
        }
        Err(CheckError::Memlock { bdf, needed_kib: needed.div_ceil(1024), limit_kib: limit / 1024 })
    }
}

#[cfg(test)]
mod tests {
    use super::super::host::fake::Tree;
    use super::*;

    const NIC: u32 = 0x02_00_00;
    const GPU: &str = "0000:01:00.0";
    const UNLIMITED: LockLimit = LockLimit { bytes: None, used: 0 };

    /// A tree with a device that can be assigned.
    fn good() -> Tree {
        let tree = Tree::new();
        tree.add(GPU, NIC, Some("vfio-pci"), Some(9));
        for node in ["vfio/vfio", "vfio/9"] {
            fs::write(tree.dev().join(node), "").unwrap();
        }
        tree
    }

    fn check(tree: &Tree, devices: &[&str]) -> Result<Vec<HostFunction>, CheckError> {
        check_as(tree, devices, ContextKind::Container)
    }

    fn check_as(tree: &Tree, devices: &[&str], kind: ContextKind) -> Result<Vec<HostFunction>, CheckError> {
        let paths: Vec<_> = devices.iter().map(|bdf| tree.dir(bdf)).collect();
        Preflight::new(tree.sysfs(), tree.dev(), UNLIMITED).check(&paths, kind, 1 << 30)
    }

    fn refusal(tree: &Tree, devices: &[&str]) -> String {
        let message = check(tree, devices).unwrap_err().to_string();
        assert!(!message.contains('\n'), "{message}");
        message
    }

    #[test]
    fn a_device_bound_to_vfio_with_its_nodes_passes() {
        let functions = check(&good(), &[GPU]).unwrap();
        assert_eq!(functions[0].bdf.to_string(), GPU);
    }

    #[test]
    fn no_device_needs_no_vfio() {
        assert!(check(&Tree::new(), &[]).unwrap().is_empty());
    }

    #[test]
    fn a_device_of_the_hosts_is_refused_with_the_command_to_bind_it() {
        let tree = good();
        tree.bind(GPU, "e1000e");
        assert_eq!(
            refusal(&tree, &[GPU]),
            format!("device {GPU} is bound to e1000e, not to vfio-pci; run: dormouse bind {GPU}")
        );
        tree.unbind(GPU);
        assert!(refusal(&tree, &[GPU]).contains("bound to no driver"));
    }

    #[test]
    fn others_in_the_group_are_named_with_their_drivers() {
        let tree = good();
        tree.add("0000:01:00.1", NIC, Some("snd_hda_intel"), Some(9));
        tree.add("0000:01:00.2", NIC, Some("xhci_hcd"), Some(9));
        let message = refusal(&tree, &[GPU]);
        assert!(message.contains("group 9"), "{message}");
        assert!(message.contains("0000:01:00.1 (snd_hda_intel), 0000:01:00.2 (xhci_hcd)"), "{message}");
    }

    #[test]
    fn the_same_device_twice_is_refused_also_by_another_path() {
        let tree = good();
        let paths = [tree.dir(GPU), tree.root().join("sys/devices/pci0000:00").join(GPU)];
        let preflight = Preflight::new(tree.sysfs(), tree.dev(), UNLIMITED);
        assert!(matches!(
            preflight.check(&paths, ContextKind::Container, 0).unwrap_err(),
            CheckError::Twice { .. }
        ));
    }

    #[test]
    fn two_devices_of_one_group_pass_together() {
        let tree = good();
        tree.add("0000:01:00.1", NIC, Some("vfio-pci"), Some(9));
        assert_eq!(check(&tree, &["0000:01:00.1", GPU]).unwrap().len(), 2);
    }

    #[test]
    fn a_bridge_is_refused() {
        let tree = good();
        tree.add("0000:00:01.0", 0x06_04_00, Some("pcieport"), Some(9));
        assert!(refusal(&tree, &["0000:00:01.0"]).contains("bridge"));
    }

    #[test]
    fn a_host_without_iommu_is_told_how_to_get_one() {
        let tree = good();
        tree.add("0000:02:00.0", NIC, Some("vfio-pci"), None);
        assert!(refusal(&tree, &["0000:02:00.0"]).contains("intel_iommu=on"));
    }

    #[test]
    fn missing_nodes_are_named() {
        let tree = good();
        fs::remove_file(tree.dev().join("vfio/9")).unwrap();
        assert!(refusal(&tree, &[GPU]).contains("vfio/9' does not exist"));
        fs::remove_file(tree.dev().join("vfio/vfio")).unwrap();
        assert!(refusal(&tree, &[GPU]).contains("vfio/vfio' does not exist"));
    }

    /// Gives the device a file of its own, and the host `/dev/iommu`.
    fn add_device_file(tree: &Tree) {
        fs::create_dir_all(tree.dir(GPU).join("vfio-dev/vfio0")).unwrap();
        fs::create_dir(tree.dev().join("vfio/devices")).unwrap();
        fs::write(tree.dev().join("vfio/devices/vfio0"), "").unwrap();
        fs::write(tree.dev().join("iommu"), "").unwrap();
    }

    #[test]
    fn a_kernel_with_only_the_device_interface_needs_iommufd() {
        let tree = good();
        fs::remove_file(tree.dev().join("vfio/9")).unwrap();
        fs::remove_file(tree.dev().join("vfio/vfio")).unwrap();
        add_device_file(&tree);
        assert!(refusal(&tree, &[GPU]).contains("add: --platform iommufd=on"));
        check_as(&tree, &[GPU], ContextKind::Iommufd).unwrap();
    }

    #[test]
    fn iommufd_needs_its_node_and_the_devices_file_and_no_group() {
        let tree = good();
        let refusal = || check_as(&tree, &[GPU], ContextKind::Iommufd).unwrap_err().to_string();
        assert!(refusal().contains("iommu' does not exist; run: modprobe iommufd"), "{}", refusal());
        add_device_file(&tree);
        fs::remove_file(tree.dev().join("vfio/9")).unwrap();
        check_as(&tree, &[GPU], ContextKind::Iommufd).unwrap();
        fs::remove_file(tree.dev().join("vfio/devices/vfio0")).unwrap();
        assert!(refusal().contains("has no file below"), "{}", refusal());
    }

    #[test]
    fn too_little_locked_memory_names_the_value_needed() {
        let tree = good();
        let limit = LockLimit { bytes: Some(8 << 20), used: 1 << 20 };
        let preflight = Preflight::new(tree.sysfs(), tree.dev(), limit);
        let message =
            preflight.check(&[tree.dir(GPU)], ContextKind::Container, 1 << 30).unwrap_err().to_string();
        let needed = (1 << 20) + (64 << 10) + (1 << 10);
        assert!(message.contains(&format!("ulimit -l {needed} ")), "{message}");
        assert!(message.contains("limit is 8192 KiB"), "{message}");
        let enough = LockLimit { bytes: Some(needed << 10), used: 1 << 20 };
        Preflight::new(tree.sysfs(), tree.dev(), enough)
            .check(&[tree.dir(GPU)], ContextKind::Container, 1 << 30)
            .unwrap();
        let huge = preflight.check(&[tree.dir(GPU)], ContextKind::Container, u64::MAX).unwrap_err();
        assert!(matches!(huge, CheckError::Memlock { .. }));
    }

    #[test]
    fn the_capability_lifts_the_limit() {
        let status = "Name:\tdormouse\nVmLck:\t    2048 kB\nCapEff:\t0000000000000000\n";
        let limited = LockLimit::from_status(status, Some(4096));
        assert_eq!(limited, LockLimit { bytes: Some(4096), used: 2 << 20 });
        let status = status.replace("0000000000000000", "0000000000004000");
        assert_eq!(LockLimit::from_status(&status, Some(4096)).bytes, None);
    }
}
