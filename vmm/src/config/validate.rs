//! Whether a configuration makes sense, before anything is opened or created for it.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use acpi::smbios::SystemIdentity;
use arch::layout::MIN_RAM;
use arch::topology::TopologyError;
use pci::Bdf;
use thiserror::Error;
use vfio_pm::{Policy, PolicyChange, PolicyError};

use super::{
    CpusError, DeviceConfig, MemoryConfigError, NumaError, PlatformConfig, VhostUserConfigError, VmConfig,
};

/// Where it is written what Dormouse has of Cloud Hypervisor.
const COMPATIBILITY: &str = "docs/compatibility.md";

/// What is wrong with a configuration.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// Nothing to boot.
    #[error("there is nothing to boot: give a kernel with --kernel PATH, or a firmware with --firmware PATH")]
    NoKernel,
    /// Two things to boot.
    #[error(
        "there are both a kernel (--kernel) and a firmware (--firmware) to boot; give one of them: a firmware takes its kernel from the disk"
    )]
    TwoPayloads,
    /// A debug console that cannot be.
    #[error("debug_console (--debug-console) at port {port:#x} is not possible: {why}")]
    DebugConsole {
        /// Its port.
        port: u16,
        /// The cause and the remedy.
        why: &'static str,
    },
    /// A setting of Cloud Hypervisor that Dormouse does not have yet.
    #[error("{setting} is not in Dormouse yet; leave it out, or see {COMPATIBILITY}")]
    NotYet {
        /// The option and key.
        setting: &'static str,
    },
    /// Too little memory.
    #[error("--memory size={size} is too little: the guest needs at least {MIN_RAM} bytes (64M)")]
    MemoryTooSmall {
        /// Bytes asked for.
        size: u64,
    },
    /// Persistent memory.
    #[error(transparent)]
    Pmem(#[from] super::PmemConfigError),
    /// Memory and its zones.
    #[error(transparent)]
    Memory(#[from] MemoryConfigError),
    /// Nodes.
    #[error(transparent)]
    Numa(#[from] NumaError),
    /// No vCPU, or more than there can be.
    #[error(
        "--cpus boot={boot}: a machine has from 1 to 255 vCPUs, as many as KVM's IOAPIC can send interrupts to"
    )]
    CpuCount {
        /// vCPUs asked for.
        boot: u32,
    },
    /// Processors that come later, or where they run.
    #[error(transparent)]
    Cpus(#[from] CpusError),
    /// A topology that does not match.
    #[error("--cpus topology: {0}")]
    Topology(TopologyError),
    /// A power policy that makes no sense.
    #[error("--device {0}")]
    Policy(PolicyError),
    /// A chassis that SMBIOS does not know.
    #[error(
        "--platform chassis_type={kind} is none of SMBIOS; use 1 to 36, for example 3 (desktop), 10 (notebook), 17 (server)"
    )]
    ChassisType {
        /// The type.
        kind: u8,
    },
    /// A width that no processor has.
    #[error("--cpus max_phys_bits={bits} is not possible; use 36 to 52")]
    PhysBits {
        /// The width.
        bits: u8,
    },
    /// Devices that are to reach each other.
    #[error(
        "--platform vfio_p2p_dma=on is not in Dormouse yet: the {devices} assigned devices would not reach each other's \
         BARs; write vfio_p2p_dma=off"
    )]
    PeerToPeer {
        /// How many devices are assigned.
        devices: usize,
    },
    /// A disk, or a limit that disks share.
    #[error(transparent)]
    Disk(#[from] super::DiskConfigError),
    /// A device without a path.
    #[error("--device needs the device: write path=/sys/bus/pci/devices/SEGMENT:BUS:DEVICE.FUNCTION")]
    NoDevicePath,
    /// The path leads nowhere.
    #[error("--device path={}: no such device ({error}); `lspci -D` lists those there are", path.display())]
    DevicePath {
        /// The path.
        path: PathBuf,
        /// The operating system's answer.
        error: io::Error,
    },
    /// The path leads to something else.
    #[error(
        "--device path={}: this is not a PCI device; \
         write path=/sys/bus/pci/devices/SEGMENT:BUS:DEVICE.FUNCTION",
        path.display()
    )]
    NotPci {
        /// The path.
        path: PathBuf,
    },
    /// One device twice.
    #[error("--device path={} is given twice; give each device once", path.display())]
    SameDevice {
        /// The second path.
        path: PathBuf,
    },
    /// One name twice.
    #[error("--device id={id} is given twice; give each device its own name")]
    SameId {
        /// The name.
        id: String,
    },
    /// A name that the VMM keeps for itself.
    #[error("--device id={id}: names that start with two underscores are reserved; choose another")]
    ReservedId {
        /// The name.
        id: String,
    },
    /// A guest device number that cannot be had.
    #[error("--device pci_device_id={number} is not possible; use 1 to 31")]
    DeviceNumber {
        /// The number.
        number: u8,
    },
    /// A console that cannot be had.
    #[error(transparent)]
    Console(#[from] super::ConsoleError),
    /// A way to go on from a snapshot that cannot be used.
    #[error(transparent)]
    Restore(#[from] super::RestoreConfigError),
    /// A socket device that makes no sense.
    #[error(transparent)]
    Vsock(#[from] super::VsockConfigError),
    /// More root ports than there can be.
    #[error("--platform hotplug_ports={ports} is not possible; bus 0 has room for 31 root ports")]
    HotplugPorts {
        /// How many.
        ports: u8,
    },
    /// A BAR that no function has.
    #[error("--device x_exclude_mmap_bars: a function has no BAR {bar}; use 0 to 5")]
    Bar {
        /// The number.
        bar: u64,
    },
    /// PCI segments.
    #[error(transparent)]
    PciSegment(#[from] super::PciSegmentError),
    /// A device that a vhost-user backend is.
    #[error(transparent)]
    VhostUser(#[from] VhostUserConfigError),
    /// No balloon to resize.
    #[error("the VM has no balloon that could be resized; start it with --balloon size=0")]
    NoBalloon,
    /// A balloon as large as the guest's memory.
    #[error(
        "--balloon size={size}: the guest has {memory} bytes of memory and cannot give up all of them; ask for less"
    )]
    Balloon {
        /// Bytes asked for.
        size: u64,
        /// Bytes of memory.
        memory: u64,
    },
    /// A network device that makes no sense.
    #[error(transparent)]
    Net(#[from] super::NetError),
    /// Not a UUID.
    #[error("--platform system_uuid={uuid} is no UUID; write it as 8-4-4-4-12 hexadecimal digits")]
    Uuid {
        /// What was given.
        uuid: String,
    },
}

impl VmConfig {
    /// Checks everything that can be checked without a guest.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.payload.as_ref().ok_or(ConfigError::NoKernel)?.validate()?;
        self.cpus.validate()?;
        self.memory.validate()?;
        self.validate_segments()?;
        super::numa::validate(self)?;
        self.validate_console()?;
        self.debug_console.validate()?;
        self.absent.validate()?;
        self.validate_balloon()?;
        self.validate_vhost_user()?;
        if let Some(platform) = &self.platform {
            platform.validate()?;
        }
        let devices = self.devices.as_deref().unwrap_or_default();
        let peers = self.platform.as_ref().is_some_and(|platform| platform.vfio_p2p_dma == Some(true));
        if peers && devices.len() > 1 {
            return Err(ConfigError::PeerToPeer { devices: devices.len() });
        }
        self.validate_all_devices()
    }

    /// The part of [`Self::validate`] that is about devices that can come and go.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate_all_devices(&self) -> Result<(), ConfigError> {
        validate_devices(self.devices.as_deref().unwrap_or_default())?;
        self.validate_disks()?;
        self.validate_net()?;
        self.vsock.iter().try_for_each(super::VsockConfig::validate)?;
        self.pmem.iter().flatten().try_for_each(super::PmemConfig::validate)?;
        self.validate_names_and_places()
    }

    /// Takes a device out; whether there was one of that name.
    pub fn remove_device(&mut self, id: &str) -> bool {
        let mut removed = false;
        if let Some(devices) = &mut self.devices {
            let before = devices.len();
            devices.retain(|device| device.id.as_deref() != Some(id));
            removed = devices.len() < before;
        }
        removed || self.remove_emulated(id)
    }
}

impl PlatformConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        refuse(self.iommu_segments.is_some(), "--platform iommu_segments")?;
        refuse(self.iommu_address_width != 64, "--platform iommu_address_width other than 64")?;
        refuse(self.iommufd_fd.is_some(), "--platform iommufd_fd")?;
        refuse(self.tdx, "--platform tdx=on")?;
        refuse(self.sev_snp, "--platform sev_snp=on")?;
        if self.hotplug_ports > 31 {
            return Err(ConfigError::HotplugPorts { ports: self.hotplug_ports });
        }
        if let Some(kind) = self.chassis_type.filter(|kind| !(1..=36).contains(kind)) {
            return Err(ConfigError::ChassisType { kind });
        }
        self.identity().map(|_| ())
    }

    /// What SMBIOS says of the machine.
    ///
    /// # Errors
    /// [`ConfigError::Uuid`].
    pub fn identity(&self) -> Result<SystemIdentity, ConfigError> {
        let uuid = match &self.system_uuid {
            None => None,
            Some(uuid) => Some(parse_uuid(uuid).ok_or_else(|| ConfigError::Uuid { uuid: uuid.clone() })?),
        };
        Ok(SystemIdentity {
            manufacturer: self.system_manufacturer.clone(),
            product_name: self.system_product_name.clone(),
            version: self.system_version.clone(),
            serial_number: self.system_serial_number.clone(),
            uuid,
            sku_number: self.system_sku_number.clone(),
            family: self.system_family.clone(),
            chassis_asset_tag: self.chassis_asset_tag.clone(),
            chassis_type: self.chassis_type,
            oem_strings: self.oem_strings.clone().unwrap_or_default(),
        })
    }
}

