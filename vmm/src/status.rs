//! What may be known of the machine at any moment, by any thread: the API reads it while the main thread boots or waits.
//!
//! Nobody takes anything out of here that keeps a device open: what is read of a machine is read under the lock, which
//! the main thread takes before it takes the machine apart.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::emulated::EmulatedFunction;
use pci::bar::BarKind;
use pci::{Bdf, DevFn};
use serde::Serialize;
use vfio_pm::{ControlError, PowerDomain, Snapshot};

use crate::config::VmConfig;
use crate::machine::Machine;

/// Cloud Hypervisor's states of a VM. Clients know no others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum VmState {
    /// There is a configuration and no machine.
    Created,
    /// The guest runs.
    Running,
    /// The guest's vCPUs are stopped.
    Paused,
}

/// A BAR's place in the guest when it started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BarPlace {
    /// Which BAR.
    pub index: u8,
    /// Guest address or port.
    pub base: u64,
    /// Bytes or ports.
    pub size: u64,
    /// What it decodes.
    pub kind: BarKind,
}

/// An assigned function of the running machine.
#[derive(Debug)]
pub struct DeviceView {
    /// Name that the operator knows it by.
    pub id: String,
    /// Address on the host.
    pub host: Bdf,
    /// Address in the guest when it started.
    pub guest: Bdf,
    /// The root port above it, on bus 0 of the guest; `None` if it is on bus 0 itself.
    pub port: Option<Bdf>,
    /// Its BARs.
    pub bars: Vec<BarPlace>,
    domain: Arc<PowerDomain>,
}

impl DeviceView {
    /// What its power does and has done; from memory, not from the device.
    pub fn power(&self) -> Option<Snapshot> {
        self.domain.report().into_iter().find(|report| report.bdf == self.host).map(Snapshot::from)
    }
}

/// The running machine, as far as others may look.
#[derive(Debug)]
pub struct MachineView {
    /// Assigned functions, in the order of their places in the guest.
    pub devices: Vec<DeviceView>,
    /// The machine's own functions, likewise.
    pub emulated: Vec<EmulatedView>,
}

/// One of the machine's own functions.
#[derive(Clone, Debug)]
pub struct EmulatedView {
    /// Its name.
    pub id: String,
    /// Its address in the guest.
    pub guest: Bdf,
    /// The function.
    pub function: Arc<dyn EmulatedFunction>,
}

impl MachineView {
    /// Of a machine that is ready to run.
    pub fn new(machine: &Machine) -> Self {
        let (mut devices, mut emulated) = (Vec::new(), Vec::new());
        for place in machine.assigned.places() {
            let first = place.guest_address();
            emulated.extend(place.emulated.iter().map(|function| EmulatedView {
                id: function.name().to_owned(),
                guest: first,
                function: Arc::clone(function),
            }));
            for function in place.slot.iter().flat_map(|slot| &slot.functions) {
                let number = function.function.devfn().function();
                let devfn = DevFn::new(first.devfn.device(), number).unwrap_or(first.devfn);
                let guest = Bdf { devfn, ..first };
                let bars = machine.plan.bars.iter().filter(|bar| bar.function == guest);
                let Some(domain) = place.slot.as_ref().map(|slot| Arc::clone(&slot.domain)) else { continue };
                devices.push(DeviceView {
                    id: function.id.clone(),
                    host: function.host,
                    guest,
                    port: place.seat.port().map(|port| Bdf {
                        segment: place.segment,
                        bus: 0,
                        devfn: port.devfn(),
                    }),
                    bars: bars
                        .map(|bar| BarPlace {
                            index: bar.bar,
                            base: bar.address,
                            size: bar.size,
                            kind: bar.kind,
                        })
                        .collect(),
                    domain,
                });
            }
        }
        Self { devices, emulated }
    }

    /// The function with this name.
    pub fn device(&self, id: &str) -> Option<&DeviceView> {
        self.devices.iter().find(|device| device.id == id)
    }
}

/// What there is.
#[derive(Debug, Default)]
struct Present {
    config: Option<VmConfig>,
    machine: Option<(VmState, MachineView)>,
    /// Between two machines: to the operator the VM runs on.
    restarts: bool,
}

/// What may be known of the VM.
#[derive(Debug, Default)]
pub struct Status {
    present: Mutex<Present>,
}

/// Counters by name, as clients of `vm.counters` expect them.
pub type CounterMap = BTreeMap<String, u64>;

impl Status {
    fn present(&self) -> MutexGuard<'_, Present> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a copy of the configuration, or forgets it.
    pub fn set_config(&self, config: Option<&VmConfig>) {
        let config = config.cloned();
        self.present().config = config;
    }

    /// There is a machine now, or none any more.
    pub fn set_machine(&self, machine: Option<MachineView>) {
        let mut present = self.present();
        present.machine = machine.map(|view| (VmState::Running, view));
        present.restarts = false;
    }

    /// The machine has gone, and the next one takes its place at once.
    pub fn set_restarting(&self) {
        let mut present = self.present();
        present.machine = None;
        present.restarts = true;
    }

    /// The machine that there is has other devices now.
    pub fn set_devices(&self, machine: MachineView) {
        if let Some((_, present)) = &mut self.present().machine {
            *present = machine;
        }
    }

    /// A device is about to be closed.
    pub fn forget_device(&self, id: &str) {
        if let Some((_, machine)) = &mut self.present().machine {
            machine.devices.retain(|device| device.id != id);
            machine.emulated.retain(|device| device.id != id);
        }
    }

    /// The machine that there is has been paused or goes on.
    pub fn set_state(&self, state: VmState) {
        if let Some((present, _)) = &mut self.present().machine {
            *present = state;
        }
    }

    /// Looks at configuration, state and machine; `None` if there is no configuration. `look` must not wait for anything.
    pub fn look<T>(&self, look: impl FnOnce(&VmConfig, VmState, Option<&MachineView>) -> T) -> Option<T> {
        let present = self.present();
        let config = present.config.as_ref()?;
        Some(match &present.machine {
            Some((state, machine)) => look(config, *state, Some(machine)),
            None if present.restarts => look(config, VmState::Running, None),
            None => look(config, VmState::Created, None),
        })
    }

    /// Wakes a sleeping device; `None` if there is no such device.
    pub fn wake(&self, id: &str) -> Option<Result<bool, ControlError>> {
        let present = self.present();
        let device = present.machine.as_ref()?.1.device(id)?;
        Some(device.domain.wake(device.host))
    }

    /// Has a lost device reset, and lets its slot sleep again if that is wanted; `None` if there is no such device.
    ///
    /// # Errors
    /// There was neither a loss nor a latch.
    pub fn recover(&self, id: &str, clear_latch: bool) -> Option<Result<(), ControlError>> {
        let present = self.present();
        let device = present.machine.as_ref()?.1.device(id)?;
        let cleared = clear_latch && device.domain.clear_latch();
        Some(match device.domain.recover(device.host) {
            Err(ControlError::NotLost(_)) if cleared => Ok(()),
            result => result,
        })
    }
}
