//! What a scenario asks for: the emulated host (slots, devices, firmware, kernel), declared as plain values.
//!
//! Two scenarios with equal [`HostSpec`]s share one boot of the host.

use std::fmt;

/// Device number of the first root port on bus 0.
pub const FIRST_PORT: usize = 0x10;

/// One of the four Debian kernels the test bed knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kernel {
    /// 6.12, for clouds: KVM, VFIO, IOMMU and NVMe, no NIC or GPU drivers.
    Cloud6_12,
    /// 6.12, for PCs: every driver.
    Generic6_12,
    /// 6.1, for clouds.
    Cloud6_1,
    /// 6.1, for PCs.
    Generic6_1,
}

impl Kernel {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Cloud6_12, Self::Generic6_12, Self::Cloud6_1, Self::Generic6_1];

    /// Short name, used for files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cloud6_12 => "6.12-cloud",
            Self::Generic6_12 => "6.12",
            Self::Cloud6_1 => "6.1-cloud",
            Self::Generic6_1 => "6.1",
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A device that QEMU emulates on the host, to be assigned to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Device {
    /// Virtio GPU: the assigned GPU.
    Gpu,
    /// Intel 82574 network card.
    E1000e,
    /// Intel 82576 network card.
    Igb,
    /// NVMe drive of 64 MiB, empty at each boot of the host.
    Nvme,
    /// A display without a power management capability.
    Bochs,
    /// A USB controller without one.
    Xhci,
}

impl Device {
    /// The guest kernel modules that drive it.
    pub fn modules(self) -> &'static [&'static str] {
        match self {
            Self::Gpu => &["virtio_pci", "virtio_gpu"],
            Self::E1000e => &["e1000e"],
            Self::Igb => &["igb"],
            Self::Nvme => &["nvme"],
            Self::Bochs | Self::Xhci => &[],
        }
    }

    /// Name of the device, for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gpu => "virtio-gpu",
            Self::E1000e => "e1000e",
            Self::Igb => "igb",
            Self::Nvme => "nvme",
            Self::Bochs => "bochs-display",
            Self::Xhci => "qemu-xhci",
        }
    }
}

/// One PCIe slot of the host: a root port and the functions below it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot {
    /// Functions 0, 1, ...
    pub functions: Vec<Device>,
    /// Whether the firmware can cut the slot's power (`_PR0` and `_PR3` on each function).
    pub power: bool,
    /// How long the firmware's `_ON` takes, in milliseconds.
    pub on_delay_ms: u32,
    /// How a device can be pulled out of it and put in while the host runs.
    pub hotplug: Hotplug,
    /// Whether the firmware's `_ON` leaves the slot cut off from its port when the host has asked for it
    /// ([`Host::break_power`](crate::host::Host::break_power)).
    pub fragile: bool,
}

/// How a slot is hotplugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hotplug {
    /// Not at all.
    None,
    /// By the port itself (PCI Express).
    Native,
    /// By the firmware, which calls its functions ejectable (`_EJ0`). QEMU has that for all slots of a machine.
    Firmware,
}

impl Slot {
    /// A slot with one function and a power resource that acts at once.
    pub fn new(device: Device) -> Self {
        Self::with(&[device])
    }

    /// A slot with several functions that share its power.
    pub fn with(functions: &[Device]) -> Self {
        Self {
            functions: functions.to_vec(),
            power: true,
            on_delay_ms: 0,
            hotplug: Hotplug::None,
            fragile: false,
        }
    }

    /// The same slot with an `_ON` that takes `milliseconds`.
    pub fn on_delay(mut self, milliseconds: u32) -> Self {
        self.on_delay_ms = milliseconds;
        self
    }
}

