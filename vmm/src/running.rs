//! A machine that runs: waiting for what happens to it, what an operator does to it, and taking it apart in order.

use std::fs::File;

use acpi::event_abi::{Event, PlaceAddress};
use devices::rtc::Rtc;
use kvm_bindings::kvm_clock_data;
use kvm_ioctls::Kvm;
use log::{debug, info, warn};
use vfio_pm::{ControlError, Policy, PolicyChange};

use crate::assigned::Assignment;
use crate::emulated::Unit;
use crate::event_loop::Outcome;
use crate::hotplug::{AssignedDevices, Moved};
use crate::hypervisor;
use crate::machine::{Lifetime, Machine, MachineError};
use crate::processors::ResizeError;
use crate::snapshot::vcpu::VcpuReader;
use crate::snapshot::{MachineState, SnapshotError, ram};
use crate::vcpu::Vcpus;

/// A machine whose vCPUs run or are paused.
pub struct Running {
    vcpus: Option<Vcpus>,
    /// The guest's clock while it is paused.
    stopped_clock: Option<kvm_clock_data>,
    machine: Machine,
}

impl Running {
    /// Starts the vCPUs. With a `stopped_clock` they are paused: the guest goes on with that in [`Self::resume`].
    pub fn start(mut machine: Machine, stopped_clock: Option<kvm_clock_data>) -> Result<Self, MachineError> {
        let vcpus = std::mem::take(&mut machine.vcpus);
        let paused = stopped_clock.is_some();
        let vcpus = Vcpus::start(vcpus, &machine.context, machine.placement.clone(), paused)?;
        info!("the guest {}", if paused { "is paused where it was saved" } else { "runs" });
        Ok(Self { vcpus: Some(vcpus), stopped_clock, machine })
    }

    /// Writes the content of memory, which is what the guest had when it was paused, and returns all else.
    ///
    /// # Errors
    /// It is not paused, or cannot be saved.
    pub fn save(&self, kvm: &Kvm, memory: &File) -> Result<MachineState, SnapshotError> {
        let (Some(clock), Some(vcpus)) = (self.stopped_clock, &self.vcpus) else {
            return Err(SnapshotError::NotPaused);
        };
        let vcpus = vcpus.read(VcpuReader::new(kvm, &self.machine.vm)?)?;
        let ranges = ram::ranges(&self.machine.ram);
        let state = MachineState::save(&self.machine, vcpus, clock, ranges)?;
        ram::write(&self.machine.ram, &state.ram, memory)
            .map_err(|source| SnapshotError::Memory { source })?;
        Ok(state)
    }

    /// Waits until the machine is to stop or there are orders.
    pub fn wait(&mut self) -> Result<Outcome, MachineError> {
        Ok(self.machine.event_loop.run()?)
    }

    /// Takes the vCPUs out of the guest, stops its clock, and keeps wakes of devices for later. Devices keep their power state.
    pub fn pause(&mut self) {
        self.machine.assigned.slots().for_each(|slot| slot.domain.pause());
        if let Some(vcpus) = &self.vcpus {
            vcpus.pause();
        }
        self.machine.assigned.emulated().for_each(|function| function.pause());
        self.stopped_clock = match self.machine.vm.get_clock() {
            Ok(clock) => Some(clock),
            Err(e) => {
                warn!("the guest's clock goes on while it is paused: {e}");
                None
            }
        };
    }

    /// Undoes [`Self::pause`].
    pub fn resume(&mut self) {
        if let Some(mut clock) = self.stopped_clock.take() {
            // Only the time itself goes back.
            clock.flags = 0;
            if let Err(e) = self.machine.vm.set_clock(&clock) {
                warn!("the guest's clock jumps over the pause: {e}");
            }
        }
        self.machine.assigned.emulated().for_each(|function| function.resume());
        if let Some(vcpus) = &self.vcpus {
            vcpus.resume();
        }
        self.machine.assigned.slots().for_each(|slot| slot.domain.resume());
    }

    /// Asks the guest to switch itself off.
    pub fn press_power_button(&self) {
        self.machine.platform.event_device.raise(Event::PowerButton);
    }

    /// Sends a non-maskable interrupt to the first vCPU.
    pub fn nmi(&self) {
        if let Some(vcpus) = &self.vcpus {
            vcpus.nmi();
        }
    }

    /// Changes how the power of the function with this name is handled; `None` if there is none.
    pub fn change_policy(&self, id: &str, change: &PolicyChange) -> Option<Result<Policy, ControlError>> {
        self.machine.assigned.slots().find_map(|slot| {
            let place = slot.functions.iter().find(|place| place.id == id)?;
            Some(slot.domain.change_policy(place.host, change))
        })
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The machine, for what is added to it.
    pub fn machine_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }

    /// Adds an assigned device.
    ///
    /// # Errors
    /// See [`AssignedDevices::add`](crate::hotplug::AssignedDevices::add).
    pub fn add_device(&mut self, assignment: &Assignment) -> Result<Moved, MachineError> {
        let Machine { assigned, ram, vm, .. } = &mut self.machine;
        assigned.add(assignment, &ram.fixed()?, || Ok(hypervisor::create_vfio_device(vm)?))
    }

    /// Adds one of the machine's own devices.
    ///
    /// # Errors
    /// See [`AssignedDevices::add_emulated`](crate::hotplug::AssignedDevices::add_emulated).
    pub fn add_emulated(&mut self, unit: &Unit) -> Result<Moved, MachineError> {
        self.machine.assigned.add_emulated(unit)
    }

    /// Changes the number of vCPUs.
    ///
    /// # Errors
    /// See [`ProcessorPool::resize`](crate::processors::ProcessorPool::resize).
    pub fn resize_vcpus(&mut self, wanted: u32) -> Result<(), ResizeError> {
        match &mut self.vcpus {
            Some(vcpus) => self.machine.processors.resize(wanted, vcpus),
            None => Ok(()),
        }
    }

    /// What the guest has said since the last look of vCPUs that are to go: how many there are to be now.
    pub fn take_processor_answers(&mut self) -> Option<u32> {
        self.machine.processors.take_answers(self.vcpus.as_mut()?)
    }

    /// The assigned devices.
    pub fn assigned_mut(&mut self) -> &mut AssignedDevices {
        &mut self.machine.assigned
    }

    /// What the guest has said since the last look of devices that it is to let go of: places, and one with why not.
    pub fn take_releases(&self) -> (Vec<PlaceAddress>, Option<(PlaceAddress, u8)>) {
        self.machine.context.control.take_releases()
    }

    /// Takes the machine apart, and keeps in `lifetime` what the next one is to have of it.
    pub fn end(mut self, lifetime: &mut Lifetime) {
        if let Some(vcpus) = self.vcpus.take() {
            vcpus.stop();
        }
        lifetime.battery = Rtc::battery(&self.machine.platform.rtc);
        lifetime.latched.clear();
        for slot in self.machine.assigned.slots() {
            slot.domain.shutdown();
            lifetime.latched.extend(slot.domain.report().first().and_then(|report| report.latched_by));
        }
        self.machine.assigned.emulated().for_each(|function| function.shutdown());
        debug!("the machine is taken apart: RAM {:?}", self.machine.ram);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Only where `end` was not called.
        if let Some(vcpus) = self.vcpus.take() {
            vcpus.stop();
        }
    }
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running").field("paused", &self.stopped_clock.is_some()).finish_non_exhaustive()
    }
}
