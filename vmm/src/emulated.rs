//! The machine's own PCI devices: made from the configuration once, and put on the bus of each machine that follows.
//!
//! What is behind a device (a file, a tap, a socket) is opened here and stays open over reboots of the guest. To add a kind of device: its
//! configuration in `config/`, a line in [`VmConfig::emulated_mut`](crate::config::VmConfig::emulated_mut), and a line in [`plan`].

use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use devices::block::DiskError;
use devices::emulated::EmulatedFunction;
use devices::pvpanic::PvPanic;
use devices::vhost_user::VhostUserError;
use devices::virtio::balloon::Balloon;
use devices::virtio::device::VirtioDevice;
use devices::virtio::discard::Discarder;
use devices::virtio::pci::{VirtioPci, VirtioPciError, VirtioPciSpec};
use devices::virtio::pmem::{MappedFile, Pmem, PmemError};
use devices::virtio::rng::{Rng, RngError};
use devices::virtio::vsock::{Vsock, VsockError};
use devices::virtio::watchdog::{CurrentMachine, Watchdog};
use pci::DevFn;
use pci::bar::BarError;

use crate::assigned::{Surroundings, message_vectors};
use crate::config::VmConfig;
use crate::console::{ConsoleUnitError, make_console};
use crate::disks::{DiskUnit, Groups, make_disk};
use crate::nets::{NetUnitError, make_net};
use crate::panic_events::PanicTeller;
use crate::vhost_user;
use crate::virtio_events::{Allowance, LifeTeller};

