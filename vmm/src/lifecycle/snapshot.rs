//! The VM is written to a directory, or goes on from one.

use log::info;

use super::{Lifecycle, Vm};
use crate::config::{HotplugMethod, MemoryConfig, MemoryRestoreMode, RestoreConfig};
use crate::memory::GuestRam;
use crate::snapshot::directory::Directory;
use crate::snapshot::{Saved, SnapshotError};
use crate::status::VmState;
use crate::vm_error::VmError;

impl Lifecycle {
    /// Writes a snapshot of the paused VM, which stays as it is.
    pub(super) fn snapshot(&mut self, url: &str) -> Result<(), VmError> {
        self.events.tell("vm", "snapshotting");
        // What the guest has let go of is no part of it any more.
        self.devices_released();
        self.processors_answered();
        let paused = self.vm.as_ref().is_some_and(|vm| vm.paused);
        let vm = self.vm.as_ref().ok_or(VmError::NotRunning)?;
        let (running, _) = vm.machine.as_ref().ok_or(VmError::NotRunning)?;
        if let Some(device) = vm.config.devices.iter().flatten().next() {
            let id = device.id.clone().unwrap_or_default();
            return Err(SnapshotError::Assigned { id, path: device.path.clone().unwrap_or_default() }.into());
        }
        if !paused {
            return Err(SnapshotError::NotPaused.into());
        }
        let machine = running.machine();
        let ports: usize = machine.assigned.buses().iter().map(|bus| bus.bridges().count()).sum();
        let reserved = vm.config.platform.as_ref().map_or(0, |platform| platform.hotplug_ports);
        if ports != usize::from(reserved) {
            return Err(SnapshotError::OldPorts.into());
        }
        let mut config = vm.config.clone();
        lay_out(&mut config.memory, &machine.ram);
        let directory = Directory::of_url(url)?;
        directory.save(&config, |memory| running.save(&self.kvm, memory))?;
        info!("the VM has been saved in {}", directory.path().display());
        self.events.tell("vm", "snapshotted");
        Ok(())
    }

    /// Makes a VM that goes on from a snapshot.
    pub fn restore(&mut self, restore: &RestoreConfig) -> Result<(), VmError> {
        self.events.tell("vm", "restoring");
        if self.vm.is_some() {
            return Err(VmError::AlreadyCreated);
        }
        restore.validate()?;
        let directory = Directory::of_url(&restore.source_url)?;
        let mut config = directory.config()?;
        restore.apply(&mut config)?;
        config.validate()?;
        let lazy = restore.memory_restore_mode == MemoryRestoreMode::OnDemand;
        let saved = Saved::open(&directory, lazy)?;
        let (config, lifetime) = self.prepare(config, Some(&saved.machine))?;
        let running = self.start(&config, &lifetime, Some(&saved))?;
        self.vm = Some(Vm { config, machine: Some((running, lifetime)), paused: true, changed: Vec::new() });
        self.show_config();
        self.status.set_state(VmState::Paused);
        info!("the VM has been restored from {}", directory.path().display());
        self.events.tell("vm", "restored");
        if restore.resume { self.resume() } else { Ok(()) }
    }
}

/// The configuration of memory with which a machine has the RAM that this one has, in the same places: what has been added to it stays where
/// memory is added.
fn lay_out(memory: &mut MemoryConfig, ram: &GuestRam) {
    if memory.hotplug_method == HotplugMethod::VirtioMem {
        // What the guest plugs is the devices' to save.
        return;
    }
    let sizes = |number: usize| {
        let boot = ram.zones().get(number).map_or(0, |zone| zone.config.size);
        let added = ram.size(number).saturating_sub(boot);
        (boot, (added > 0).then_some(added))
    };
    match &mut memory.zones {
        None => (memory.size, memory.hotplugged_size) = sizes(0),
        Some(zones) => {
            for (number, zone) in zones.iter_mut().enumerate() {
                (zone.size, zone.hotplugged_size) = sizes(number);
            }
        }
    }
}
