//! The configuration from the values of command-line options.
//!
//! One function for each option with a grammar of its own. Only the form is checked here; what the values
//! mean together is checked by [`VmConfig::validate`](super::VmConfig::validate).

use super::option_parser::{
    ByteSized, IntegerList, Key, OptionError, OptionValue, Options, StringList, Toggle, Tuples,
};
use super::{
    CoreScheduling, CpuAffinity, CpuFeatures, CpuProfile, CpuTopology, CpusConfig, DeviceConfig,
    HotplugMethod, LostPolicy, MemoryConfig, PlatformConfig, PowerChoice, WakePolicy,
};

use Key::Value;

impl CpusConfig {
    /// From the value of `--cpus`.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        const KEYS: &[Key] = &[
            Value("boot"),
            Value("max"),
            Value("topology"),
            Value("kvm_hyperv"),
            Value("max_phys_bits"),
            Value("affinity"),
            Value("features"),
            Value("nested"),
            Value("core_scheduling"),
            Value("profile"),
        ];
        let options = Options::parse("--cpus", text, KEYS)?;
        let default = Self::default();
        let boot_vcpus = options.get("boot")?.unwrap_or(default.boot_vcpus);
        let affinity = options.get::<Tuples<u32, HostCpus>>("affinity")?.map(|tuples| {
            tuples.0.into_iter().map(|(vcpu, HostCpus(host_cpus))| CpuAffinity { vcpu, host_cpus }).collect()
        });
        Ok(Self {
            boot_vcpus,
            max_vcpus: options.get("max")?.unwrap_or(boot_vcpus),
            topology: options.get("topology")?,
            kvm_hyperv: options.toggle("kvm_hyperv", default.kvm_hyperv)?,
            max_phys_bits: options.get("max_phys_bits")?.unwrap_or(default.max_phys_bits),
            affinity,
            features: options.get_or_default("features")?,
            nested: options.toggle("nested", default.nested)?,
            core_scheduling: options.get_or_default("core_scheduling")?,
            profile: options.get_or_default("profile")?,
        })
    }
}

impl MemoryConfig {
    /// From the value of `--memory`.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        const KEYS: &[Key] = &[
            Value("size"),
            Value("mergeable"),
            Value("shared"),
            Value("hugepages"),
            Value("hugepage_size"),
            Value("hotplug_method"),
            Value("hotplug_size"),
            Value("hotplugged_size"),
            Value("prefault"),
            Value("reserve"),
            Value("thp"),
        ];
        let options = Options::parse("--memory", text, KEYS)?;
        let default = Self::default();
        let size = |key| Ok::<_, OptionError>(options.get::<ByteSized>(key)?.map(|size| size.0));
        Ok(Self {
            size: size("size")?.unwrap_or(default.size),
            mergeable: options.toggle("mergeable", default.mergeable)?,
            hotplug_method: options.get_or_default("hotplug_method")?,
            hotplug_size: size("hotplug_size")?,
            hotplugged_size: size("hotplugged_size")?,
            shared: options.toggle("shared", default.shared)?,
            hugepages: options.toggle("hugepages", default.hugepages)?,
            hugepage_size: size("hugepage_size")?,
            prefault: options.toggle("prefault", default.prefault)?,
            reserve: options.toggle("reserve", default.reserve)?,
            thp: options.toggle("thp", default.thp)?,
            zones: None,
        })
    }
}

impl DeviceConfig {
    /// From one value of `--device`.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        const KEYS: &[Key] = &[
            Value("path"),
            Value("id"),
            Value("root_port"),
            Value("power"),
            Value("wake"),
            Value("hold_off"),
            Value("toggle_rate"),
            Value("toggle_burst"),
            Value("wake_storm"),
            Value("on_timeout"),
            Value("on_lost"),
            Value("iommu"),
            Value("pci_segment"),
            Value("pci_device_id"),
            Value("x_exclude_mmap_bars"),
            Value("x_nv_gpudirect_clique"),
            Value("fd"),
        ];
        let options = Options::parse("--device", text, KEYS)?;
        Ok(Self {
            id: options.get("id")?,
            path: options.get("path")?,
            fd: options.get::<Descriptor>("fd")?.map(|fd| fd.0),
            iommu: options.toggle("iommu", false)?,
            pci_segment: options.get_or_default("pci_segment")?,
            pci_device_id: options.get("pci_device_id")?,
            x_nv_gpudirect_clique: options.get("x_nv_gpudirect_clique")?,
            x_exclude_mmap_bars: options.get_or_default::<IntegerList>("x_exclude_mmap_bars")?.0,
            root_port: options.get::<Toggle>("root_port")?.map(|toggle| toggle.0),
            power: options.get_or_default("power")?,
            wake: options.get_or_default("wake")?,
            hold_off: options.get("hold_off")?,
            toggle_rate: options.get("toggle_rate")?,
            toggle_burst: options.get("toggle_burst")?,
            wake_storm: options.get("wake_storm")?,
            on_timeout: options.get("on_timeout")?,
            on_lost: options.get("on_lost")?,
        })
    }
}

