//! The changing part of one function in a power domain: its state, its timer, its undelivered wake, its policy with what that counts,
//! and its statistics.

use std::time::{Duration, Instant};

use acpi::notify_abi::{STATUS_BUSY, STATUS_LOST, STATUS_ON};

use crate::bucket::Bucket;
use crate::event::Outbox;
use crate::offer::PowerChoice;
use crate::policy::Policy;
use crate::spec::Timing;
use crate::state::{Effects, Hardware, Operation, Phase, PowerEvent, PowerState, TimerChange};
use crate::stats::{Counters, Denial, FailureKind, WakeCause};

/// Lines a guest can make the log take per function and second; what is over that is left out.
const LINES_PER_SECOND: u32 = 100;

/// What a member's timer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TimerKind {
    /// The wait between `_OFF` and entry.
    HoldOff,
    /// The wait between the guest's D3hot and hardware's.
    Park,
    /// The wait between an unwanted wake and the next entry.
    Reentry,
    /// How long the guest may take to read the WAKE register.
    Confirm,
    /// When to tell the guest again.
    Retry,
}

impl TimerKind {
    /// Whether the timer belongs to a wake, which a paused guest cannot take.
    pub(crate) fn is_wake(self) -> bool {
        matches!(self, Self::Reentry | Self::Confirm | Self::Retry)
    }
}

/// A deadline and its purpose. A member has one at most, since the purposes belong to different states.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timer {
    pub(crate) at: Instant,
    pub(crate) kind: TimerKind,
}

/// The wake that is being delivered, and the memory that paces re-entry.
#[derive(Clone, Debug, Default)]
pub(crate) struct WakeState {
    /// The function's bit in the WAKE register.
    pub(crate) bit: bool,
    /// Woken while the guest was paused: decide on resume.
    pub(crate) deferred: bool,
    /// How often the guest has been told of this wake beyond the first time.
    pub(crate) retries: usize,
    /// The last wait before re-entry.
    pub(crate) backoff: Option<Duration>,
    /// When the last unwanted wake came.
    pub(crate) last: Option<Instant>,
    /// When the present wake came, until the guest has been told.
    pub(crate) at: Option<Instant>,
    /// Its cause is still to be booked.
    pub(crate) unbooked: bool,
    /// An operator wants the function woken.
    pub(crate) wanted: bool,
}

/// Whether low power may be entered now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// It may.
    Enter,
    /// After so long.
    Later(Duration),
    /// Only D3hot.
    Shallow,
    /// Not at all.
    Denied(Denial),
}

/// One function's changing state; behind the domain's lock.
#[derive(Debug)]
pub(crate) struct MemberState {
    pub(crate) power: PowerState,
    pub(crate) gate_is_open: bool,
    /// Put away by `_OFF` of the port, not by its own.
    pub(crate) by_port: bool,
    /// On its way back because of `_ON` of the port.
    pub(crate) back_for_port: bool,
    /// Hardware is in D0 again and the worker is about to open the gate for the BAR slots.
    pub(crate) reopening: bool,
    pub(crate) operation: Option<Operation>,
    pub(crate) timer: Option<Timer>,
    pub(crate) wake: WakeState,
    pub(crate) on_requested: Option<Instant>,
    pub(crate) policy: Policy,
    /// The present hold-off, with what a wake storm adds.
    pub(crate) held_off: Duration,
    /// The present `_ON` has to wait for hardware.
    pub(crate) awaited: bool,
    /// The device has been reset since it was last there.
    pub(crate) reset_tried: bool,
    /// The guest has been told that its `_ON` takes too long.
    pub(crate) overdue: bool,
    pub(crate) counters: Counters,
    pub(crate) outbox: Outbox,
    park: Duration,
    /// What a wake storm adds to a hold-off: the first time, and at most.
    storm_bounds: (Duration, Duration),
    toggles: Bucket,
    wakes: Bucket,
    storm: Duration,
    last_wake: Option<(Instant, WakeCause)>,
    since: Instant,
    lines_from: Instant,
    lines: u32,
}

impl MemberState {
    pub(crate) fn new(now: Instant, policy: Policy, offered: bool, timing: &Timing, listened: bool) -> Self {
        Self {
            power: PowerState::ON,
            gate_is_open: true,
            by_port: false,
            back_for_port: false,
            reopening: false,
            operation: None,
            timer: None,
            wake: WakeState::default(),
            on_requested: None,
            policy,
            held_off: Duration::ZERO,
            awaited: false,
            reset_tried: false,
            overdue: false,
            counters: Counters::default(),
            outbox: Outbox::new(listened, now),
            park: if offered { timing.park } else { timing.park_without_resource },
            storm_bounds: (timing.storm_first, timing.storm_max),
            toggles: Bucket::new(policy.toggles, now),
            wakes: Bucket::new(policy.wake_rate(), now),
            storm: Duration::ZERO,
            last_wake: None,
            since: now,
            lines_from: now,
            lines: 0,
        }
    }

