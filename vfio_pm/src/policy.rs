//! How the power of one function is handled: chosen by its class, changed by the user at start and at run time.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::bucket::Rate;
use crate::offer::PowerChoice;

/// PCI base class of display controllers (PCI Code and ID Assignment 1.14, section 1.4).
const CLASS_DISPLAY: u32 = 0x03;

/// What to do when the host wakes a function that the guest has off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WakePolicy {
    /// Tell the guest if it has asked for PMEs of this function; otherwise let the function sleep again.
    #[default]
    Notify,
    /// Never tell the guest; note the wake and let the function sleep again.
    Ignore,
    /// Enter low power without a wakeup: the host wakes and suspends the function as it likes, and nobody is told.
    HostOnly,
}

impl WakePolicy {
    /// As it is written on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Notify => "notify",
            Self::Ignore => "ignore",
            Self::HostOnly => "host-only",
        }
    }
}

/// What to do when a device does not come back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LostPolicy {
    /// Reset it once.
    #[default]
    Reset,
    /// Leave it as it is, for somebody to look at.
    Keep,
}

impl LostPolicy {
    /// As it is written on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::Keep => "keep",
        }
    }
}

/// How the power of one function is handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// How deep the function may go.
    pub power: PowerChoice,
    /// What a wake by the host does.
    pub wake: WakePolicy,
    /// How long after `_OFF` the function stays on, so that an `_ON` soon after costs nothing.
    pub hold_off: Duration,
    /// The guest's driver has to prepare the device before each entry (GPUs that keep their memory in self-refresh): a wake
    /// always goes to the guest, whatever `wake` says, and low power is never entered again without an `_OFF` of its own.
    pub needs_driver: bool,
    /// How often low power may be entered. When that is used up the function stays on a little longer.
    pub toggles: Rate,
    /// Wakes by the host in a minute beyond which the function is left on for longer and longer; 0: never.
    pub wake_storm: u32,
    /// How long an `_ON` may take before the guest is told that the device is lost.
    pub on_timeout: Duration,
    /// What to do when the device does not come back.
    pub on_lost: LostPolicy,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            power: PowerChoice::Auto,
            wake: WakePolicy::Notify,
            hold_off: Duration::from_millis(200),
            needs_driver: false,
            toggles: Rate { per_minute: 600, burst: 1000 },
            wake_storm: 600,
            on_timeout: Self::LONGEST_ON_TIMEOUT,
            on_lost: LostPolicy::Reset,
        }
    }
}

impl Policy {
    /// The shortest time-out of `_ON` that makes sense: a link alone takes 100 ms.
    pub const SHORTEST_ON_TIMEOUT: Duration = Duration::from_millis(100);
    /// The longest: a little later the guest's own method gives up.
    pub const LONGEST_ON_TIMEOUT: Duration = Duration::from_secs(10);

    /// The defaults for a device whose class code is `class` (24 bits, as sysfs has it).
    pub fn for_class(class: u32) -> Self {
        // A GPU's driver puts its memory into self-refresh before each entry.
        Self { needs_driver: class >> 16 == CLASS_DISPLAY, ..Self::default() }
    }

    /// The way of entry that tells nobody of a wake.
    pub(crate) fn enters_silently(&self) -> bool {
        self.wake == WakePolicy::HostOnly && !self.needs_driver
    }

    /// Wakes are not for the guest.
    pub(crate) fn hides_wakes(&self) -> bool {
        self.wake != WakePolicy::Notify && !self.needs_driver
    }

    /// How fast wakes may come.
    pub(crate) fn wake_rate(&self) -> Rate {
        Rate { per_minute: self.wake_storm, burst: (self.wake_storm / 2).max(1) }
    }
}

impl fmt::Display for Policy {
    /// The keys and values of `--device`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "power={},wake={},hold_off={},toggle_rate={},toggle_burst={},wake_storm={},on_timeout={},on_lost={}",
            self.power.name(),
            self.wake.name(),
            self.hold_off.as_millis(),
            self.toggles.per_minute,
            self.toggles.burst,
            self.wake_storm,
            self.on_timeout.as_millis(),
            self.on_lost.name(),
        )
    }
}

/// Changes to a [`Policy`], as users and programs write them: what is absent stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyChange {
    /// [`Policy::power`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power: Option<PowerChoice>,
    /// [`Policy::wake`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wake: Option<WakePolicy>,
    /// [`Policy::hold_off`], in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold_off: Option<u32>,
    /// Entries in a minute, [`Policy::toggles`]; 0: without limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub toggle_rate: Option<u32>,
    /// Entries in a row, [`Policy::toggles`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub toggle_burst: Option<u32>,
    /// [`Policy::wake_storm`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wake_storm: Option<u32>,
    /// [`Policy::on_timeout`], in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_timeout: Option<u32>,
    /// [`Policy::on_lost`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_lost: Option<LostPolicy>,
}

/// A policy that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A time-out out of range.
    #[error(
        "on_timeout={0} is not possible: give milliseconds from {low} to {high}; the guest's own method gives up soon after that",
        low = Policy::SHORTEST_ON_TIMEOUT.as_millis(),
        high = Policy::LONGEST_ON_TIMEOUT.as_millis()
    )]
    OnTimeout(u32),
    /// A budget that is always empty.
    #[error("toggle_burst=0 would never let the device sleep: give 1 or more, or power=off to keep it on")]
    NoBurst,
}

