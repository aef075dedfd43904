//! What a machine is to be: the typed configuration behind the command line.
//!
//! Names, shapes and defaults of the serialised form are those of Cloud Hypervisor's `VmConfig`, so that its
//! clients can be served from the same types. A setting that Dormouse does not have yet is a field too, and
//! [`VmConfig::validate`] refuses it by name unless it has its default value.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

mod absent;
mod balloon;
mod console;
mod cpus;
mod debug_console;
mod descriptors;
mod disk;
mod endpoint;
mod fs;
mod generic_vhost_user;
mod json;
mod memory;
mod net;
mod numa;
pub mod option_parser;
mod parse;
mod payload;
pub mod pci_common;
mod pci_segment;
mod pmem;
mod rate_limit;
mod restore;
mod rng;
#[cfg(test)]
mod tests;
mod validate;
mod vhost_user;
mod vsock;

pub use absent::AbsentSettings;
pub use balloon::BalloonConfig;
pub use console::{ConsoleError, VirtioConsoleConfig};
pub use cpus::CpusError;
pub use debug_console::DebugConsoleConfig;
pub use descriptors::Descriptors;
pub use disk::{DiskConfig, DiskConfigError, RateLimitGroupConfig};
pub use endpoint::Endpoint;
pub use fs::FsConfig;
pub use generic_vhost_user::GenericVhostUserConfig;
pub use json::from_json;
pub use memory::{MemoryConfigError, MemoryZoneConfig};
pub use net::{NetConfig, NetError, VhostChoice, VhostMode};
pub use numa::{NumaConfig, NumaError, node_of_cpu, node_of_zone};
pub use option_parser::OptionError;
pub use payload::PayloadConfig;
pub use pci_common::PciCommon;
pub use pci_segment::{PciSegmentConfig, PciSegmentError};
pub use pmem::{PmemConfig, PmemConfigError};
pub use restore::{MemoryRestoreMode, RestoreConfig, RestoreConfigError};
pub use rng::RngConfig;
pub use validate::ConfigError;
pub use vfio_pm::{LostPolicy, PowerChoice, WakePolicy};
pub use vhost_user::VhostUserConfigError;
pub use vsock::{VsockConfig, VsockConfigError};

/// The whole machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// Processors.
    #[serde(default)]
    pub cpus: CpusConfig,
    /// Memory.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// What to boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payload: Option<PayloadConfig>,
    /// The serial port.
    #[serde(default)]
    pub serial: ConsoleConfig,
    /// The paravirtual console.
    #[serde(default)]
    pub console: VirtioConsoleConfig,
    /// Limits that several disks share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limit_groups: Option<Vec<RateLimitGroupConfig>>,
    /// Disks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskConfig>>,
    /// Network devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net: Option<Vec<NetConfig>>,
    /// Assigned devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub devices: Option<Vec<DeviceConfig>>,
    /// What concerns the machine as a whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformConfig>,
    /// The source of random numbers.
    #[serde(default)]
    pub rng: RngConfig,
    /// Shared file systems.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fs: Option<Vec<FsConfig>>,
    /// Devices of any type that backends are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generic_vhost_user: Option<Vec<GenericVhostUserConfig>>,
    /// Files in the guest's address space.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pmem: Option<Vec<PmemConfig>>,
    /// The memory balloon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// Whether there is a watchdog.
    #[serde(default)]
    pub watchdog: bool,
    /// The watchdog's place, which is no setting.
    #[serde(skip)]
    pub watchdog_pci: PciCommon,
    /// Sockets between guest and host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// The debug console.
    #[serde(default)]
    pub debug_console: DebugConsoleConfig,
    /// Whether there is a device by which the guest says that its kernel has panicked.
    #[serde(default)]
    pub pvpanic: bool,
    /// Its place, which is no setting.
    #[serde(skip)]
    pub pvpanic_pci: PciCommon,
    /// Nodes of the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub numa: Option<Vec<NumaConfig>>,
    /// PCI segments of which something is said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci_segments: Option<Vec<PciSegmentConfig>>,
    /// The places of the devices by which zones grow, which are no setting.
    #[serde(skip)]
    pub memory_pci: Vec<PciCommon>,
    /// What is not there yet.
    #[serde(flatten)]
    pub absent: AbsentSettings,
}