    /// Takes one step of the state machine and books it: timer, operation, counters, time.
    pub(crate) fn apply(&mut self, event: PowerEvent, now: Instant) -> Effects {
        let before = self.power;
        let (after, effects) = before.next(event);
        self.power = after;
        if before.phase() != after.phase() {
            self.account(before.phase(), after.phase(), now);
        }
        if let Some(operation) = effects.operation {
            self.operation = Some(operation);
        }
        self.timer = match effects.timer {
            TimerChange::Keep => self.timer,
            TimerChange::Disarm => None,
            TimerChange::HoldOff => {
                let storm = self.storm(now);
                self.held_off = self.policy.hold_off.saturating_add(storm);
                self.counters.storm_hold_offs += u64::from(!storm.is_zero());
                self.timer_in(self.held_off, TimerKind::HoldOff, now)
            }
            TimerChange::Park => self.timer_in(self.park, TimerKind::Park, now),
        };
        self.reopening |= effects.reopen;
        if before != after {
            self.book(event, before, now);
        }
        effects
    }

    /// Counts what has changed the state.
    fn book(&mut self, event: PowerEvent, before: PowerState, now: Instant) {
        let counters = &mut self.counters;
        match event {
            PowerEvent::Off => {
                counters.off_requests += 1;
                self.on_requested = None;
                self.back_for_port = false;
                self.overdue = false;
            }
            PowerEvent::On | PowerEvent::Reset => {
                counters.on_requests += 1;
                counters.hold_offs_cancelled += u64::from(before.phase() == Phase::HoldOff);
                self.on_requested = Some(now);
                self.awaited = self.power.is_coming_back();
                self.overdue = false;
                let WakeState { backoff, last, unbooked, .. } = self.wake;
                self.wake = WakeState { backoff, last, ..WakeState::default() };
                if unbooked {
                    // The guest was quicker than the delivery.
                    self.woken(WakeCause::Unknown, now);
                }
                if before.hardware == Hardware::LowPower {
                    self.woken(WakeCause::Guest, now);
                }
            }
            PowerEvent::HoldOffElapsed => counters.hold_offs += 1,
            PowerEvent::Entered => counters.entries += 1,
            PowerEvent::EntryRefused => counters.entry_failures += 1,
            PowerEvent::Exited => {
                counters.exits += 1;
                self.reset_tried = false;
            }
            PowerEvent::ResetAnswered => {
                counters.recoveries += 1;
                self.reset_tried = false;
            }
            PowerEvent::ExitFailed | PowerEvent::Gone => {
                counters.losses += 1;
                self.back_for_port = false;
            }
            PowerEvent::ExitFailedReset => {
                counters.losses += 1;
                self.reset_tried = true;
            }
            PowerEvent::ResetFailed => self.back_for_port = false,
            PowerEvent::D3hotSet => counters.parkings += 1,
            PowerEvent::Restrain if before.hardware == Hardware::LowPower => self.woken(WakeCause::Host, now),
            PowerEvent::Woke => {
                counters.wakes += 1;
                self.wake.bit = false;
                self.wake.retries = 0;
                self.wake.at = Some(now);
                self.wake.unbooked = true;
                self.pace_wakes(now);
            }
            PowerEvent::ReentryDue => {
                counters.reentries += 1;
                self.wake.bit = false;
            }
            _ => {}
        }
    }

    /// Books a wake whose cause is known by now.
    pub(crate) fn woken(&mut self, cause: WakeCause, now: Instant) {
        self.counters.wakes_by[cause as usize] += 1;
        self.last_wake = Some((now, cause));
        self.outbox.woken(cause, now);
    }

    /// Books something that went wrong; `message` says what to do.
    pub(crate) fn failed(&mut self, kind: FailureKind, message: String, now: Instant) {
        self.counters.failures[kind as usize] += 1;
        self.outbox.failed(kind, message, now);
    }

