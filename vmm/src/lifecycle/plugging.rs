//! Devices that come and go, and what operators change of them. The configuration follows, so that the guest's next boot finds the same.

use std::sync::Arc;

use vfio_pm::PolicyChange;

use super::{Changed, Lifecycle};
use crate::config::DeviceConfig;
use crate::emulated::{Model, make_units};
use crate::machine::{MachineError, check_some_devices};
use crate::orders::{Addition, Completion};
use crate::status::MachineView;
use crate::vm_error::VmError;

impl Lifecycle {
    pub(super) fn add_device(&mut self, device: DeviceConfig) -> Result<Completion, VmError> {
        let vm = self.vm()?;
        let mut config = vm.config.clone();
        config.devices.get_or_insert_default().push(device);
        config.validate_all_devices()?;
        let Some((running, _)) = &mut vm.machine else {
            vm.config = config;
            self.show_config();
            return Ok(Completion::Plain);
        };
        config.name_devices();
        let added = config.devices.iter().flatten().next_back().cloned();
        let assignments = check_some_devices(&config, added.into_iter().collect())?;
        let assignment = assignments.first().ok_or(VmError::NotRunning)?;
        let moved = running.add_device(assignment)?;
        // After a reboot of the guest it is where it is now.
        if let Some(device) = config.devices.iter_mut().flatten().next_back() {
            device.pci_device_id = Some(moved.place);
            device.root_port = Some(moved.below_port);
        }
        let view = MachineView::new(running.machine());
        vm.config = config;
        self.show_config();
        self.status.set_devices(view);
        Ok(Completion::Device { id: moved.id, bdf: moved.bdf.to_string() })
    }

    pub(super) fn add_emulated(&mut self, addition: Addition) -> Result<Completion, VmError> {
        let vm = self.vm()?;
        let mut config = vm.config.clone();
        let before = config.emulated_mut().len();
        (addition.0)(&mut config);
        if config.emulated_mut().len() == before {
            return Err(VmError::TooManyVsocks);
        }
        // What was wrong before is for the boot to say: `vm.create` took it.
        if vm.machine.is_some() || vm.config.validate_all_devices().is_ok() {
            config.validate_all_devices()?;
        }
        let Some((running, lifetime)) = &mut vm.machine else {
            vm.config = config;
            self.show_config();
            return Ok(Completion::Plain);
        };
        config.name_devices();
        running.assigned_mut().wait_for_closing();
        let unit = make_units(&config, &lifetime.units, &lifetime.shared).map_err(MachineError::from)?.pop();
        let mut unit = unit.ok_or(VmError::NotRunning)?;
        let moved = running.add_emulated(&unit)?;
        // After a reboot of the guest it is where it is now.
        unit.place = Some(moved.place);
        config.set_place(&unit.id, moved.place);
        lifetime.units.push(unit);
        let view = MachineView::new(running.machine());
        vm.config = config;
        self.show_config();
        self.status.set_devices(view);
        Ok(Completion::Device { id: moved.id, bdf: moved.bdf.to_string() })
    }

    pub(super) fn resize_disk(&mut self, id: &str, size: u64) -> Result<(), VmError> {
        let vm = self.vm()?;
        let (_, lifetime) = vm.machine.as_ref().ok_or(VmError::NotRunning)?;
        let unit = lifetime.units.iter().find(|unit| unit.id == id);
        match unit.map(|unit| &unit.model) {
            Some(Model::Disk(disk)) => Ok(disk.block.resize(size)?),
            _ => Err(VmError::UnknownDevice { id: id.to_owned() }),
        }
    }

    pub(super) fn remove_device(&mut self, id: &str) -> Result<(), VmError> {
        let unknown = || VmError::UnknownDevice { id: id.to_owned() };
        let vm = self.vm()?;
        if let Some((running, _)) = &mut vm.machine {
            let result = running.assigned_mut().request_removal(id).ok_or_else(unknown)?;
            return result.map_err(|e| MachineError::from(e).into());
        }
        if !vm.config.remove_device(id) {
            return Err(unknown());
        }
        self.show_config();
        Ok(())
    }

    /// The guest has let go of devices.
    pub(super) fn devices_released(&mut self) {
        let Some(vm) = &mut self.vm else { return };
        let Some((running, lifetime)) = &mut vm.machine else { return };
        let (released, refused) = running.take_releases();
        if let Some((place, status)) = refused {
            running.assigned_mut().refused(place, status);
        }
        for place in released {
            let mut gone = None;
            let events = self.events.clone();
            let status = Arc::clone(&self.status);
            let units = &mut lifetime.units;
            running.assigned_mut().released(
                place,
                |moved| {
                    // The last one to hold it is the one who closes it: it is free when its event says so.
                    units.retain(|unit| unit.id != moved.id);
                    // Whoever looks at the power of a device keeps it open, so it goes from sight first.
                    status.forget_device(&moved.id);
                    gone = Some(moved.id.clone());
                },
                move |moved| {
                    let properties = [("id", moved.id), ("bdf", moved.bdf.to_string())];
                    events.tell_with("vm", "device-removed", properties.into());
                },
            );
            if let Some(id) = gone {
                vm.config.remove_device(&id);
                self.status.set_config(Some(&vm.config));
            }
        }
    }

    pub(super) fn change_policy(&mut self, id: String, change: &PolicyChange) -> Result<Completion, VmError> {
        let vm = self.vm()?;
        let mut devices = vm.config.devices.iter_mut().flatten();
        let Some(device) = devices.find(|device| device.id.as_deref() == Some(id.as_str())) else {
            return Err(VmError::UnknownDevice { id });
        };
        let mut changed = device.clone();
        changed.change_policy(change);
        let in_force = match &vm.machine {
            Some((running, _)) => {
                let result = running.change_policy(&id, change);
                let policy = result.ok_or_else(|| VmError::UnknownDevice { id: id.clone() })??;
                match vm.changed.iter_mut().find(|changed| changed.as_booted.id.as_deref() == Some(&id)) {
                    Some(changed) => changed.change = changed.change.then(change),
                    None => vm.changed.push(Changed { as_booted: device.clone(), change: *change }),
                }
                PolicyChange::from(&policy)
            }
            None => {
                changed.check_policy()?;
                changed.policy_change()
            }
        };
        // So that it outlives a reboot of the guest.
        *device = changed;
        self.show_config();
        Ok(Completion::Policy(in_force))
    }
}