impl PlatformConfig {
    /// From the value of `--platform`.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        const KEYS: &[Key] = &[
            Value("num_pci_segments"),
            Value("iommu_segments"),
            Value("iommu_address_width"),
            Value("iommufd"),
            Value("iommufd_fd"),
            Value("tdx"),
            Value("sev_snp"),
            Value("vfio_p2p_dma"),
            Value("system_manufacturer"),
            Value("system_product_name"),
            Value("system_version"),
            Value("system_serial_number"),
            Value("system_uuid"),
            Value("system_sku_number"),
            Value("system_family"),
            Value("chassis_asset_tag"),
            Value("chassis_type"),
            Value("hotplug_ports"),
            Value("oem_strings"),
            Value("serial_number"),
            Value("uuid"),
        ];
        let options = Options::parse("--platform", text, KEYS)?;
        let default = Self::default();
        // The two keys without "system_" are the older names.
        let either = |key, older| Ok::<_, OptionError>(options.get(key)?.or(options.get(older)?));
        Ok(Self {
            num_pci_segments: options.get("num_pci_segments")?.unwrap_or(default.num_pci_segments),
            iommu_segments: options.get::<Segments>("iommu_segments")?.map(|segments| segments.0),
            iommu_address_width: options.get("iommu_address_width")?.unwrap_or(default.iommu_address_width),
            system_serial_number: either("system_serial_number", "serial_number")?,
            system_uuid: either("system_uuid", "uuid")?,
            oem_strings: options.get::<StringList>("oem_strings")?.map(|list| list.0),
            system_manufacturer: options.get("system_manufacturer")?,
            system_product_name: options.get("system_product_name")?,
            system_version: options.get("system_version")?,
            system_family: options.get("system_family")?,
            system_sku_number: options.get("system_sku_number")?,
            chassis_asset_tag: options.get("chassis_asset_tag")?,
            chassis_type: options.get("chassis_type")?,
            hotplug_ports: options.get_or_default("hotplug_ports")?,
            iommufd: options.toggle("iommufd", default.iommufd)?,
            iommufd_fd: options.get::<Descriptor>("iommufd_fd")?.map(|fd| fd.0),
            tdx: options.toggle("tdx", false)?,
            sev_snp: options.toggle("sev_snp", false)?,
            vfio_p2p_dma: options.get::<Toggle>("vfio_p2p_dma")?.map(|toggle| toggle.0),
        })
    }
}

/// An open file descriptor.
struct Descriptor(i32);

impl OptionValue for Descriptor {
    const EXPECTED: &'static str = "the number of an open file descriptor";

    fn parse(text: &str) -> Option<Self> {
        i32::try_from(u32::parse(text)?).ok().map(Self)
    }
}

/// PCI segment numbers.
struct Segments(Vec<u16>);

impl OptionValue for Segments {
    const EXPECTED: &'static str = "a list of PCI segments such as [0,2]";

    fn parse(text: &str) -> Option<Self> {
        IntegerList::parse(text)?.0.into_iter().map(|n| n.try_into().ok()).collect::<Option<_>>().map(Self)
    }
}

/// Host processor numbers.
struct HostCpus(Vec<usize>);

impl OptionValue for HostCpus {
    const EXPECTED: &'static str = IntegerList::EXPECTED;

    fn parse(text: &str) -> Option<Self> {
        IntegerList::parse(text)?.0.into_iter().map(|n| n.try_into().ok()).collect::<Option<_>>().map(Self)
    }
}

impl OptionValue for CpuTopology {
    const EXPECTED: &'static str = "four integers: threads_per_core:cores_per_die:dies_per_package:packages";

    fn parse(text: &str) -> Option<Self> {
        let parts: Vec<u16> = text.split(':').map(u16::parse).collect::<Option<_>>()?;
        let [threads_per_core, cores_per_die, dies_per_package, packages] = parts.try_into().ok()?;
        Some(Self { threads_per_core, cores_per_die, dies_per_package, packages })
    }
}

impl OptionValue for CpuFeatures {
    const EXPECTED: &'static str = "a list of features; there is one, amx";

    fn parse(text: &str) -> Option<Self> {
        let mut features = Self::default();
        for name in StringList::parse(text)?.0 {
            match name.as_str() {
                "amx" => features.amx = true,
                _ => return None,
            }
        }
        Some(features)
    }
}

/// Names of the variants of an enum.
macro_rules! word_value {
    ($type:ty, $expected:literal, $($word:literal => $variant:ident),*) => {
        impl OptionValue for $type {
            const EXPECTED: &'static str = $expected;

            fn parse(text: &str) -> Option<Self> {
                match text.to_ascii_lowercase().as_str() {
                    $($word => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

word_value!(CoreScheduling, "vm, vcpu or off", "vm" => Vm, "vcpu" => Vcpu, "off" => Off);
word_value!(CpuProfile, "host", "host" => Host);
word_value!(HotplugMethod, "acpi or virtio-mem", "acpi" => Acpi, "virtio-mem" => VirtioMem);
word_value!(LostPolicy, "reset or keep", "reset" => Reset, "keep" => Keep);
word_value!(PowerChoice, "auto, d3hot or off", "auto" => Auto, "d3hot" => D3hot, "off" => Off);
word_value!(
    WakePolicy, "notify, ignore or host-only",
    "notify" => Notify, "ignore" => Ignore, "host-only" => HostOnly
);
