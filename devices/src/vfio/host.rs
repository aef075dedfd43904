//! A PCI function of the host as sysfs shows it, and the IOMMU group it is in.
//!
//! Only attributes that the kernel answers from memory are read (Documentation/ABI/testing/sysfs-bus-pci). Never `config`:
//! reading that resumes a sleeping device, and an assigned one must stay asleep.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use pci::Bdf;

/// Class code of PCI-to-PCI bridges, root ports among them: base class and subclass.
const CLASS_PCI_BRIDGE: u16 = 0x0604;
/// Base class of bridges of every kind.
const BASE_CLASS_BRIDGE: u8 = 0x06;

/// Where the host's sysfs is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sysfs(PathBuf);

impl Default for Sysfs {
    fn default() -> Self {
        Self::new("/sys")
    }
}

/// What sysfs says about a device cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The path does not lead to a PCI function.
    #[error(
        "'{path}' is no PCI device; give its directory in sysfs, for example /sys/bus/pci/devices/0000:01:00.0"
    )]
    NotPci {
        /// The path as given.
        path: PathBuf,
    },
    /// There is no such function.
    #[error("there is no PCI device {bdf} on this host; `lspci -D` lists those there are")]
    Absent {
        /// Its address.
        bdf: Bdf,
    },
    /// An attribute cannot be read.
    #[error("cannot read '{path}' of PCI device {bdf}; check that the device is still there")]
    Attribute {
        /// The function's address.
        bdf: Bdf,
        /// The attribute's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Sysfs {
    /// The sysfs mounted at `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self(root.into())
    }

    /// The directory of a function, whether it exists or not.
    pub fn device_dir(&self, bdf: Bdf) -> PathBuf {
        self.0.join("bus/pci/devices").join(bdf.to_string())
    }

    /// The directory of a PCI driver, whether it exists or not.
    pub fn driver_dir(&self, driver: &str) -> PathBuf {
        self.0.join("bus/pci/drivers").join(driver)
    }

    /// The file that makes the kernel look for a driver for a function.
    pub fn drivers_probe(&self) -> PathBuf {
        self.0.join("bus/pci/drivers_probe")
    }

    /// The directory with a link to every disk and partition.
    pub fn block_devices(&self) -> PathBuf {
        self.0.join("class/block")
    }

    /// The directory with one entry for each mounted btrfs.
    pub fn btrfs(&self) -> PathBuf {
        self.0.join("fs/btrfs")
    }

    /// The function that a path such as `/sys/bus/pci/devices/0000:01:00.0/` leads to.
    ///
    /// # Errors
    /// The path does not end in a PCI address, the function is absent, or the path leads elsewhere.
    pub fn function_at(&self, path: &Path) -> Result<HostFunction, HostError> {
        let not_pci = || HostError::NotPci { path: path.to_owned() };
        // The name that counts is the one behind links such as /sys/class/net/eth0/device.
        let real = fs::canonicalize(path).ok();
        let name = real.as_deref().unwrap_or(path).file_name().and_then(OsStr::to_str).ok_or_else(not_pci)?;
        let bdf: Bdf = name.parse().map_err(|_| not_pci())?;
        let function = HostFunction::read(self, bdf)?;
        // A directory elsewhere that happens to be named like an address.
        if real.is_none() || real != fs::canonicalize(&function.dir).ok() {
            return Err(not_pci());
        }
        Ok(function)
    }
}

/// A PCI function of the host, as it was when it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFunction {
    /// Its address.
    pub bdf: Bdf,
    /// Its directory in sysfs.
    pub dir: PathBuf,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class code: base class, subclass and programming interface, 24 bits.
    pub class: u32,
    /// The driver that it is bound to.
    pub driver: Option<String>,
    /// The only driver that may bind to it, if one is set.
    pub driver_override: Option<String>,
    /// Number of its IOMMU group; none when the host has no IOMMU for it.
    pub iommu_group: Option<u32>,
    /// The physical function that it is a virtual function of.
    pub physical_function: Option<Bdf>,
    /// Its own virtual functions.
    pub virtual_functions: Vec<Bdf>,
    /// Name of its VFIO character device below `/dev/vfio/devices`, such as `vfio0`.
    pub vfio_device: Option<String>,
    /// It has a type 1 header, whatever its class says.
    has_secondary_bus: bool,
}