/// Processors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpusConfig {
    /// vCPUs at boot.
    pub boot_vcpus: u32,
    /// vCPUs that there can be later.
    pub max_vcpus: u32,
    /// How they are grouped; one package of single-thread cores if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology: Option<CpuTopology>,
    /// Hyper-V enlightenments for Windows guests.
    #[serde(default)]
    pub kvm_hyperv: bool,
    /// Most physical address bits that the guest sees.
    #[serde(default = "default_max_phys_bits")]
    pub max_phys_bits: u8,
    /// Host processors that each vCPU may run on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Vec<CpuAffinity>>,
    /// Processor features that are off unless asked for.
    #[serde(default)]
    pub features: CpuFeatures,
    /// Whether the guest may run guests of its own.
    #[serde(default = "default_true")]
    pub nested: bool,
    /// Which vCPUs may share a host core.
    #[serde(default)]
    pub core_scheduling: CoreScheduling,
    /// Processor model.
    #[serde(default)]
    pub profile: CpuProfile,
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot_vcpus: 1,
            max_vcpus: 1,
            topology: None,
            kvm_hyperv: false,
            max_phys_bits: default_max_phys_bits(),
            affinity: None,
            features: CpuFeatures::default(),
            nested: true,
            core_scheduling: CoreScheduling::default(),
            profile: CpuProfile::default(),
        }
    }
}

/// Numbers of each thing in the thing above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuTopology {
    /// Threads of a core.
    pub threads_per_core: u16,
    /// Cores of a die.
    pub cores_per_die: u16,
    /// Dies of a package.
    pub dies_per_package: u16,
    /// Packages of the machine.
    pub packages: u16,
}

/// Host processors of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuAffinity {
    /// The vCPU.
    pub vcpu: u32,
    /// The host processors.
    pub host_cpus: Vec<usize>,
}

/// Processor features that are off unless asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuFeatures {
    /// Advanced matrix extensions.
    #[serde(default)]
    pub amx: bool,
}

/// Which vCPUs may share a host core.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CoreScheduling {
    /// Those of this machine.
    #[default]
    Vm,
    /// None.
    Vcpu,
    /// Any.
    Off,
}

/// Processor model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuProfile {
    /// The host's own.
    #[default]
    Host,
}

/// Memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryConfig {
    /// RAM at boot, in bytes.
    pub size: u64,
    /// Whether the host may merge equal pages.
    #[serde(default)]
    pub mergeable: bool,
    /// How memory is added later.
    #[serde(default)]
    pub hotplug_method: HotplugMethod,
    /// How much can be added later, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// How much of that is there at boot, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplugged_size: Option<u64>,
    /// Whether other processes can map it.
    #[serde(default)]
    pub shared: bool,
    /// Whether it comes from the host's pool of huge pages.
    #[serde(default)]
    pub hugepages: bool,
    /// Size of those pages, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugepage_size: Option<u64>,
    /// Whether all of it is allocated before the guest starts.
    #[serde(default)]
    pub prefault: bool,
    /// Whether swap space is reserved for it.
    #[serde(default)]
    pub reserve: bool,
    /// Whether transparent huge pages are asked for.
    #[serde(default = "default_true")]
    pub thp: bool,
    /// Parts with properties of their own, in place of `size` and the rest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zones: Option<Vec<MemoryZoneConfig>>,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: 512 << 20,
            mergeable: false,
            hotplug_method: HotplugMethod::default(),
            hotplug_size: None,
            hotplugged_size: None,
            shared: false,
            hugepages: false,
            hugepage_size: None,
            prefault: false,
            reserve: false,
            thp: true,
            zones: None,
        }
    }
}

/// How memory is added to a running machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HotplugMethod {
    /// As ACPI memory devices.
    #[default]
    Acpi,
    /// By virtio-mem.
    VirtioMem,
}

/// Where a console or serial port leads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleConfig {
    /// The kind of thing at the other end.
    pub mode: ConsoleMode,
    /// The file, or the name of the terminal once it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// The listening socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

impl ConsoleConfig {
    /// A device that is not there.
    pub fn off() -> Self {
        Self { mode: ConsoleMode::Off, ..Self::default() }
    }
}

/// The kinds of thing that a console can lead to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsoleMode {
    /// There is no such device.
    Off,
    /// A new pseudoterminal.
    Pty,
    /// Standard input and output.
    Tty,
    /// A file.
    File,
    /// A listening Unix socket.
    Socket,
    /// Nothing: output is dropped.
    #[default]
    Null,
}

