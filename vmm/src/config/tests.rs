//! Tests of the configuration: reading, checking, and the serialised form.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

fn machine() -> VmConfig {
    let payload = PayloadConfig { kernel: Some("k".into()), ..Default::default() };
    VmConfig { payload: Some(payload), ..Default::default() }
}

fn error(change: impl FnOnce(&mut VmConfig)) -> String {
    let mut config = machine();
    change(&mut config);
    config.validate().unwrap_err().to_string()
}

/// A directory with made-up devices in it, removed at the end.
struct Sysfs(PathBuf);

impl Sysfs {
    fn new(names: &[&str]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("dormouse-config-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let root = std::env::temp_dir().join(name);
        for name in names {
            std::fs::create_dir_all(root.join(name)).unwrap();
        }
        Self(root)
    }

    fn devices(&self, names: &[&str]) -> Vec<DeviceConfig> {
        names
            .iter()
            .map(|name| DeviceConfig { path: Some(self.0.join(name)), ..Default::default() })
            .collect()
    }
}

impl Drop for Sysfs {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn the_default_machine_is_valid_once_it_has_a_kernel() {
    machine().validate().unwrap();
    assert!(error(|c| c.payload = None).contains("--kernel"));
}

#[test]
fn what_is_not_there_yet_is_refused_by_name() {
    let platform = |text| error(|c| c.platform = Some(PlatformConfig::parse(text).unwrap()));
    for key in ["iommu_segments=[0]", "iommu_address_width=48", "iommufd_fd=3", "tdx=on", "sev_snp=on"] {
        assert!(platform(key).contains(key.split('=').next().unwrap()), "{key}");
    }
    let device = |text| error(|c| c.devices = Some(vec![DeviceConfig::parse(text).unwrap()]));
    for key in ["fd=3", "iommu=on", "x_nv_gpudirect_clique=0"] {
        assert!(device(key).contains(key.split('=').next().unwrap()), "{key}");
    }
    let console =
        |text: &str| error(|c| c.console = VirtioConsoleConfig::parse(&format!("null,{text}")).unwrap());
    let message = console("iommu=on");
    assert!(message.contains("iommu") && message.contains("not in Dormouse yet"), "{message}");
    assert!(console("pci_device_id=32").contains("pci_device_id=32"));
    let vsock = |text: &str| error(|c| c.vsock = Some(VsockConfig::parse(text).unwrap()));
    assert!(vsock("cid=2,socket=/v").contains("cid=2"));
    assert!(vsock("cid=3,socket=/v,iommu=on").contains("iommu"));
}

#[test]
fn devices_that_are_to_reach_each_other_are_refused_and_one_device_has_no_peer() {
    let sysfs = Sysfs::new(&["0000:01:00.0", "0000:02:00.0"]);
    let platform = |text| Some(PlatformConfig::parse(text).unwrap());
    let two = sysfs.devices(&["0000:01:00.0", "0000:02:00.0"]);
    let message = error(|c| {
        c.devices = Some(two.clone());
        c.platform = platform("vfio_p2p_dma=on");
    });
    assert!(message.contains("vfio_p2p_dma=on") && message.contains("2 assigned devices"), "{message}");
    let mut config = machine();
    config.devices = Some(two);
    for text in ["vfio_p2p_dma=off", "iommufd=off"] {
        config.platform = platform(text);
        config.validate().unwrap();
    }
    config.devices = Some(sysfs.devices(&["0000:01:00.0"]));
    config.platform = platform("vfio_p2p_dma=on");
    config.validate().unwrap();
}

#[test]
fn defaults_spelled_out_are_accepted() {
    let mut config = machine();
    config.cpus = CpusConfig::parse(
        "boot=4,max=4,topology=2:2:1:1,kvm_hyperv=off,max_phys_bits=46,features=[],nested=on,\
         core_scheduling=vm,profile=host",
    )
    .unwrap();
    config.memory = MemoryConfig::parse(
        "size=64M,mergeable=off,shared=on,hugepages=off,hotplug_method=acpi,hotplug_size=0,prefault=on,\
         reserve=off,thp=off",
    )
    .unwrap();
    config.platform = Some(
        PlatformConfig::parse(
            "num_pci_segments=1,iommu_address_width=64,iommufd=on,vfio_p2p_dma=on,tdx=off,sev_snp=off",
        )
        .unwrap(),
    );
    config.console = VirtioConsoleConfig::parse("off,iommu=off,pci_segment=0").unwrap();
    config.validate().unwrap();
    assert_eq!(config.cpus.arch_topology().unwrap().vcpus(), 4);
}

#[test]
fn impossible_processors_and_memory_are_refused() {
    let cpus = |text: &str| error(|c| c.cpus = CpusConfig::parse(text).unwrap());
    assert!(cpus("boot=0").contains("boot=0"));
    for count in ["256", "300", "65536"] {
        let message = cpus(&format!("boot={count}"));
        assert!(message.contains(&format!("boot={count}")) && message.contains("255"), "{message}");
    }
    CpusConfig::parse("boot=255").unwrap().arch_topology().unwrap();
    assert!(cpus("boot=195,topology=3:65:1:1").contains("APIC ID 258"));
    assert!(cpus("boot=3,topology=2:2:1:1").contains("4 vCPUs"));
    assert!(cpus("max_phys_bits=64").contains("max_phys_bits=64"));
    let memory = |text| error(|c| c.memory = MemoryConfig::parse(text).unwrap());
    assert!(memory("size=63M").contains("64M"));
    assert!(memory("size=67108865").contains("4096"));
    assert!(CpusConfig::parse("topology=1:2:3").is_err());
}

#[test]
fn a_device_is_given_by_its_directory_in_sysfs() {
    let sysfs = Sysfs::new(&["0000:01:00.0", "0000:01:00.1", "not-a-device", "01:00.0"]);
    let mut config = machine();
    config.devices = Some(sysfs.devices(&["0000:01:00.0/", "0000:01:00.1"]));
    config.validate().unwrap();
    let (path, bdf) = config.devices.as_ref().unwrap()[0].host_device().unwrap();
    assert_eq!(
        (path.file_name().unwrap().to_str(), bdf.to_string().as_str()),
        (Some("0000:01:00.0"), "0000:01:00.0")
    );

    for name in ["not-a-device", "01:00.0"] {
        assert!(error(|c| c.devices = Some(sysfs.devices(&[name]))).contains("not a PCI device"), "{name}");
    }
    assert!(error(|c| c.devices = Some(sysfs.devices(&["0000:02:00.0"]))).contains("no such device"));
    assert!(error(|c| c.devices = Some(vec![DeviceConfig::default()])).contains("path="));
}

#[test]
fn the_same_device_twice_is_refused_even_by_two_paths() {
    let sysfs = Sysfs::new(&["0000:01:00.0"]);
    std::os::unix::fs::symlink(sysfs.0.join("0000:01:00.0"), sysfs.0.join("link")).unwrap();
    assert!(error(|c| c.devices = Some(sysfs.devices(&["0000:01:00.0", "link"]))).contains("twice"));
}

#[test]
fn device_names_and_numbers_are_checked() {
    let sysfs = Sysfs::new(&["0000:01:00.0", "0000:02:00.0"]);
    let with = |change: fn(&mut DeviceConfig)| {
        let mut devices = sysfs.devices(&["0000:01:00.0", "0000:02:00.0"]);
        devices.iter_mut().for_each(change);
        error(|c| c.devices = Some(devices))
    };
    assert!(with(|d| d.id = Some("gpu".into())).contains("twice"));
    assert!(with(|d| d.id = Some("__gpu".into())).contains("reserved"));
    assert!(with(|d| d.pci_device_id = Some(32)).contains("pci_device_id=32"));
    assert!(with(|d| d.pci_device_id = Some(0)).contains("pci_device_id=0"));
    assert!(with(|d| d.x_exclude_mmap_bars = vec![6]).contains("BAR 6"));
    assert!(with(|d| d.on_timeout = Some(20_000)).contains("on_timeout=20000"));
    assert!(with(|d| d.toggle_burst = Some(0)).contains("toggle_burst=0"));
}

#[test]
fn smbios_strings_reach_the_machine() {
    let text = "uuid=00112233-4455-6677-8899-aabbccddeeff,serial_number=s,oem_strings=[\"a,b\",c]";
    let identity = PlatformConfig::parse(text).unwrap().identity().unwrap();
    assert_eq!(identity.uuid.unwrap()[..5], [0x00, 0x11, 0x22, 0x33, 0x44]);
    assert_eq!(
        (identity.serial_number.as_deref(), identity.oem_strings),
        (Some("s"), vec!["a,b".into(), "c".into()])
    );
    for bad in [
        "x",
        "00112233445566778899aabbccddeeff",
        "0011223é-4455-6677-8899-aabbccddeef",
        "+0112233-4455-6677-8899-aabbccddeeff",
    ] {
        let config = PlatformConfig { system_uuid: Some(bad.into()), ..Default::default() };
        assert!(config.identity().is_err(), "{bad}");
    }
    assert_eq!(PlatformConfig::parse("chassis_type=10").unwrap().identity().unwrap().chassis_type, Some(10));
    for bad in ["chassis_type=0", "chassis_type=37"] {
        let message = error(|config| config.platform = Some(PlatformConfig::parse(bad).unwrap()));
        assert!(message.contains(bad) && message.contains("1 to 36"), "{message}");
    }
}

#[test]
fn a_console_leads_to_exactly_one_place() {
    let parse = |text| ConsoleConfig::parse("--serial", text);
    assert_eq!(parse("file=/tmp/x").unwrap().mode, ConsoleMode::File);
    assert_eq!(parse("socket=/tmp/x").unwrap().socket, Some("/tmp/x".into()));
    for bad in ["", "tty,null", "file=", "disk", "tty=1", "tty,iommu=on"] {
        assert!(parse(bad).is_err(), "{bad}");
    }
    let message = parse("disk").unwrap_err().to_string();
    assert_eq!(
        message,
        "--serial: 'disk' is not possible; give one of off, null, pty, tty, file=PATH, socket=PATH"
    );
}

#[test]
fn the_serialised_form_is_cloud_hypervisors() {
    let json = r#"{
        "cpus": {"boot_vcpus": 2, "max_vcpus": 2, "unknown": 1}, "memory": {"size": 134217728},
        "payload": {"kernel": "/k", "firmware": null}, "serial": {"mode": "File", "file": "/s"},
        "console": {"mode": "Off", "iommu": false}, "rng": {"src": "/dev/urandom"},
        "devices": [{"path": "/sys/bus/pci/devices/0000:01:00.0", "id": null}],
        "platform": {"uuid": "u", "iommu_address_width_bits": 64}
    }"#;
    let config: VmConfig = serde_json::from_str(json).unwrap();
    assert_eq!((config.cpus.boot_vcpus, config.cpus.max_phys_bits, config.memory.thp), (2, 46, true));
    assert_eq!(config.platform.as_ref().unwrap().system_uuid.as_deref(), Some("u"));
    let text = serde_json::to_string(&config).unwrap();
    assert!(
        text.contains(r#""devices":[{"path":"/sys/bus/pci/devices/0000:01:00.0","pci_segment":0}]"#),
        "{text}"
    );
    assert_eq!(serde_json::from_str::<VmConfig>(&text).unwrap(), config);
}
