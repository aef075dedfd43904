//! What has happened to a function: counters, times and latencies. Kept as it happens, in memory only: reading them touches no
//! device and no timer runs for them.

use std::collections::BTreeMap;
use std::time::Duration;

use acpi::notify_abi::ResourceIndex;
use pci::{Bdf, DevFn};
use serde::{Deserialize, Serialize};

use crate::policy::PolicyChange;
use crate::state::Phase;

/// Buckets of a [`Histogram`].
pub const BUCKETS: usize = 28;

/// Latencies by powers of two: bucket *i* counts times below 2^*i* microseconds that are in none before it, the last one
/// everything longer (from 67 s on).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// How many there were.
    pub count: u64,
    /// All of them together, in microseconds.
    pub total_us: u64,
    /// The longest, in microseconds.
    pub longest_us: u64,
    /// By length.
    pub buckets: [u64; BUCKETS],
}

impl Histogram {
    pub(crate) fn add(&mut self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let bits = usize::try_from(u64::BITS - us.leading_zeros()).unwrap_or(BUCKETS);
        self.buckets[bits.min(BUCKETS - 1)] += 1;
        self.count += 1;
        self.total_us = self.total_us.saturating_add(us);
        self.longest_us = self.longest_us.max(us);
    }

    /// A time that `percent` of all did not exceed: the upper bound of the bucket in which that one is.
    pub fn percentile(&self, percent: u8) -> Option<Duration> {
        let wanted = self.count.saturating_mul(u64::from(percent.min(100))).div_ceil(100).max(1);
        let mut seen = 0;
        let bucket = self.buckets.iter().position(|count| {
            seen += count;
            seen >= wanted
        })?;
        let bound = if bucket == BUCKETS - 1 { self.longest_us } else { (1 << bucket).min(self.longest_us) };
        Some(Duration::from_micros(bound))
    }
}

/// A fixed set of kinds that are counted one by one.
macro_rules! kinds {
    ($(#[$doc:meta])* $name:ident: $count:literal { $($(#[$kind_doc:meta])* $kind:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$kind_doc])* $kind,)* }

        impl $name {
            /// All of them, in the order of their discriminants.
            pub const ALL: [Self; $count] = [$(Self::$kind,)*];

            /// A short lower-case name.
            pub fn name(self) -> &'static str {
                match self { $(Self::$kind => $text,)* }
            }
        }
    };
}

kinds! {
    /// What woke a function out of low power.
    WakeCause: 4 {
        /// `_ON` of the guest, or its reset.
        Guest = "guest",
        /// The VMM: a policy changed while the device slept.
        Host = "host",
        /// The host woke it while the guest had PMEs of it enabled. A PME and a look at its configuration space cannot be told apart.
        Pme = "pme",
        /// The host woke it, and the guest had not asked for PMEs or was not to be told.
        Unknown = "unknown",
    }
}

kinds! {
    /// What can go wrong.
    FailureKind: 13 {
        /// The host said that the function was in low power already.
        EntryEngaged = "entry-engaged",
        /// The host has no such feature for the function (any more).
        EntryUnsupported = "entry-unsupported",
        /// The host refused low power otherwise.
        EntryRefused = "entry-refused",
        /// There was no eventfd for the wakeup.
        EntryDescriptor = "entry-descriptor",
        /// The host could not end low power.
        ExitRefused = "exit-refused",
        /// The device did not answer after the end of low power.
        NoAnswer = "no-answer",
        /// `_ON` took longer than it may.
        OnTimeout = "on-timeout",
        /// The host did not take D3hot.
        D3hotRefused = "d3hot-refused",
        /// The device did not answer after the way from D3hot to D0.
        D0NoAnswer = "d0-no-answer",
        /// The device did not answer after a reset either.
        ResetFailed = "reset-failed",
        /// The host wants the device back.
        ReleaseWanted = "release-wanted",
        /// The bus has reported an error of the device.
        BusError = "bus-error",
        /// The device has gone while it was on.
        Gone = "gone",
    }
}