    /// Whether low power may be entered now; takes the toggle out of the budget if so. Books what speaks against it.
    pub(crate) fn admit(&mut self, latched: bool, now: Instant) -> Admission {
        let denial = match self.policy.power {
            PowerChoice::Off => Denial::PowerOff,
            PowerChoice::D3hot => Denial::D3hotOnly,
            PowerChoice::Auto if latched => Denial::Latched,
            PowerChoice::Auto => match self.toggles.take(now) {
                Ok(()) => return Admission::Enter,
                Err(wait) => {
                    self.deny(Denial::Budget, Some(wait), now);
                    return Admission::Later(wait);
                }
            },
        };
        if denial == Denial::D3hotOnly {
            // Asked again once hardware is there: that is no second denial.
            if self.power.hardware != Hardware::D3hot {
                self.deny(denial, None, now);
            }
            return Admission::Shallow;
        }
        self.deny(denial, None, now);
        Admission::Denied(denial)
    }

    fn deny(&mut self, why: Denial, wait: Option<Duration>, now: Instant) {
        self.counters.denials[why as usize] += 1;
        self.outbox.denied(why, wait, now);
    }

    /// Another policy from now on. The timer that runs is left alone.
    pub(crate) fn set_policy(&mut self, policy: Policy, now: Instant) {
        self.toggles.set_rate(policy.toggles, now);
        self.wakes.set_rate(policy.wake_rate(), now);
        self.policy = policy;
    }

    /// Wakes that come faster than they may double what is added to hold-offs.
    fn pace_wakes(&mut self, now: Instant) {
        let (first, most) = self.storm_bounds;
        if self.wakes.take(now).is_err() {
            self.storm = self.storm.saturating_mul(2).clamp(first, most);
        }
    }

    /// What a wake storm adds to a hold-off; a rest takes it away.
    fn storm(&mut self, now: Instant) -> Duration {
        if self.wakes.is_rested(now) {
            self.storm = Duration::ZERO;
        }
        self.storm
    }

    /// The last wake's time and cause.
    pub(crate) fn last_wake(&self) -> Option<(Instant, WakeCause)> {
        self.last_wake
    }

    /// Since when the function has been in its phase.
    pub(crate) fn since(&self) -> Instant {
        self.since
    }

    /// Arms a timer of the wake's; the state machine arms the others.
    pub(crate) fn arm(&mut self, after: Duration, kind: TimerKind, now: Instant) {
        self.timer = self.timer_in(after, kind, now);
    }

    fn timer_in(&self, after: Duration, kind: TimerKind, now: Instant) -> Option<Timer> {
        // A delay too long for the clock never ends.
        now.checked_add(after).map(|at| Timer { at, kind })
    }

    /// Takes the timer if it is due.
    pub(crate) fn take_due(&mut self, now: Instant, paused: bool) -> Option<TimerKind> {
        let timer = self.timer.filter(|timer| timer.at <= now && !(paused && timer.kind.is_wake()))?;
        self.timer = None;
        Some(timer.kind)
    }

    /// On for the guest and the guest let in.
    pub(crate) fn is_ready(&self) -> bool {
        self.power.gate_open() && self.gate_is_open
    }

    /// `_ON` asked for and not carried out.
    pub(crate) fn is_busy(&self) -> bool {
        self.power.is_coming_back() || (self.power.gate_open() && !self.gate_is_open)
    }

    /// Whether the guest's `_ON` has taken longer than it may. Books it the first time.
    pub(crate) fn note_overdue(&mut self, now: Instant) -> bool {
        let waited = self.on_requested.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let first = !self.overdue && self.is_busy() && waited >= self.policy.on_timeout;
        self.overdue |= first;
        first
    }

    /// Whether the guest is to wait.
    pub(crate) fn is_awaited(&self) -> bool {
        self.is_busy() && !self.overdue
    }

    /// The STATUS register of the function's resource.
    pub(crate) fn status(&self) -> u32 {
        let bit = |set: bool, bit: u32| if set { bit } else { 0 };
        let given_up = self.is_busy() && self.overdue;
        bit(self.is_ready(), STATUS_ON)
            | bit(self.is_awaited(), STATUS_BUSY)
            | bit(self.power.phase() == Phase::Lost || given_up, STATUS_LOST)
    }

    /// The wait before answering an unwanted wake: doubles as long as wakes keep coming.
    pub(crate) fn next_backoff(&mut self, now: Instant, timing: &Timing) -> Duration {
        let quiet =
            self.wake.last.is_none_or(|last| now.saturating_duration_since(last) >= timing.reentry_quiet);
        let wait = match self.wake.backoff.filter(|_| !quiet) {
            Some(last) => last.saturating_mul(2).min(timing.reentry_max),
            None => timing.reentry_first,
        };
        self.wake.backoff = Some(wait);
        self.wake.last = Some(now);
        wait.max(self.storm(now))
    }