/// A device that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum EmulatedError {
    /// The panic device.
    #[error("the panic device: {0}; this is a defect, please report it")]
    PvPanic(#[from] BarError),
    /// The entropy device.
    #[error(transparent)]
    Rng(#[from] RngError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A network device.
    #[error(transparent)]
    Net(#[from] NetUnitError),
    /// The paravirtual console.
    #[error(transparent)]
    Console(#[from] ConsoleUnitError),
    /// The socket device.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// The file behind persistent memory.
    #[error(transparent)]
    Pmem(#[from] PmemError),
    /// Persistent memory that has no place in the guest.
    #[error(
        "device {id}: it cannot be shown to the guest: {source}; give the guest less memory, or the device a smaller size="
    )]
    PmemPlace {
        /// Its name.
        id: String,
        /// What is wrong.
        source: io::Error,
    },
    /// Memory that the machine has not.
    #[error("device {id}: there is no memory zone of this name; this is a defect, please report it")]
    NoZone {
        /// Its name.
        id: String,
    },
    /// A device that a vhost-user backend is.
    #[error("device {id}: {source}")]
    VhostUser {
        /// Its name.
        id: String,
        /// What is wrong.
        source: VhostUserError,
    },
    /// A virtio device that cannot be put on a bus.
    #[error("device {id}: {source}; this is a defect, please report it")]
    Virtio {
        /// Its name.
        id: String,
        /// What is wrong.
        source: VirtioPciError,
    },
}

/// What stands behind a function.
#[derive(Clone, Debug)]
pub enum Model {
    /// A virtio device.
    Virtio(Arc<dyn VirtioDevice>),
    /// The panic device: a new one in each machine.
    PvPanic,
    /// A disk, which can be given another size.
    Disk(Arc<DiskUnit>),
    /// Persistent memory, whose device is a new one in each machine.
    Pmem(Arc<MappedFile>),
    /// What a memory zone grows by: part of each machine's memory.
    Mem,
}

/// One device, whatever machine it is in.
#[derive(Clone, Debug)]
pub struct Unit {
    /// Its name.
    pub id: String,
    /// Its PCI segment.
    pub segment: u16,
    /// Its device number on bus 0, if that is settled.
    pub place: Option<u8>,
    /// What it is.
    pub model: Model,
    /// How much its guest may have told of it.
    pub news: Arc<Allowance>,
}

impl Unit {
    /// Gives it another size.
    ///
    /// # Errors
    /// It cannot have that size, and why.
    pub fn resize(&self, size: u64) -> Result<(), String> {
        match &self.model {
            Model::Virtio(device) => device.resize(size),
            Model::PvPanic | Model::Pmem(_) | Model::Mem => Err("it has no size".to_owned()),
            Model::Disk(disk) => disk.block.resize(size).map_err(|e| e.to_string()),
        }
    }

    /// Whether it can be taken from a machine. Memory is given back by the guest, and the device stays.
    pub fn is_removable(&self) -> bool {
        !matches!(self.model, Model::Mem)
    }

    /// The pseudoterminal behind it.
    pub fn terminal(&self) -> Option<PathBuf> {
        match &self.model {
            Model::Virtio(device) => device.terminal(),
            Model::PvPanic | Model::Disk(_) | Model::Pmem(_) | Model::Mem => None,
        }
    }

    /// Makes the function for a machine, at `devfn` on bus 0.
    ///
    /// # Errors
    /// See [`EmulatedError::Virtio`].
    pub fn function(
        &self,
        devfn: DevFn,
        around: &Surroundings,
    ) -> Result<Arc<dyn EmulatedFunction>, EmulatedError> {
        let device: Arc<dyn VirtioDevice> = match &self.model {
            Model::PvPanic => {
                let sink = Arc::new(PanicTeller(around.events.clone()));
                return Ok(PvPanic::new(&self.id, devfn, Arc::clone(&around.windows.mmio32), sink)?);
            }
            Model::Virtio(device) => Arc::clone(device),
            Model::Disk(disk) => Arc::clone(&disk.block) as _,
            Model::Mem => {
                let found = around.pluggable.iter().find(|mem| mem.name() == self.id);
                let found = found.ok_or_else(|| EmulatedError::NoZone { id: self.id.clone() })?;
                Arc::clone(found) as _
            }
            Model::Pmem(file) => {
                let places = Arc::clone(&around.persistent) as _;
                let pmem = Pmem::new(&self.id, Arc::clone(file), places);
                Arc::new(pmem.map_err(|source| EmulatedError::PmemPlace { id: self.id.clone(), source })?)
            }
        };
        let spec = VirtioPciSpec {
            name: self.id.clone(),
            device,
            devfn,
            memory: around.memory.clone(),
            window: Arc::clone(&around.windows.mmio64),
            msi: message_vectors(around),
            doorbells: Arc::clone(&around.doorbells),
            life: Arc::new(LifeTeller::new(&self.id, around.events.clone(), Arc::clone(&self.news))),
        };
        let wrong = |source| EmulatedError::Virtio { id: self.id.clone(), source };
        Ok(VirtioPci::new(spec).map_err(wrong)?)
    }
}

/// What devices share, whatever machine they are in.
#[derive(Clone, Debug, Default)]
pub struct Shared {
    /// Gives memory back to the host.
    pub discarder: Arc<Discarder>,
    /// The machine that there is now.
    pub machine: Arc<CurrentMachine>,
}

/// Makes one device when it is its turn.
type Make<'a> = Box<dyn FnOnce(&str) -> Result<Model, EmulatedError> + 'a>;

/// How each device of the configuration is made: by its name, in the order of [`VmConfig::emulated_mut`].
fn plan<'a>(config: &'a VmConfig, present: &[Unit], shared: &'a Shared) -> Vec<Make<'a>> {
    let mut plan: Vec<Make<'a>> = Vec::new();
    if config.console.is_there() {
        plan.push(Box::new(|id| Ok(virtio(make_console(id, &config.console)?))));
    }
    let groups = Rc::new(Groups::new(config, present));
    for disk in config.disks.iter().flatten() {
        if disk.vhost_user {
            plan.push(Box::new(|id| vhost_user::disk(id, disk)));
            continue;
        }
        let groups = Rc::clone(&groups);
        plan.push(Box::new(move |id| Ok(Model::Disk(Arc::new(make_disk(id, disk, &groups)?)))));
    }
    for net in config.net.iter().flatten() {
        let make: Make<'a> = if net.vhost_user {
            Box::new(|id| vhost_user::net(id, net))
        } else {
            Box::new(|id| Ok(virtio(make_net(id, net)?)))
        };
        plan.push(make);
    }
    plan.push(Box::new(|id| Ok(virtio(Rng::new(id, &config.rng.src)?))));
    plan.extend(config.fs.iter().flatten().map(|fs| -> Make<'a> { Box::new(|id| vhost_user::fs(id, fs)) }));
    let generic = config.generic_vhost_user.iter().flatten();
    plan.extend(generic.map(|device| -> Make<'a> { Box::new(|id| vhost_user::generic(id, device)) }));
    plan.extend(config.pmem.iter().flatten().map(|pmem| -> Make<'a> {
        Box::new(|_| {
            let file = MappedFile::open(&pmem.file, pmem.size, pmem.discard_writes)?;
            Ok(Model::Pmem(Arc::new(file)))
        })
    }));
    if let Some(vsock) = &config.vsock {
        plan.push(Box::new(|id| Ok(virtio(Vsock::new(id, vsock.cid, &vsock.socket)?))));
    }
    if let Some(balloon) = &config.balloon {
        plan.push(Box::new(|id| {
            let discarder = Arc::clone(&shared.discarder);
            Ok(virtio(Balloon::new(id, balloon.size, balloon.options(), discarder)))
        }));
    }
    if config.watchdog {
        plan.push(Box::new(|id| Ok(virtio(Watchdog::new(id, Arc::clone(&shared.machine))))));
    }
    if config.pvpanic {
        plan.push(Box::new(|_| Ok(Model::PvPanic)));
    }
    plan.extend(config.memory.pluggable_zones().iter().map(|_| -> Make<'a> { Box::new(|_| Ok(Model::Mem)) }));
    plan
}

fn virtio(device: impl VirtioDevice + 'static) -> Model {
    Model::Virtio(Arc::new(device))
}

/// Makes all devices of the configuration whose names are not in `present`. All must have names.
///
/// # Errors
/// The first one that cannot be made; those before it are closed again.
pub fn make_units(config: &VmConfig, present: &[Unit], shared: &Shared) -> Result<Vec<Unit>, EmulatedError> {
    let mut copy = config.clone();
    let names = copy.emulated_mut();
    let new = names.into_iter().zip(plan(config, present, shared)).filter_map(|((_, pci), make)| {
        let id = pci.id.clone()?;
        let is_new = !present.iter().any(|unit| unit.id == id);
        is_new.then_some((id, (pci.pci_segment, pci.pci_device_id), make))
    });
    new.map(|(id, (segment, place), make)| {
        Ok(Unit { model: make(&id)?, id, segment, place, news: Arc::default() })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_device_of_a_configuration_has_its_way_of_being_made() {
        let text = r#"{
            "console": {"mode": "Pty"},
            "memory": {"size": 1073741824, "hotplug_method": "VirtioMem", "hotplug_size": 1073741824},
            "disks": [{"path": "/a"}, {"vhost_user": true, "vhost_socket": "/b"}],
            "net": [{}, {"vhost_user": true, "vhost_socket": "/c"}],
            "fs": [{"tag": "t", "socket": "/d"}],
            "generic_vhost_user": [{"device_type": 26, "socket": "/e", "queue_sizes": [64]}],
            "pmem": [{"file": "/g"}],
            "vsock": {"cid": 3, "socket": "/f"},
            "balloon": {"size": 0},
            "watchdog": true,
            "pvpanic": true
        }"#;
        let mut config: VmConfig = serde_json::from_str(text).unwrap();
        let ways = plan(&config, &[], &Shared::default()).len();
        assert_eq!((config.emulated_mut().len(), ways), (14, 14));
    }
}