impl PolicyChange {
    /// Both changes as one: this, and `later` after it.
    #[must_use]
    pub fn then(&self, later: &Self) -> Self {
        Self {
            power: later.power.or(self.power),
            wake: later.wake.or(self.wake),
            hold_off: later.hold_off.or(self.hold_off),
            toggle_rate: later.toggle_rate.or(self.toggle_rate),
            toggle_burst: later.toggle_burst.or(self.toggle_burst),
            wake_storm: later.wake_storm.or(self.wake_storm),
            on_timeout: later.on_timeout.or(self.on_timeout),
            on_lost: later.on_lost.or(self.on_lost),
        }
    }

    /// `policy` with the changes made.
    ///
    /// # Errors
    /// A value is out of its range.
    pub fn apply(&self, policy: &Policy) -> Result<Policy, PolicyError> {
        let millis = |ms: u32| Duration::from_millis(u64::from(ms));
        let on_timeout = self.on_timeout.map_or(policy.on_timeout, millis);
        if !(Policy::SHORTEST_ON_TIMEOUT..=Policy::LONGEST_ON_TIMEOUT).contains(&on_timeout) {
            return Err(PolicyError::OnTimeout(self.on_timeout.unwrap_or_default()));
        }
        if self.toggle_burst == Some(0) {
            return Err(PolicyError::NoBurst);
        }
        Ok(Policy {
            power: self.power.unwrap_or(policy.power),
            wake: self.wake.unwrap_or(policy.wake),
            hold_off: self.hold_off.map_or(policy.hold_off, millis),
            needs_driver: policy.needs_driver,
            toggles: Rate {
                per_minute: self.toggle_rate.unwrap_or(policy.toggles.per_minute),
                burst: self.toggle_burst.unwrap_or(policy.toggles.burst),
            },
            wake_storm: self.wake_storm.unwrap_or(policy.wake_storm),
            on_timeout,
            on_lost: self.on_lost.unwrap_or(policy.on_lost),
        })
    }
}

impl From<&Policy> for PolicyChange {
    /// All of `policy`, spelled out.
    fn from(policy: &Policy) -> Self {
        let millis = |time: Duration| Some(u32::try_from(time.as_millis()).unwrap_or(u32::MAX));
        Self {
            power: Some(policy.power),
            wake: Some(policy.wake),
            hold_off: millis(policy.hold_off),
            toggle_rate: Some(policy.toggles.per_minute),
            toggle_burst: Some(policy.toggles.burst),
            wake_storm: Some(policy.wake_storm),
            on_timeout: millis(policy.on_timeout),
            on_lost: Some(policy.on_lost),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_changes_the_later_counts_and_what_it_leaves_out_stays() {
        let first =
            PolicyChange { power: Some(PowerChoice::Off), hold_off: Some(1), ..PolicyChange::default() };
        let later =
            PolicyChange { power: Some(PowerChoice::Auto), toggle_burst: Some(2), ..PolicyChange::default() };
        let both = first.then(&later);
        let policy = Policy::for_class(0x02_00_00);
        assert_eq!(both.apply(&policy), first.apply(&policy).and_then(|policy| later.apply(&policy)));
        assert_eq!((both.power, both.hold_off), (Some(PowerChoice::Auto), Some(1)));
    }

    #[test]
    fn a_display_device_always_has_its_driver_asked_whatever_the_wake_policy() {
        let gpu = Policy::for_class(0x03_00_00);
        assert!(gpu.needs_driver && Policy::for_class(0x03_02_00).needs_driver);
        assert!(!Policy::for_class(0x02_00_00).needs_driver);
        for wake in [WakePolicy::Notify, WakePolicy::Ignore, WakePolicy::HostOnly] {
            let gpu = Policy { wake, ..gpu };
            assert!(!gpu.enters_silently() && !gpu.hides_wakes(), "{wake:?}");
        }
    }

    #[test]
    fn the_defaults_let_a_thousand_cycles_and_several_wakes_a_second_through() {
        let policy = Policy::default();
        assert!(policy.toggles.burst >= 1000 && policy.toggles.per_minute >= 600);
        assert!(policy.wake_storm >= 5 * 60);
    }

    #[test]
    fn a_change_leaves_what_it_does_not_name_and_refuses_what_makes_no_sense() {
        let policy = Policy::for_class(0x03_00_00);
        let change =
            PolicyChange { hold_off: Some(7), power: Some(PowerChoice::D3hot), ..Default::default() };
        let changed = change.apply(&policy).unwrap();
        let expected = Policy { hold_off: Duration::from_millis(7), power: PowerChoice::D3hot, ..policy };
        assert_eq!(changed, expected);
        for wrong in [0, 99, 10_001] {
            let change = PolicyChange { on_timeout: Some(wrong), ..Default::default() };
            assert_eq!(change.apply(&policy), Err(PolicyError::OnTimeout(wrong)));
        }
        let text = PolicyError::OnTimeout(5).to_string();
        assert!(text.contains("on_timeout=5") && text.contains("100 to 10000"), "{text}");
        let none = PolicyChange { toggle_burst: Some(0), ..Default::default() };
        assert_eq!(none.apply(&policy), Err(PolicyError::NoBurst));
    }

    #[test]
    fn a_policy_spelled_out_and_applied_is_the_same_policy() {
        let policy = Policy { wake: WakePolicy::HostOnly, on_lost: LostPolicy::Keep, ..Policy::default() };
        assert_eq!(PolicyChange::from(&policy).apply(&Policy::default()), Ok(policy));
        let text = "power=auto,wake=host-only,hold_off=200,toggle_rate=600,toggle_burst=1000,wake_storm=600,on_timeout=10000,\
                    on_lost=keep";
        assert_eq!(policy.to_string(), text);
    }
}