impl HostFunction {
    /// Reads a function.
    ///
    /// # Errors
    /// It is absent, or its identity cannot be read.
    pub fn read(sysfs: &Sysfs, bdf: Bdf) -> Result<Self, HostError> {
        let dir = sysfs.device_dir(bdf);
        if !dir.exists() {
            return Err(HostError::Absent { bdf });
        }
        let hex = |name: &str| {
            let path = dir.join(name);
            read_hex(&path).map_err(|source| HostError::Attribute { bdf, path, source })
        };
        // A field that is too wide is one that no kernel writes.
        let (vendor, device) = (hex("vendor")?, hex("device")?);
        Ok(Self {
            bdf,
            vendor: u16::try_from(vendor).unwrap_or(u16::MAX),
            device: u16::try_from(device).unwrap_or(u16::MAX),
            class: hex("class")?,
            driver: link_name(&dir.join("driver")),
            driver_override: read_override(&dir.join("driver_override")),
            iommu_group: link_value(&dir.join("iommu_group")),
            physical_function: link_value(&dir.join("physfn")),
            virtual_functions: virtual_functions(&dir),
            vfio_device: first_entry(&dir.join("vfio-dev")),
            has_secondary_bus: dir.join("secondary_bus_number").exists(),
            dir,
        })
    }

    /// Whether it is a PCI-to-PCI bridge: it belongs to the host's own topology and cannot be assigned.
    pub fn is_bridge(&self) -> bool {
        self.has_secondary_bus || self.class >> 8 == u32::from(CLASS_PCI_BRIDGE)
    }

    /// Whether it is a bridge of any kind, which binding a group leaves alone.
    pub fn is_topology(&self) -> bool {
        self.is_bridge() || self.class >> 16 == u32::from(BASE_CLASS_BRIDGE)
    }

    /// Whether its driver is one through which VFIO hands out devices: `vfio-pci`, or a variant such as `mlx5_vfio_pci`.
    pub fn is_bound_to_vfio(&self) -> bool {
        self.driver.as_deref().is_some_and(is_vfio_driver)
    }

    /// Whether its group cannot be assigned while it is as it is: a driver of the host's own uses it.
    pub fn obstructs_group(&self) -> bool {
        // Those drivers do no DMA on the device's behalf, and the kernel lets them stay
        // (`driver_managed_dma`; before Linux 5.19 `vfio_driver_allowlist`).
        self.driver
            .as_deref()
            .is_some_and(|driver| !is_vfio_driver(driver) && !matches!(driver, "pci-stub" | "pcieport"))
    }

    /// The driver's name, for messages.
    pub fn driver_name(&self) -> &str {
        self.driver.as_deref().unwrap_or("no driver")
    }
}

/// The functions that the host's IOMMU cannot tell apart; they are assigned together or not at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IommuGroup {
    /// Its number, as in `/dev/vfio/NUMBER`.
    pub number: u32,
    /// Its PCI functions, by address.
    pub members: Vec<HostFunction>,
}

impl IommuGroup {
    /// Reads the group that a function is in; none when it is in none.
    ///
    /// # Errors
    /// The group or one of its members cannot be read.
    pub fn of(sysfs: &Sysfs, function: &HostFunction) -> Result<Option<Self>, HostError> {
        let Some(number) = function.iommu_group else { return Ok(None) };
        let path = function.dir.join("iommu_group/devices");
        let names =
            entries(&path).map_err(|source| HostError::Attribute { bdf: function.bdf, path, source })?;
        let mut members = names
            .iter()
            .filter_map(|name| name.parse().ok())
            .map(|bdf| HostFunction::read(sysfs, bdf))
            .collect::<Result<Vec<_>, _>>()?;
        members.sort_by_key(|member| {
            (member.bdf.segment, member.bdf.bus, member.bdf.devfn.device(), member.bdf.devfn.function())
        });
        Ok(Some(Self { number, members }))
    }

    /// The members that keep the group from being assigned.
    pub fn obstructions(&self) -> impl Iterator<Item = &HostFunction> {
        self.members.iter().filter(|member| member.obstructs_group())
    }
}

fn is_vfio_driver(driver: &str) -> bool {
    driver == "vfio-pci" || driver.ends_with("_vfio_pci") || driver.ends_with("-vfio-pci")
}

