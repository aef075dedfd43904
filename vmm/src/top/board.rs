//! What is known of all VMs: the last answer of each, and where its devices have been lately.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;

use serde_json::Value;
use vfio_pm::Phase;

use super::sensors::Draw;
use crate::client::report::{DevicePower, VmPower};

/// How many looks back the history of a device reaches.
pub const HISTORY: usize = 60;

/// How deep a device was at one look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// The VMM did not say.
    Unknown,
    /// Low power, and the host says that its power is cut.
    Cold,
    /// Low power.
    Low,
    /// D3hot with the guest.
    Hot,
    /// Between two states, or kept from sleeping.
    Between,
    /// On.
    On,
    /// It did not come back.
    Lost,
}

impl Depth {
    /// Where a device is now.
    pub fn of(device: &DevicePower) -> Self {
        match device.phase() {
            Some(Phase::On) => Self::On,
            Some(Phase::Off) if device.host.power_state.as_deref() == Some("D3cold") => Self::Cold,
            Some(Phase::Off) => Self::Low,
            Some(Phase::D3hot) => Self::Hot,
            Some(Phase::Lost | Phase::Resetting) => Self::Lost,
            Some(_) => Self::Between,
            None => Self::Unknown,
        }
    }
}

/// What a VMM has said.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Typed.
    pub power: VmPower,
    /// As it came.
    pub raw: Value,
    /// Watts by host address, where measured.
    pub draw: BTreeMap<String, Draw>,
}

/// One VM as it was at the last look.
#[derive(Clone, Debug, PartialEq)]
pub struct Vm {
    /// The socket of its VMM.
    pub socket: PathBuf,
    /// The VMM's process.
    pub pid: Option<u32>,
    /// What distinguishes it: its UUID, or what it boots.
    pub name: Option<String>,
    /// The answer, or why there is none.
    pub answer: Result<Answer, String>,
}

/// All VMs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Board {
    vms: Vec<Vm>,
    history: BTreeMap<(PathBuf, String), VecDeque<Depth>>,
    /// Watts of the platform, where measured.
    pub platform: Option<f64>,
}

impl Board {
    /// What is new of one VM.
    pub fn update(&mut self, vm: Vm) {
        if let Ok(answer) = &vm.answer {
            for device in &answer.power.devices {
                let past = self.history.entry((vm.socket.clone(), device.id.clone())).or_default();
                past.push_back(Depth::of(device));
                if past.len() > HISTORY {
                    past.pop_front();
                }
            }
            let still_there = |id: &str| answer.power.devices.iter().any(|device| device.id == id);
            self.history.retain(|(socket, id), _| *socket != vm.socket || still_there(id));
        } else {
            let pasts = self.history.iter_mut().filter(|((socket, _), _)| *socket == vm.socket);
            pasts.for_each(|(_, past)| {
                past.push_back(Depth::Unknown);
                if past.len() > HISTORY {
                    past.pop_front();
                }
            });
        }
        match self.vms.iter_mut().find(|known| known.socket == vm.socket) {
            Some(known) => *known = vm,
            None => {
                self.vms.push(vm);
                self.vms.sort_by(|a, b| (a.pid, &a.socket).cmp(&(b.pid, &b.socket)));
            }
        }
    }

    /// A VM that has gone.
    pub fn remove(&mut self, socket: &PathBuf) {
        self.vms.retain(|vm| vm.socket != *socket);
        self.history.retain(|(of, _), _| of != socket);
    }

    /// All of them, by process ID.
    pub fn vms(&self) -> &[Vm] {
        &self.vms
    }

    /// Those that gave no answer.
    pub fn failed(&self) -> usize {
        self.vms.iter().filter(|vm| vm.answer.is_err()).count()
    }

    /// Where a device has been, the last look last.
    pub fn history(&self, vm: &Vm, id: &str) -> impl DoubleEndedIterator<Item = Depth> + '_ {
        self.history.get(&(vm.socket.clone(), id.to_owned())).into_iter().flatten().copied()
    }

    /// All devices that answered for, with their VMs.
    pub fn devices(&self) -> impl Iterator<Item = (&Vm, &Answer, &DevicePower)> {
        let answers = self.vms.iter().filter_map(|vm| Some((vm, vm.answer.as_ref().ok()?)));
        answers.flat_map(|(vm, answer)| answer.power.devices.iter().map(move |device| (vm, answer, device)))
    }
}