impl DeviceConfig {
    /// The device's own directory in sysfs, with all links followed, and its address on the host.
    ///
    /// # Errors
    /// The path is missing, leads nowhere, or leads to what is no PCI device.
    pub fn host_device(&self) -> Result<(PathBuf, Bdf), ConfigError> {
        let path = self.path.as_deref().ok_or(ConfigError::NoDevicePath)?;
        let real =
            path.canonicalize().map_err(|error| ConfigError::DevicePath { path: path.into(), error })?;
        let bdf = pci_address(&real).ok_or_else(|| ConfigError::NotPci { path: path.into() })?;
        Ok((real, bdf))
    }

    /// How its power is to be handled, as changes to the defaults of its class.
    pub fn policy_change(&self) -> PolicyChange {
        PolicyChange {
            power: Some(self.power),
            wake: Some(self.wake),
            hold_off: self.hold_off,
            toggle_rate: self.toggle_rate,
            toggle_burst: self.toggle_burst,
            wake_storm: self.wake_storm,
            on_timeout: self.on_timeout,
            on_lost: self.on_lost,
        }
    }

    /// Takes over what a change names.
    pub fn change_policy(&mut self, change: &PolicyChange) {
        self.power = change.power.unwrap_or(self.power);
        self.wake = change.wake.unwrap_or(self.wake);
        self.hold_off = change.hold_off.or(self.hold_off);
        self.toggle_rate = change.toggle_rate.or(self.toggle_rate);
        self.toggle_burst = change.toggle_burst.or(self.toggle_burst);
        self.wake_storm = change.wake_storm.or(self.wake_storm);
        self.on_timeout = change.on_timeout.or(self.on_timeout);
        self.on_lost = change.on_lost.or(self.on_lost);
    }