fn read_hex(path: &Path) -> io::Result<u32> {
    let text = fs::read_to_string(path)?;
    let digits = text.trim().trim_start_matches("0x");
    u32::from_str_radix(digits, 16).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

fn read_override(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    // An absent override is shown as this word.
    Some(text.trim()).filter(|name| !name.is_empty() && *name != "(null)").map(str::to_owned)
}

fn link_name(path: &Path) -> Option<String> {
    Some(fs::read_link(path).ok()?.file_name()?.to_str()?.to_owned())
}

fn link_value<T: FromStr>(path: &Path) -> Option<T> {
    link_name(path)?.parse().ok()
}

fn entries(path: &Path) -> io::Result<Vec<String>> {
    let names = fs::read_dir(path)?.map(|entry| entry.map(|entry| entry.file_name().into_string()));
    Ok(names.collect::<io::Result<Vec<_>>>()?.into_iter().flatten().collect())
}

fn first_entry(path: &Path) -> Option<String> {
    entries(path).ok()?.into_iter().min()
}

fn virtual_functions(dir: &Path) -> Vec<Bdf> {
    (0..).map_while(|index: u32| link_value(&dir.join(format!("virtfn{index}")))).collect()
}

#[cfg(test)]
pub(crate) mod fake {
    //! A sysfs tree in a temporary directory.

    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::{Path, PathBuf};

    use vmm_sys_util::tempdir::TempDir;

    use super::Sysfs;

    /// The tree, removed when dropped, with a directory beside it that stands for `/dev`.
    #[derive(Debug)]
    pub(crate) struct Tree(TempDir);

    impl Tree {
        pub(crate) fn new() -> Self {
            let tree = Self(TempDir::new().unwrap());
            for dir in ["sys/bus/pci/devices", "sys/bus/pci/drivers", "sys/kernel/iommu_groups", "dev/vfio"] {
                fs::create_dir_all(tree.root().join(dir)).unwrap();
            }
            fs::write(tree.root().join("sys/bus/pci/drivers_probe"), "").unwrap();
            tree
        }

        pub(crate) fn root(&self) -> &Path {
            self.0.as_path()
        }

        pub(crate) fn sysfs(&self) -> Sysfs {
            Sysfs::new(self.root().join("sys"))
        }

        pub(crate) fn dev(&self) -> PathBuf {
            self.root().join("dev")
        }

        pub(crate) fn dir(&self, bdf: &str) -> PathBuf {
            self.root().join("sys/bus/pci/devices").join(bdf)
        }

        /// Adds a function: an Intel NIC with the given class.
        pub(crate) fn add(&self, bdf: &str, class: u32, driver: Option<&str>, group: Option<u32>) {
            let real = self.root().join("sys/devices/pci0000:00").join(bdf);
            fs::create_dir_all(&real).unwrap();
            symlink(&real, self.dir(bdf)).unwrap();
            for (name, value) in [
                ("vendor", "0x8086\n".to_owned()),
                ("device", "0x10d3\n".to_owned()),
                ("class", format!("0x{class:06x}\n")),
                ("driver_override", "(null)\n".to_owned()),
                ("modalias", "pci:v00008086d000010D3\n".to_owned()),
            ] {
                fs::write(real.join(name), value).unwrap();
            }
            if let Some(driver) = driver {
                self.bind(bdf, driver);
            }
            if let Some(group) = group {
                let dir = self.root().join(format!("sys/kernel/iommu_groups/{group}"));
                fs::create_dir_all(dir.join("devices")).unwrap();
                symlink(&real, dir.join("devices").join(bdf)).unwrap();
                symlink(&dir, real.join("iommu_group")).unwrap();
            }
        }

        pub(crate) fn add_driver(&self, driver: &str) {
            fs::create_dir_all(self.root().join("sys/bus/pci/drivers").join(driver)).unwrap();
        }

        pub(crate) fn bind(&self, bdf: &str, driver: &str) {
            self.add_driver(driver);
            self.unbind(bdf);
            symlink(self.root().join("sys/bus/pci/drivers").join(driver), self.dir(bdf).join("driver"))
                .unwrap();
        }

        pub(crate) fn unbind(&self, bdf: &str) {
            let _ = fs::remove_file(self.dir(bdf).join("driver"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::fake::Tree;
    use super::*;

    const NIC: u32 = 0x02_00_00;
    const PORT: u32 = 0x06_04_00;

    #[test]
    fn a_function_is_read_whole_and_its_config_never() {
        let tree = Tree::new();
        tree.add("0000:01:00.0", NIC, Some("e1000e"), Some(7));
        let dir = tree.dir("0000:01:00.0");
        // A directory in its place: whoever read it would fail.
        fs::create_dir(dir.join("config")).unwrap();
        fs::create_dir_all(dir.join("vfio-dev/vfio3")).unwrap();
        fs::write(dir.join("driver_override"), "vfio-pci\n").unwrap();
        symlink("../0000:01:10.0", dir.join("virtfn0")).unwrap();
        symlink("../0000:01:10.2", dir.join("virtfn1")).unwrap();
        let function = HostFunction::read(&tree.sysfs(), "0000:01:00.0".parse().unwrap()).unwrap();
        assert_eq!((function.vendor, function.device, function.class), (0x8086, 0x10d3, NIC));
        assert_eq!(function.driver.as_deref(), Some("e1000e"));
        assert_eq!(function.driver_override.as_deref(), Some("vfio-pci"));
        assert_eq!(function.iommu_group, Some(7));
        assert_eq!(function.vfio_device.as_deref(), Some("vfio3"));
        let virtual_functions: Vec<_> = function.virtual_functions.iter().map(Bdf::to_string).collect();
        assert_eq!(virtual_functions, ["0000:01:10.0", "0000:01:10.2"]);
        assert!(!function.is_bridge() && !function.is_bound_to_vfio() && function.obstructs_group());
    }

    #[test]
    fn every_path_that_leads_to_the_device_is_accepted() {
        let tree = Tree::new();
        tree.add("0000:01:00.0", NIC, None, None);
        let link = tree.root().join("device");
        symlink(tree.dir("0000:01:00.0"), &link).unwrap();
        let with_slash = PathBuf::from(format!("{}/", tree.dir("0000:01:00.0").display()));
        for path in [with_slash, link, tree.root().join("sys/devices/pci0000:00/0000:01:00.0")] {
            let function = tree.sysfs().function_at(&path).unwrap();
            assert_eq!(function.bdf.to_string(), "0000:01:00.0", "{}", path.display());
        }
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        let tree = Tree::new();
        tree.add("0000:01:00.0", NIC, None, None);
        let decoy = tree.root().join("0000:01:00.0");
        fs::create_dir(&decoy).unwrap();
        for path in
            [decoy, tree.root().to_owned(), PathBuf::from("/dev/null"), PathBuf::from("/"), PathBuf::new()]
        {
            let error = tree.sysfs().function_at(&path).unwrap_err();
            assert!(matches!(error, HostError::NotPci { .. }), "{}: {error}", path.display());
        }
        let error = tree.sysfs().function_at(&tree.dir("0000:02:00.0")).unwrap_err();
        assert!(error.to_string().contains("no PCI device 0000:02:00.0"), "{error}");
    }

    #[test]
    fn a_group_is_viable_when_only_harmless_drivers_are_in_it() {
        let tree = Tree::new();
        tree.add("0000:00:10.0", PORT, Some("pcieport"), Some(4));
        tree.add("0000:01:00.1", NIC, Some("mlx5_vfio_pci"), Some(4));
        tree.add("0000:01:00.0", NIC, Some("vfio-pci"), Some(4));
        tree.add("0000:01:00.2", NIC, None, Some(4));
        let read = || {
            let function = HostFunction::read(&tree.sysfs(), "01:00.0".parse().unwrap()).unwrap();
            IommuGroup::of(&tree.sysfs(), &function).unwrap().unwrap()
        };
        let group = read();
        assert_eq!(group.obstructions().count(), 0);
        let order: Vec<_> = group.members.iter().map(|member| member.bdf.to_string()).collect();
        assert_eq!(order, ["0000:00:10.0", "0000:01:00.0", "0000:01:00.1", "0000:01:00.2"]);
        tree.bind("0000:01:00.2", "igb");
        let group = read();
        let blockers: Vec<_> =
            group.obstructions().map(|member| (member.bdf.to_string(), member.driver_name())).collect();
        assert_eq!(blockers, [("0000:01:00.2".to_owned(), "igb")]);
    }

    #[test]
    fn a_function_without_iommu_has_no_group() {
        let tree = Tree::new();
        tree.add("0000:01:00.0", NIC, None, None);
        let function = HostFunction::read(&tree.sysfs(), "01:00.0".parse().unwrap()).unwrap();
        assert_eq!(IommuGroup::of(&tree.sysfs(), &function).unwrap(), None);
    }

    #[test]
    fn a_bridge_is_known_by_class_or_by_its_secondary_bus() {
        let tree = Tree::new();
        tree.add("0000:00:10.0", PORT, None, None);
        tree.add("0000:00:11.0", NIC, None, None);
        fs::write(tree.dir("0000:00:11.0").join("secondary_bus_number"), "1\n").unwrap();
        tree.add("0000:00:12.0", 0x06_00_00, None, None);
        for (bdf, bridge, topology) in
            [("00:10.0", true, true), ("00:11.0", true, true), ("00:12.0", false, true)]
        {
            let function = HostFunction::read(&tree.sysfs(), bdf.parse().unwrap()).unwrap();
            assert_eq!((function.is_bridge(), function.is_topology()), (bridge, topology), "{bdf}");
        }
    }
}