kinds! {
    /// Why low power was not entered though the guest has called `_OFF`.
    Denial: 4 {
        /// The budget of toggles is used up: entered later.
        Budget = "budget",
        /// A device of the slot has not come back once.
        Latched = "latched",
        /// `power=d3hot`.
        D3hotOnly = "d3hot-only",
        /// `power=off`.
        PowerOff = "power-off",
    }
}

/// What has happened to a function since the domain was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// `_OFF` that changed something, of the function's own resource or its port's.
    pub off_requests: u64,
    /// `_ON` that changed something, likewise.
    pub on_requests: u64,
    /// Times low power was entered.
    pub entries: u64,
    /// Times the host refused it.
    pub entry_failures: u64,
    /// Times low power was ended with the device answering.
    pub exits: u64,
    /// Times the device did not come back.
    pub losses: u64,
    /// Times a reset brought it back.
    pub recoveries: u64,
    /// Wakes by the host.
    pub wakes: u64,
    /// Wakes told to the guest through the event device, repeats included.
    pub notifications: u64,
    /// Wakes told to the guest through the root port's PME.
    pub native_pmes: u64,
    /// Times low power was entered again after a wake nobody asked for.
    pub reentries: u64,
    /// Times hardware was put in D3hot.
    pub parkings: u64,
    /// Hold-offs that ended in low power.
    pub hold_offs: u64,
    /// Hold-offs that an `_ON` ended.
    pub hold_offs_cancelled: u64,
    /// Hold-offs that were longer because of a wake storm.
    pub storm_hold_offs: u64,
    /// Changes of phase.
    pub transitions: u64,
    /// Wakes by cause, in the order of [`WakeCause::ALL`].
    pub wakes_by: [u64; WakeCause::ALL.len()],
    /// Failures by kind, in the order of [`FailureKind::ALL`].
    pub failures: [u64; FailureKind::ALL.len()],
    /// Denials by reason, in the order of [`Denial::ALL`].
    pub denials: [u64; Denial::ALL.len()],
    /// Time spent in each phase up to now, in the order of [`Phase::ALL`].
    pub time_in: [Duration; Phase::ALL.len()],
    /// How long the host took to grant low power.
    pub entry_latency: Histogram,
    /// How long the host took to end low power, and the device to answer.
    pub exit_latency: Histogram,
    /// From `_ON` until the guest was let in, where it had to wait for hardware.
    pub ready_latency: Histogram,
    /// From the host's wake until the guest was interrupted: the VMM's own share of a wake.
    pub wake_latency: Histogram,
}

/// One function's state as a report: read from memory, never from the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberReport {
    /// Host address.
    pub bdf: Bdf,
    /// Place on the root port's bus.
    pub devfn: DevFn,
    /// Power resource, when offered.
    pub resource: Option<ResourceIndex>,
    /// Where it is now.
    pub phase: Phase,
    /// How long it has been there.
    pub phase_age: Duration,
    /// The device of this slot that did not come back, for which none of the slot is cut from power.
    pub latched_by: Option<Bdf>,
    /// How its power is handled, all of it.
    pub policy: PolicyChange,
    /// How long ago the last wake was, and its cause.
    pub last_wake: Option<(Duration, WakeCause)>,
    /// What has happened.
    pub counters: Counters,
}

/// A [`MemberReport`] for programs: plain numbers and names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// Host address.
    pub bdf: String,
    /// Device and function number on the root port's bus of the guest.
    pub function: String,
    /// Whether the guest has a power resource for it.
    pub offered: bool,
    /// [`Phase::name`].
    pub state: &'static str,
    /// For how long, in milliseconds.
    pub state_ms: u64,
    /// The device of this slot that did not come back; the slot is not cut from power until the latch is cleared.
    pub latched_by: Option<String>,
    /// The policy.
    pub policy: PolicyChange,
    /// Milliseconds in each state so far.
    pub time_in_ms: BTreeMap<&'static str, u64>,
    /// Changes of state.
    pub transitions: u64,
    /// Plain counters, named as in [`Counters`].
    pub counts: BTreeMap<&'static str, u64>,
    /// Wakes by [`WakeCause`].
    pub wakes: BTreeMap<&'static str, u64>,
    /// How long ago the last wake was, in milliseconds.
    pub last_wake_ms: Option<u64>,
    /// Its [`WakeCause`].
    pub last_wake_cause: Option<&'static str>,
    /// Failures by [`FailureKind`].
    pub failures: BTreeMap<&'static str, u64>,
    /// Denials by [`Denial`].
    pub denials: BTreeMap<&'static str, u64>,
    /// [`Counters::entry_latency`].
    pub entry_latency: Histogram,
    /// [`Counters::exit_latency`].
    pub exit_latency: Histogram,
    /// [`Counters::ready_latency`].
    pub ready_latency: Histogram,
    /// [`Counters::wake_latency`].
    pub wake_latency: Histogram,
}

