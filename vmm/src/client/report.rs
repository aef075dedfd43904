//! What a VMM reports about the power of its devices (`vm.power`), as a program on the other side of the socket reads it.
//!
//! It is `vfio_pm::Snapshot` with the names of the machine around it. Another version of the VMM may say more or less, so everything but the
//! names and the state may be absent.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;
use vfio_pm::{Histogram, Phase};

use crate::table::{Cell, Tone};

/// The devices of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct VmPower {
    /// State of the VM, as in `vm.info`.
    pub state: String,
    /// Its assigned devices.
    #[serde(default)]
    pub devices: Vec<DevicePower>,
}

/// One function.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct DevicePower {
    /// Name in `vm.info`.
    pub id: String,
    /// Address in the guest.
    pub guest_bdf: Option<String>,
    /// Address on the host.
    pub bdf: String,
    /// Whether the guest has a power resource for it.
    #[serde(default)]
    pub offered: bool,
    /// [`Phase::name`].
    pub state: String,
    /// For how long, in milliseconds.
    #[serde(default)]
    pub state_ms: u64,
    /// The device of its slot that did not come back.
    pub latched_by: Option<String>,
    /// The policy, as keys and values.
    #[serde(default)]
    pub policy: BTreeMap<String, Value>,
    /// Milliseconds in each state.
    #[serde(default)]
    pub time_in_ms: BTreeMap<String, u64>,
    /// Plain counters.
    #[serde(default)]
    pub counts: BTreeMap<String, u64>,
    /// How long ago the last wake was, in milliseconds.
    pub last_wake_ms: Option<u64>,
    /// Its cause.
    pub last_wake_cause: Option<String>,
    /// Failures by kind.
    #[serde(default)]
    pub failures: BTreeMap<String, u64>,
    /// Denials by reason.
    #[serde(default)]
    pub denials: BTreeMap<String, u64>,
    /// How long the host took to grant low power.
    #[serde(default)]
    pub entry_latency: Histogram,
    /// How long the way back took.
    #[serde(default)]
    pub exit_latency: Histogram,
    /// What the host's sysfs says.
    #[serde(default)]
    pub host: HostSide,
}

/// The host's word for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct HostSide {
    /// `power_state`, such as `D3cold`.
    pub power_state: Option<String>,
    /// `power/runtime_status`, such as `suspended`.
    pub runtime_status: Option<String>,
    /// Milliseconds that it has been suspended altogether.
    pub runtime_suspended_ms: Option<u64>,
}

impl DevicePower {
    /// Its state, if it is one that this version knows.
    pub fn phase(&self) -> Option<Phase> {
        Phase::ALL.into_iter().find(|phase| phase.name() == self.state)
    }

    /// The part of its time that it was in low power, in per cent.
    pub fn residency(&self) -> Option<f64> {
        let all: u64 = self.time_in_ms.values().sum();
        let low = self.time_in_ms.get(Phase::Off.name()).copied()?;
        #[expect(clippy::cast_precision_loss, reason = "a percentage of milliseconds")]
        (all > 0).then(|| low as f64 * 100.0 / all as f64)
    }

    /// A plain counter; 0 if it is not there.
    pub fn count(&self, name: &str) -> u64 {
        self.counts.get(name).copied().unwrap_or_default()
    }

    /// What has gone wrong so far, by kind: `no-answer`, `entry-refused 3x`.
    pub fn failures(&self) -> Vec<String> {
        let seen = self.failures.iter().filter(|(_, count)| **count > 0);
        seen.map(|(kind, count)| if *count == 1 { kind.clone() } else { format!("{kind} {count}x") })
            .collect()
    }

    /// A key of the policy as text.
    pub fn policy(&self, key: &str) -> Option<String> {
        match self.policy.get(key)? {
            Value::String(text) => Some(text.clone()),
            other => Some(other.to_string()),
        }
    }

    /// Whether the device has gone.
    pub fn is_lost(&self) -> bool {
        matches!(self.phase(), Some(Phase::Lost | Phase::Resetting))
    }

    /// Its state in its colour.
    pub fn state_cell(&self) -> Cell {
        let tone = match self.phase() {
            Some(Phase::Off) => Tone::Asleep,
            Some(Phase::On) => Tone::Good,
            Some(Phase::Lost | Phase::Resetting) => Tone::Bad,
            Some(_) => Tone::Notice,
            None => Tone::Plain,
        };
        Cell::new(&self.state, tone)
    }

    /// What the host says of its power.
    pub fn host_cell(&self) -> Cell {
        let Some(state) = self.host.power_state.as_deref() else { return Cell::or_dash(None) };
        Cell::new(state, if state == "D3cold" { Tone::Asleep } else { Tone::Plain })
    }

    /// What has gone wrong: a loss that lasts before everything that is over.
    pub fn trouble_cell(&self) -> Cell {
        let failures = self.failures().join(", ");
        match &self.latched_by {
            Some(by) => {
                let text =
                    format!("latched by {by}{}{failures}", if failures.is_empty() { "" } else { ": " });
                Cell::new(text, Tone::Bad)
            }
            None if failures.is_empty() => Cell::or_dash(None),
            None => Cell::new(failures, if self.is_lost() { Tone::Bad } else { Tone::Notice }),
        }
    }
}