    /// Whether its power can be handled as it says.
    ///
    /// # Errors
    /// [`ConfigError::Policy`].
    pub fn check_policy(&self) -> Result<(), ConfigError> {
        self.policy_change().apply(&Policy::default()).map(drop).map_err(ConfigError::Policy)
    }

    fn validate(&self) -> Result<(), ConfigError> {
        self.check_policy()?;
        refuse(self.fd.is_some(), "--device fd")?;
        refuse(self.iommu, "--device iommu=on")?;
        refuse(self.x_nv_gpudirect_clique.is_some(), "--device x_nv_gpudirect_clique")?;
        match self.x_exclude_mmap_bars.iter().find(|&&bar| bar > 5) {
            Some(&bar) => Err(ConfigError::Bar { bar }),
            None => Ok(()),
        }
    }
}

fn validate_devices(devices: &[DeviceConfig]) -> Result<(), ConfigError> {
    let (mut paths, mut ids) = (HashSet::new(), HashSet::new());
    for device in devices {
        device.validate()?;
        if let Some(id) = &device.id {
            if id.starts_with("__") {
                return Err(ConfigError::ReservedId { id: id.clone() });
            }
            if !ids.insert(id) {
                return Err(ConfigError::SameId { id: id.clone() });
            }
        }
        if let Some(number) = device.pci_device_id {
            // Number 0 is the host bridge.
            if !(1..32).contains(&number) {
                return Err(ConfigError::DeviceNumber { number });
            }
        }
        let (real, _) = device.host_device()?;
        if !paths.insert(real) {
            return Err(ConfigError::SameDevice { path: device.path.clone().unwrap_or_default() });
        }
    }
    Ok(())
}

/// The address that the last part of a sysfs path spells.
fn pci_address(path: &Path) -> Option<Bdf> {
    let name = path.file_name()?.to_str()?;
    // The short form without a segment is not what sysfs uses.
    if name.matches(':').count() == 2 { name.parse().ok() } else { None }
}

/// The 16 bytes of a UUID in the order in which they are written.
fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    if text.split('-').map(str::len).ne([8, 4, 4, 4, 12])
        || !text.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit())
    {
        return None;
    }
    let digits = text.replace('-', "");
    let mut bytes = [0; 16];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(digits.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some(bytes)
}

pub(super) fn refuse(given: bool, setting: &'static str) -> Result<(), ConfigError> {
    if given { Err(not_yet(setting)) } else { Ok(()) }
}

fn not_yet(setting: &'static str) -> ConfigError {
    ConfigError::NotYet { setting }
}