/// An assigned device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceConfig {
    /// Name that the operator knows it by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Its directory in sysfs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// An open VFIO character device instead of a path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd: Option<i32>,
    /// Whether it is behind the virtual IOMMU.
    #[serde(default, skip_serializing_if = "is_false")]
    pub iommu: bool,
    /// Guest PCI segment.
    #[serde(default)]
    pub pci_segment: u16,
    /// Guest PCI device number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// Group of NVIDIA devices that may access each other's memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub x_nv_gpudirect_clique: Option<u8>,
    /// BARs (0 to 5) whose accesses are all trapped.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub x_exclude_mmap_bars: Vec<u64>,
    /// Whether it is below a root port of its own; as it fits, if absent. Dormouse's own, as all that follows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root_port: Option<bool>,
    /// How deep it may sleep.
    #[serde(default, skip_serializing_if = "is_default")]
    pub power: PowerChoice,
    /// What happens when the host wakes it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub wake: WakePolicy,
    /// How long after the guest's request its power is cut, in milliseconds; the default of its class if absent, as for all that follows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hold_off: Option<u32>,
    /// How many times in a minute its power may be cut; 0: as often as the guest likes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub toggle_rate: Option<u32>,
    /// How many times in a row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub toggle_burst: Option<u32>,
    /// Wakes by the host in a minute beyond which it is left on for longer and longer; 0: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wake_storm: Option<u32>,
    /// How long it may take to come back before the guest is told that it is lost, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_timeout: Option<u32>,
    /// What to do when it does not come back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_lost: Option<LostPolicy>,
}

/// What concerns the machine as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlatformConfig {
    /// PCI segments.
    #[serde(default = "default_pci_segments")]
    pub num_pci_segments: u16,
    /// Segments behind the virtual IOMMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommu_segments: Option<Vec<u16>>,
    /// Address width of the virtual IOMMU.
    #[serde(default = "default_iommu_address_width", rename = "iommu_address_width_bits")]
    pub iommu_address_width: u8,
    /// System serial number in SMBIOS.
    #[serde(alias = "serial_number", skip_serializing_if = "Option::is_none")]
    pub system_serial_number: Option<String>,
    /// System UUID in SMBIOS.
    #[serde(alias = "uuid", skip_serializing_if = "Option::is_none")]
    pub system_uuid: Option<String>,
    /// OEM strings in SMBIOS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oem_strings: Option<Vec<String>>,
    /// System manufacturer in SMBIOS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_manufacturer: Option<String>,
    /// System product name in SMBIOS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_product_name: Option<String>,
    /// System version in SMBIOS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_version: Option<String>,
    /// System family in SMBIOS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_family: Option<String>,
    /// System stock-keeping unit in SMBIOS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_sku_number: Option<String>,
    /// Asset tag of the chassis in SMBIOS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chassis_asset_tag: Option<String>,
    /// Chassis type in SMBIOS; Dormouse's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chassis_type: Option<u8>,
    /// Root ports that are kept for devices that come later; Dormouse's own.
    #[serde(default, skip_serializing_if = "is_default")]
    pub hotplug_ports: u8,
    /// Whether devices are opened through iommufd rather than VFIO groups.
    #[serde(default)]
    pub iommufd: bool,
    /// An open iommufd to use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iommufd_fd: Option<i32>,
    /// Whether the guest's memory is encrypted by Intel TDX.
    #[serde(default, skip_serializing_if = "is_false")]
    pub tdx: bool,
    /// Whether the guest's memory is encrypted by AMD SEV-SNP.
    #[serde(default, skip_serializing_if = "is_false")]
    pub sev_snp: bool,
    /// Whether assigned devices can access each other's BARs. They cannot yet; absent, nobody has asked for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vfio_p2p_dma: Option<bool>,
}

impl Default for PlatformConfig {
    fn default() -> Self {
        Self {
            num_pci_segments: default_pci_segments(),
            iommu_segments: None,
            iommu_address_width: default_iommu_address_width(),
            system_serial_number: None,
            system_uuid: None,
            oem_strings: None,
            system_manufacturer: None,
            system_product_name: None,
            system_version: None,
            system_family: None,
            system_sku_number: None,
            chassis_asset_tag: None,
            chassis_type: None,
            hotplug_ports: 0,
            iommufd: false,
            iommufd_fd: None,
            tdx: false,
            sev_snp: false,
            vfio_p2p_dma: None,
        }
    }
}

fn default_true() -> bool {
    true
}

fn default_max_phys_bits() -> u8 {
    arch::layout::DEFAULT_MAX_PHYS_BITS
}

fn default_pci_segments() -> u16 {
    1
}

fn default_iommu_address_width() -> u8 {
    64
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_false(value: &bool) -> bool {
    !value
}
