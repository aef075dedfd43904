//! What a VMM reports about the power of its devices (`vm.power`), as a program on the other side of the socket reads it.
//!
//! It is `vfio_pm::Snapshot` with the names of the machine around it. Another version of the VMM may say more or less, so everything but the
//! names and the state may be absent.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};
use serde_json::Value;
use vfio_pm::{Histogram, Phase};

use crate::table::{Cell, Tone};

/// The devices of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct VmPower {
    /// State of the VM, as in `vm.info`.
    pub state: String,
    /// Its assigned devices. One that the VMM knows nothing of is left out.
    #[serde(default, deserialize_with = "those_there")]
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

fn those_there<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<DevicePower>, D::Error> {
    let devices = Vec::<Option<DevicePower>>::deserialize(deserializer)?;
    Ok(devices.into_iter().flatten().collect())
}

impl DevicePower {
    /// Its state, if it is one that this version knows.
    pub fn phase(&self) -> Option<Phase> {
        Phase::ALL.into_iter().find(|phase| phase.name() == self.state)
    }

    /// The part of its time that it was in low power, in per cent.
    pub fn residency(&self) -> Option<f64> {
        let all: u64 = self.time_in_ms.values().sum();
        let low = self.time_in_ms.get(Phase::Off.name()).copied().unwrap_or_default();
        #[expect(clippy::cast_precision_loss, reason = "a percentage of milliseconds")]
        (all > 0).then(|| low as f64 * 100.0 / all as f64)
    }

    /// A plain counter; 0 if it is not there.
    pub fn count(&self, name: &str) -> u64 {
        self.counts.get(name).copied().unwrap_or_default()
    }

    /// What has gone wrong so far, by kind: `no-answer`, `entry-refused 3x`. While it is kept from sleeping, also why.
    pub fn troubles(&self) -> Vec<String> {
        let held = self.phase() == Some(Phase::Held);
        let denials = self.denials.iter().filter(|_| held);
        let seen = self.failures.iter().chain(denials).filter(|(_, count)| **count > 0);
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
        let troubles = self.troubles().join(", ");
        let text = match &self.latched_by {
            None if troubles.is_empty() => return Cell::or_dash(None),
            None => troubles,
            Some(by) => {
                let by = if *by == self.bdf { String::new() } else { format!(" by {by}") };
                let colon = if troubles.is_empty() { "" } else { ": " };
                format!("latched{by}{colon}{troubles}")
            }
        };
        let bad = self.latched_by.is_some() || self.is_lost();
        Cell::new(text, if bad { Tone::Bad } else { Tone::Notice })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::fixture;

    fn device(number: usize) -> DevicePower {
        serde_json::from_value::<VmPower>(fixture::power()).unwrap().devices.remove(number)
    }

    #[test]
    fn all_that_a_vmm_says_of_a_device_is_read() {
        let gpu = device(0);
        assert_eq!(
            (gpu.phase(), gpu.offered, gpu.count("entries"), gpu.count("wakes")),
            (Some(Phase::Off), true, 7, 3)
        );
        assert_eq!((gpu.last_wake_ms, gpu.last_wake_cause.as_deref()), (Some(125_000), Some("pme")));
        assert_eq!(gpu.exit_latency.percentile(50), Some(std::time::Duration::from_millis(13)));
        assert_eq!(gpu.policy("hold_off").as_deref(), Some("200"));
        assert!(gpu.residency().is_some_and(|percent| (percent - 90.0).abs() < 0.001));
    }

    #[test]
    fn another_version_may_say_less_and_more_but_not_without_names() {
        let text = r#"{"state": "Paused", "devices": [null, {"id": "a", "bdf": "b", "state": "dreaming", "colour": "blue"}]}"#;
        let device = serde_json::from_str::<VmPower>(text).unwrap().devices.remove(0);
        assert_eq!(
            (device.phase(), device.residency(), device.trouble_cell().text.as_str()),
            (None, None, "-")
        );
        assert!(serde_json::from_str::<VmPower>(r#"{"state": "Paused", "devices": [{"id": "a"}]}"#).is_err());
    }

    #[test]
    fn trouble_is_what_went_wrong_and_why_a_device_is_kept_from_sleeping_now() {
        let mut nic = device(1);
        assert_eq!(nic.trouble_cell(), Cell::or_dash(None));
        nic.denials.insert("budget".to_owned(), 2);
        assert_eq!(nic.trouble_cell(), Cell::or_dash(None), "that is over");
        nic.state = Phase::Held.name().to_owned();
        assert_eq!(nic.trouble_cell(), Cell::new("budget 2x", Tone::Notice));
        nic.latched_by = Some("0000:02:00.1".to_owned());
        assert_eq!(nic.trouble_cell(), Cell::new("latched by 0000:02:00.1: budget 2x", Tone::Bad));
        assert_eq!(device(2).trouble_cell(), Cell::new("latched: no-answer 2x", Tone::Bad));
    }
}