/// An emulated host. Slot `n` is behind root port `00:(10+n).0` and its function `f` is `0000:(n+1):00.f`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostSpec {
    /// The host's kernel; one of the cloud ones.
    pub kernel: Kernel,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// Virtual processors.
    pub cpus: u32,
    /// Huge pages of 1 GiB that it sets aside when it boots, out of its RAM.
    pub gigantic_pages: u32,
    /// Its slots.
    pub slots: Vec<Slot>,
    /// Whether the machine has an IOMMU.
    pub iommu: bool,
    /// Whether it has a UEFI firmware for its guests, and an NVMe drive of its has a file system that this boots.
    pub uefi: bool,
    /// Virtual time by counted instructions: the same figures on every machine, slow, for benchmarks.
    pub deterministic: bool,
    /// Whether it has the disks with Debian (`rootfs.rs`): images for guests in `/images`, and programs that VMs are
    /// tried against.
    pub debian: bool,
}

impl HostSpec {
    /// A host with the 6.12 kernel, 1 processor, 4 GiB and the given slots. One, because QEMU's emulation of nested
    /// paging now and then breaks a guest's memory while a second one runs (docs/testing.md).
    pub fn new(slots: &[Slot]) -> Self {
        Self {
            kernel: Kernel::Cloud6_12,
            memory_mib: 4096,
            cpus: 1,
            gigantic_pages: 0,
            slots: slots.to_vec(),
            iommu: true,
            uefi: false,
            deterministic: false,
            debian: false,
        }
    }

    /// A host with one device in each slot.
    pub fn devices(devices: &[Device]) -> Self {
        Self::new(&devices.iter().map(|device| Slot::new(*device)).collect::<Vec<_>>())
    }

    /// The same host under another kernel.
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = kernel;
        self
    }

    /// The same host with other processors: for what must really happen at once.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// The same host with other RAM.
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// The same host with huge pages of 1 GiB: as much RAM more.
    pub fn gigantic_pages(mut self, count: u32) -> Self {
        self.gigantic_pages = count;
        self.memory_mib += count * 1024;
        self
    }

    /// The same host with the disks with Debian.
    pub fn debian(mut self) -> Self {
        self.debian = true;
        self
    }

    /// Host addresses of all functions, in slot order.
    pub fn addresses(&self) -> Vec<String> {
        let mut all = Vec::new();
        for (slot, spec) in self.slots.iter().enumerate() {
            for function in 0..spec.functions.len() {
                all.push(address(slot, function));
            }
        }
        all
    }

    /// Whether the firmware hotplugs the slots of this machine.
    pub fn firmware_hotplug(&self) -> bool {
        self.slots.iter().any(|slot| slot.hotplug == Hotplug::Firmware)
    }

    /// The device at host address `bdf`.
    pub fn device_at(&self, bdf: &str) -> Option<Device> {
        self.slots.iter().enumerate().find_map(|(slot, spec)| {
            (0..spec.functions.len()).find(|f| address(slot, *f) == bdf).map(|f| spec.functions[f])
        })
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        let slots: Vec<String> = self
            .slots
            .iter()
            .map(|slot| {
                let mut text =
                    slot.functions.iter().map(|device| device.name()).collect::<Vec<_>>().join("+");
                if !slot.power {
                    text.push_str(" (no power resource)");
                }
                match slot.hotplug {
                    Hotplug::None => {}
                    Hotplug::Native => text.push_str(" (hotplug)"),
                    Hotplug::Firmware => text.push_str(" (ejectable)"),
                }
                if slot.fragile {
                    text.push_str(" (_ON may fail)");
                }
                if slot.on_delay_ms > 0 {
                    text.push_str(&format!(" (_ON {} ms)", slot.on_delay_ms));
                }
                text
            })
            .collect();
        let devices = if slots.is_empty() { "no devices".to_owned() } else { slots.join(", ") };
        let debian = if self.debian { ", disks with Debian" } else { "" };
        let pages = match self.gigantic_pages {
            0 => String::new(),
            count => format!(", {count} huge pages of 1 GiB"),
        };
        format!(
            "Linux {}, {} CPUs, {} MiB{pages}, {devices}{debian}",
            self.kernel, self.cpus, self.memory_mib
        )
    }
}

/// Host address of the root port of `slot`.
pub fn port(slot: usize) -> String {
    format!("0000:00:{:02x}.0", FIRST_PORT + slot)
}

/// Host address of `function` in `slot`, both from 0. The firmware numbers the buses in slot order.
pub fn address(slot: usize, function: usize) -> String {
    format!("0000:{:02x}:00.{function}", slot + 1)
}