impl From<MemberReport> for Snapshot {
    fn from(report: MemberReport) -> Self {
        let counters = report.counters;
        let counts = [
            ("off_requests", counters.off_requests),
            ("on_requests", counters.on_requests),
            ("entries", counters.entries),
            ("entry_failures", counters.entry_failures),
            ("exits", counters.exits),
            ("losses", counters.losses),
            ("recoveries", counters.recoveries),
            ("wakes", counters.wakes),
            ("notifications", counters.notifications),
            ("native_pmes", counters.native_pmes),
            ("reentries", counters.reentries),
            ("parkings", counters.parkings),
            ("hold_offs", counters.hold_offs),
            ("hold_offs_cancelled", counters.hold_offs_cancelled),
            ("storm_hold_offs", counters.storm_hold_offs),
        ];
        Self {
            bdf: report.bdf.to_string(),
            function: format!("{:02x}.{}", report.devfn.device(), report.devfn.function()),
            offered: report.resource.is_some(),
            state: report.phase.name(),
            state_ms: whole_millis(report.phase_age),
            latched_by: report.latched_by.map(|bdf| bdf.to_string()),
            policy: report.policy,
            time_in_ms: by_name(Phase::ALL.map(Phase::name), counters.time_in.map(whole_millis)),
            transitions: counters.transitions,
            counts: counts.into(),
            wakes: by_name(WakeCause::ALL.map(WakeCause::name), counters.wakes_by),
            last_wake_ms: report.last_wake.map(|(ago, _)| whole_millis(ago)),
            last_wake_cause: report.last_wake.map(|(_, cause)| cause.name()),
            failures: by_name(FailureKind::ALL.map(FailureKind::name), counters.failures),
            denials: by_name(Denial::ALL.map(Denial::name), counters.denials),
            entry_latency: counters.entry_latency,
            exit_latency: counters.exit_latency,
            ready_latency: counters.ready_latency,
            wake_latency: counters.wake_latency,
        }
    }
}

fn by_name<const N: usize>(names: [&'static str; N], values: [u64; N]) -> BTreeMap<&'static str, u64> {
    names.into_iter().zip(values).collect()
}

/// Milliseconds, for what is counted in long times.
pub(crate) fn whole_millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_fall_into_the_bucket_of_their_power_of_two() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.percentile(50), None);
        for us in [0, 1, 2, 3, 4, 1000, 1023, 1024, u64::MAX] {
            histogram.add(Duration::from_micros(us));
        }
        let filled: Vec<_> = histogram.buckets.iter().enumerate().filter(|(_, count)| **count > 0).collect();
        assert_eq!(filled, [(0, &1), (1, &1), (2, &2), (3, &1), (10, &2), (11, &1), (27, &1)]);
        assert_eq!((histogram.count, histogram.longest_us), (9, u64::MAX));
        assert_eq!(histogram.percentile(50), Some(Duration::from_micros(8)));
        assert_eq!(histogram.percentile(100), Some(Duration::from_micros(u64::MAX)));
    }

    #[test]
    fn a_percentile_is_never_longer_than_the_longest() {
        let mut histogram = Histogram::default();
        histogram.add(Duration::from_micros(5));
        assert_eq!(histogram.percentile(99), Some(Duration::from_micros(5)));
    }

    #[test]
    fn kinds_count_in_order() {
        assert!(FailureKind::ALL.iter().enumerate().all(|(n, kind)| *kind as usize == n));
        assert!(WakeCause::ALL.iter().enumerate().all(|(n, kind)| *kind as usize == n));
        assert!(Denial::ALL.iter().enumerate().all(|(n, kind)| *kind as usize == n));
    }
}