    /// Whether one more line that the guest has caused may go to the log.
    pub(crate) fn may_log(&mut self, now: Instant) -> bool {
        if now.saturating_duration_since(self.lines_from) >= Duration::from_secs(1) {
            self.lines_from = now;
            self.lines = 0;
        }
        self.lines = self.lines.saturating_add(1);
        self.lines <= LINES_PER_SECOND
    }

    /// The guest has been told through the event device.
    pub(crate) fn count_notification(&mut self, now: Instant) {
        self.counters.notifications += 1;
        // Told again, it is not the VMM that took so long.
        if let Some(woken) = self.wake.at.take() {
            self.counters.wake_latency.add(now.saturating_duration_since(woken));
        }
    }

    /// The guest has been told through the root port.
    pub(crate) fn count_native_pme(&mut self) {
        self.counters.native_pmes += 1;
    }

    /// The counters, with the time of the present phase up to now.
    pub(crate) fn counters(&self, now: Instant) -> Counters {
        let mut counters = self.counters.clone();
        let spent = &mut counters.time_in[self.power.phase() as usize];
        *spent = spent.saturating_add(now.saturating_duration_since(self.since));
        counters
    }

    fn account(&mut self, from: Phase, to: Phase, now: Instant) {
        let stayed = now.saturating_duration_since(self.since);
        let spent = &mut self.counters.time_in[from as usize];
        *spent = spent.saturating_add(stayed);
        self.since = now;
        self.counters.transitions += 1;
        self.outbox.transition(from, to, stayed, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(now: Instant) -> MemberState {
        MemberState::new(now, Policy::default(), true, &Timing::default(), false)
    }

    /// One trip to low power; whether it was let there at once, and the hold-off before it.
    fn sleep(member: &mut MemberState, now: Instant) -> (bool, Duration) {
        member.apply(PowerEvent::Off, now);
        let admitted = member.admit(false, now) == Admission::Enter;
        let hold_off = member.held_off;
        member.apply(PowerEvent::HoldOffElapsed, now);
        member.apply(PowerEvent::Entered, now);
        (admitted, hold_off)
    }

    fn back(member: &mut MemberState, now: Instant) {
        member.apply(PowerEvent::On, now);
        member.apply(PowerEvent::Exited, now);
        member.on_requested = None;
    }

    #[test]
    fn eight_cycles_a_second_for_ten_minutes_are_within_the_default_budget() {
        let mut now = Instant::now();
        let mut member = member(now);
        for cycle in 0..4800 {
            assert_eq!(sleep(&mut member, now), (true, Policy::default().hold_off), "cycle {cycle}");
            back(&mut member, now);
            now += Duration::from_millis(125);
        }
    }

    #[test]
    fn four_wakes_a_second_for_ten_minutes_are_no_storm_and_twenty_are() {
        let mut now = Instant::now();
        for (gap, calm) in [(250, true), (50, false)] {
            let mut member = member(now);
            let wakes = 600_000 / gap;
            let mut longest = Duration::ZERO;
            for _ in 0..wakes {
                longest = longest.max(sleep(&mut member, now).1);
                member.apply(PowerEvent::Woke, now);
                back(&mut member, now);
                now += Duration::from_millis(gap);
            }
            let usual = Policy::default().hold_off;
            if calm {
                assert_eq!(longest, usual);
            } else {
                assert_eq!(longest, usual + Timing::default().storm_max, "up to the bound and no further");
            }
        }
    }

    #[test]
    fn a_storm_is_forgotten_after_a_rest() {
        let start = Instant::now();
        let mut member = member(start);
        for _ in 0..400 {
            sleep(&mut member, start);
            member.apply(PowerEvent::Woke, start);
            back(&mut member, start);
        }
        let usual = Policy::default().hold_off;
        assert!(sleep(&mut member, start).1 > usual);
        back(&mut member, start);
        let soon = start + Duration::from_secs(1);
        assert!(sleep(&mut member, soon).1 > usual);
        back(&mut member, soon);
        assert_eq!(sleep(&mut member, start + Duration::from_secs(120)).1, usual, "without a wake");
    }

    #[test]
    fn what_a_latch_denies_costs_no_budget() {
        let now = Instant::now();
        let mut member = member(now);
        for _ in 0..5000 {
            assert_eq!(member.admit(true, now), Admission::Denied(Denial::Latched));
        }
        assert_eq!(member.admit(false, now), Admission::Enter);
    }
}
