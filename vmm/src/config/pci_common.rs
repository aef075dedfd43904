//! What all devices that are PCI functions of the machine's own have in common: a name and a place.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::option_parser::{Key, OptionError, Options};
use super::validate::refuse;
use super::{ConfigError, VmConfig};

/// Name and place of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciCommon {
    /// Name that the operator knows it by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Whether it is behind the virtual IOMMU.
    #[serde(default, skip_serializing_if = "super::is_false")]
    pub iommu: bool,
    /// Guest PCI segment.
    #[serde(default)]
    pub pci_segment: u16,
    /// Guest PCI device number on bus 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
}

impl PciCommon {
    /// Its keys on the command line.
    pub const KEYS: [Key; 4] =
        [Key::Value("id"), Key::Value("iommu"), Key::Value("pci_segment"), Key::Value("pci_device_id")];

    /// From the keys of an option.
    ///
    /// # Errors
    /// A value of the wrong form.
    pub fn from_options(options: &Options) -> Result<Self, OptionError> {
        Ok(Self {
            id: options.get("id")?,
            iommu: options.toggle("iommu", false)?,
            pci_segment: options.get_or_default("pci_segment")?,
            pci_device_id: options.get("pci_device_id")?,
        })
    }
}

/// How a device is called if the user has no name for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DefaultName {
    /// This and a number.
    Numbered(&'static str),
    /// This: there is only one.
    Only(&'static str),
}

use DefaultName::{Numbered, Only};

impl VmConfig {
    /// The PCI devices of the machine's own, with their default names, in the order in which they get places.
    pub fn emulated_mut(&mut self) -> Vec<(DefaultName, &mut PciCommon)> {
        let mut devices = Vec::new();
        if self.console.is_there() {
            devices.push((Only("__console"), &mut self.console.pci));
        }
        devices.extend(self.disks.iter_mut().flatten().map(|disk| (Numbered("_disk"), &mut disk.pci)));
        devices.extend(self.net.iter_mut().flatten().map(|net| (Numbered("_net"), &mut net.pci)));
        devices.push((Only("__rng"), &mut self.rng.pci));
        devices.extend(self.fs.iter_mut().flatten().map(|fs| (Numbered("_fs"), &mut fs.pci)));
        let generic = self.generic_vhost_user.iter_mut().flatten();
        devices.extend(generic.map(|device| (Numbered("_generic_vhost_user"), &mut device.pci)));
        devices.extend(self.pmem.iter_mut().flatten().map(|pmem| (Numbered("_pmem"), &mut pmem.pci)));
        devices.extend(self.vsock.iter_mut().map(|vsock| (Numbered("_vsock"), &mut vsock.pci)));
        devices.extend(self.balloon.iter_mut().map(|balloon| (Only("__balloon"), &mut balloon.pci)));
        if self.watchdog {
            devices.push((Only("__watchdog"), &mut self.watchdog_pci));
        }
        if self.pvpanic {
            devices.push((Only("__pvpanic"), &mut self.pvpanic_pci));
        }
        let zones = self.memory.pluggable_zones();
        self.memory_pci.resize_with(zones.len(), PciCommon::default);
        for (zone, pci) in zones.into_iter().zip(&mut self.memory_pci) {
            pci.id = Some(zone);
            devices.push((Numbered("_mem"), pci));
        }
        devices
    }

    /// Takes out a device of those of [`Self::emulated_mut`]; whether there was one of that name.
    pub(super) fn remove_emulated(&mut self, id: &str) -> bool {
        fn remove<T>(list: &mut Option<Vec<T>>, id: &str, pci: impl Fn(&T) -> &PciCommon) -> bool {
            let Some(list) = list else { return false };
            let before = list.len();
            list.retain(|device| pci(device).id.as_deref() != Some(id));
            list.len() < before
        }
        match id {
            "__balloon" => self.balloon.take().is_some(),
            "__watchdog" => std::mem::take(&mut self.watchdog),
            "__pvpanic" => std::mem::take(&mut self.pvpanic),
            _ => {
                remove(&mut self.disks, id, |disk| &disk.pci)
                    || remove(&mut self.net, id, |net| &net.pci)
                    || remove(&mut self.fs, id, |fs| &fs.pci)
                    || remove(&mut self.generic_vhost_user, id, |device| &device.pci)
                    || remove(&mut self.pmem, id, |pmem| &pmem.pci)
                    || self.vsock.take_if(|vsock| vsock.pci.id.as_deref() == Some(id)).is_some()
            }
        }
    }

    /// Gives every device that has no name one of Cloud Hypervisor's form.
    pub fn name_devices(&mut self) {
        let assigned = self.devices.iter().flatten().filter_map(|device| device.id.clone());
        let mut taken: HashSet<String> = assigned.collect();
        taken.extend(self.emulated_mut().iter().filter_map(|(_, pci)| pci.id.clone()));
        let mut name = |prefix: &str| {
            (0_u32..).map(|number| format!("{prefix}{number}")).find(|name| taken.insert(name.clone()))
        };
        for device in self.devices.iter_mut().flatten().filter(|device| device.id.is_none()) {
            device.id = name("_vfio");
        }
        for (default, pci) in self.emulated_mut() {
            match default {
                Numbered(prefix) if pci.id.is_none() => pci.id = name(prefix),
                Only(name) => pci.id = Some(name.to_owned()),
                Numbered(_) => {}
            }
        }
    }

    /// Notes where a device has been put, so that it is there again after a reboot of the guest.
    pub fn set_place(&mut self, id: &str, place: u8) {
        let mut devices = self.emulated_mut();
        let device = devices.iter_mut().find(|(_, pci)| pci.id.as_deref() == Some(id));
        if let Some((_, pci)) = device {
            pci.pci_device_id = Some(place);
        }
    }

    /// Checks names and places of all devices.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate_names_and_places(&self) -> Result<(), ConfigError> {
        let mut copy = self.clone();
        for device in self.devices.iter().flatten() {
            self.validate_segment("--device", device.pci_segment)?;
        }
        let devices = self.devices.iter().flatten();
        let mut ids: HashSet<String> = devices.filter_map(|device| device.id.clone()).collect();
        for (default, pci) in copy.emulated_mut() {
            refuse(pci.iommu, "iommu=on of a device (a virtual IOMMU)")?;
            let name = match (&pci.id, default) {
                (Some(id), _) => format!("device {id}:"),
                (None, Numbered(kind) | Only(kind)) => {
                    format!("a device ({}):", kind.trim_start_matches('_'))
                }
            };
            self.validate_segment(&name, pci.pci_segment)?;
            if let Some(number) = pci.pci_device_id.filter(|number| !(1..32).contains(number)) {
                return Err(ConfigError::DeviceNumber { number });
            }
            let Some(id) = pci.id.take() else { continue };
            // A machine that was booted once has these names written into its configuration.
            if id.starts_with("__") && !matches!(default, Only(name) if name == id) {
                return Err(ConfigError::ReservedId { id });
            }
            if !ids.insert(id.clone()) {
                return Err(ConfigError::SameId { id });
            }
        }
        Ok(())
    }
}
