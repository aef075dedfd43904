//! What must not go wrong when something else does: policies, budgets, storms, time-outs, lost devices. docs/power.md lists all failure
//! modes with their tests; those of the ordinary trip are in [`super::tests`].

use std::sync::Arc;
use std::time::{Duration, Instant};

use acpi::notify_abi::{STATUS_BUSY, STATUS_LOST, STATUS_ON};

use super::ControlError;
use crate::bucket::Rate;
use crate::event::News;
use crate::fake::{Call, EntryFailure, FakeFunction, Slot, eventually};
use crate::gate::FunctionGate;
use crate::offer::PowerChoice;
use crate::policy::{LostPolicy, Policy, PolicyChange, WakePolicy};
use crate::state::Phase;
use crate::stats::{Counters, Denial, FailureKind, WakeCause};

fn slot(change: impl Fn(&mut Policy)) -> Slot {
    Slot::with(1, |spec| spec.members.iter_mut().for_each(|member| change(&mut member.policy)))
}

fn phase(slot: &Slot, function: usize) -> Phase {
    slot.domain.report()[function].phase
}

fn counters(slot: &Slot) -> Counters {
    slot.domain.report()[0].counters.clone()
}

fn status(slot: &Slot) -> u32 {
    slot.domain.status(slot.resource(0))
}

fn off(slot: &Slot) {
    slot.domain.request(slot.resource(0), false);
}

fn on(slot: &Slot) {
    slot.domain.request(slot.resource(0), true);
}

fn on_and_ready(slot: &Slot) {
    on(slot);
    eventually("the function is ready", || status(slot) == STATUS_ON);
}

fn power(choice: PowerChoice) -> PolicyChange {
    PolicyChange { power: Some(choice), ..PolicyChange::default() }
}

/// Puts the function to sleep and lets it come back dead.
fn lose(slot: &Slot) {
    slot.off_and_entered(0);
    slot.functions[0].script(|script| script.answers = [false].into());
    on(slot);
}

#[test]
fn a_guest_that_flaps_past_its_budget_is_answered_and_its_device_stays_powered_for_a_while() {
    // Two in a row, then one every two seconds.
    let slot = slot(|policy| policy.toggles = Rate { per_minute: 30, burst: 2 });
    for _ in 0..2 {
        slot.off_and_entered(0);
        on_and_ready(&slot);
    }
    off(&slot);
    assert_eq!(status(&slot), 0, "_OFF is answered as ever");
    eventually("the third is put off", || counters(&slot).denials[Denial::Budget as usize] == 1);
    assert_eq!((phase(&slot, 0), slot.functions[0].is_engaged()), (Phase::HoldOff, false));
    assert!(slot.news.has(|news| matches!(news, News::Denied { why: "budget", wait_ms: Some(_) })));
    slot.functions[0].wait_engaged();
    on_and_ready(&slot);
}

#[test]
fn an_on_while_the_budget_is_used_up_costs_nothing() {
    let slot = slot(|policy| policy.toggles = Rate { per_minute: 1, burst: 1 });
    slot.off_and_entered(0);
    on_and_ready(&slot);
    for _ in 0..20 {
        off(&slot);
        std::thread::sleep(Duration::from_millis(8));
        on(&slot);
        assert_eq!(status(&slot), STATUS_ON, "no polling while it has stayed on");
    }
    assert_eq!(slot.functions[0].count(Call::EnterWithWakeup), 1);
}

#[test]
fn an_on_that_takes_too_long_is_told_lost_and_the_device_is_welcome_when_it_comes_back() {
    let slot = slot(|policy| policy.on_timeout = Duration::from_millis(100));
    slot.off_and_entered(0);
    slot.functions[0].script(|script| script.delay = Duration::from_secs(2));
    on(&slot);
    assert_eq!(status(&slot), STATUS_BUSY);
    let asked = Instant::now();
    eventually("the guest is told", || status(&slot) == STATUS_LOST);
    assert!(
        asked.elapsed() < Duration::from_millis(1800),
        "not before the device was back: {:?}",
        asked.elapsed()
    );
    assert!(slot.functions[0].is_lost() && !slot.functions[0].gate_is_open());
    assert_eq!(counters(&slot).failures[FailureKind::OnTimeout as usize], 1);
    assert!(slot.news.has(|news| matches!(news, News::Failed { failure: "on-timeout", .. })));
    eventually("back after all", || status(&slot) == STATUS_ON);
    assert!(!slot.functions[0].is_lost() && slot.functions[0].gate_is_open());
    assert_eq!(counters(&slot).losses, 0);
    assert_eq!(slot.domain.report()[0].latched_by, None, "late is not dead");
}

#[test]
fn an_overdue_function_does_not_keep_its_port_busy() {
    let slot = slot(|policy| policy.on_timeout = Duration::from_millis(100));
    slot.domain.request(Slot::PORT, false);
    slot.functions[0].wait_engaged();
    slot.functions[0].script(|script| script.delay = Duration::from_secs(2));
    slot.domain.request(Slot::PORT, true);
    assert_eq!(slot.domain.status(Slot::PORT), STATUS_ON | STATUS_BUSY);
    let asked = Instant::now();
    eventually("the port is done", || slot.domain.status(Slot::PORT) == STATUS_ON);
    assert!(asked.elapsed() < Duration::from_millis(1800), "{:?}", asked.elapsed());
}

#[test]
fn a_lost_device_is_reset_once_and_the_guests_on_ends_well_when_that_helps() {
    let slot = Slot::new(1);
    lose(&slot);
    eventually("ready", || status(&slot) == STATUS_ON);
    use Call::*;
    assert_eq!(slot.functions[0].calls(), [Close, EnterWithWakeup, Exit, Settle, Exit, Reset, Open]);
    let counters = counters(&slot);
    assert_eq!((counters.losses, counters.recoveries), (1, 1));
    assert!(slot.news.has(|news| matches!(news, News::Recovered)));
    assert!(slot.domain.report()[0].latched_by.is_some(), "it is not trusted again all the same");
}

#[test]
fn a_device_that_no_reset_helps_is_lost_and_the_vm_lives_on() {
    let slot = Slot::new(2);
    slot.functions[0].script(|script| script.resets = [false].into());
    lose(&slot);
    eventually("lost", || status(&slot) == STATUS_LOST);
    eventually("the gate is told", || slot.functions[0].is_lost());
    assert_eq!(counters(&slot).failures[FailureKind::ResetFailed as usize], 1);
    let advice = |news: &News| matches!(news, News::Failed { message, .. } if message.contains("kernel log"));
    assert!(slot.news.has(advice), "the operator is told what to do: {:?}", slot.news.told());
    // Each further _ON looks again, but resets no more.
    slot.functions[0].script(|script| script.answers = [false].into());
    on(&slot);
    eventually("looked again", || slot.functions[0].count(Call::Settle) == 2);
    eventually("lost again", || status(&slot) == STATUS_LOST);
    assert_eq!(slot.functions[0].count(Call::Reset), 1);
    assert_eq!(slot.domain.status(slot.resource(1)), STATUS_ON, "its sibling is as it was");
    on_and_ready(&slot);
}

#[test]
fn a_device_to_be_kept_is_not_reset() {
    let slot = slot(|policy| policy.on_lost = LostPolicy::Keep);
    lose(&slot);
    eventually("lost", || status(&slot) == STATUS_LOST);
    assert_eq!(slot.functions[0].count(Call::Reset), 0);
}

#[test]
fn a_latched_slot_answers_off_and_never_sleeps_until_the_latch_is_cleared() {
    let slot = Slot::new(2);
    lose(&slot);
    eventually("ready", || status(&slot) == STATUS_ON);
    let entries = || slot.functions.iter().map(|f| f.count(Call::EnterWithWakeup)).sum::<usize>();
    let before = entries();
    for function in 0..2 {
        slot.domain.request(slot.resource(function), false);
        eventually("held", || phase(&slot, usize::from(function)) == Phase::Held);
        assert_eq!(slot.domain.status(slot.resource(function)), 0, "_OFF is answered as ever");
    }
    assert_eq!(entries(), before);
    assert_eq!(slot.domain.report()[1].counters.denials[Denial::Latched as usize], 1);
    on_and_ready(&slot);
    off(&slot);
    eventually("held", || phase(&slot, 0) == Phase::Held);
    assert!(slot.domain.clear_latch());
    slot.functions[0].wait_engaged();
    slot.functions[1].wait_engaged();
    assert!(!slot.domain.clear_latch(), "there is none any more");
    on_and_ready(&slot);
}

#[test]
fn a_latch_outlives_its_domain() {
    let bdf = FakeFunction::new(0).bdf();
    let slot = Slot::with(1, |spec| spec.latched_by = Some(bdf));
    off(&slot);
    eventually("held", || phase(&slot, 0) == Phase::Held);
    assert_eq!(slot.domain.report()[0].latched_by, Some(bdf));
    assert!(slot.domain.clear_latch());
    slot.functions[0].wait_engaged();
}

#[test]
fn an_operator_brings_a_lost_device_back_by_a_reset() {
    let slot = slot(|policy| policy.on_lost = LostPolicy::Keep);
    let bdf = slot.functions[0].bdf();
    assert_eq!(slot.domain.recover(bdf), Err(ControlError::NotLost(bdf)));
    lose(&slot);
    eventually("lost", || status(&slot) == STATUS_LOST);
    slot.domain.recover(bdf).unwrap();
    eventually("ready", || status(&slot) == STATUS_ON);
    assert_eq!(slot.functions[0].count(Call::Reset), 1);
    assert!(!slot.functions[0].is_lost());
    let stranger = FakeFunction::new(7).bdf();
    assert_eq!(slot.domain.recover(stranger), Err(ControlError::NoFunction(stranger)));
}

#[test]
fn an_entry_that_stays_engaged_whatever_is_tried_leaves_hardware_on() {
    let slot = Slot::new(1);
    slot.functions[0].script(|script| {
        script.entries = [Some(EntryFailure::Engaged)].into();
        script.exits = [false].into();
    });
    off(&slot);
    eventually("held", || phase(&slot, 0) == Phase::Held);
    assert_eq!(counters(&slot).entry_failures, 1);
    assert_eq!(counters(&slot).failures[FailureKind::EntryEngaged as usize], 2);
    on_and_ready(&slot);
}

#[test]
fn every_way_to_refuse_an_entry_has_a_name_and_a_remedy() {
    for (failure, kind, remedy) in [
        (EntryFailure::Unsupported, FailureKind::EntryUnsupported, "6.1"),
        (EntryFailure::Io, FailureKind::EntryRefused, "kernel log"),
        (EntryFailure::Descriptor, FailureKind::EntryDescriptor, "ulimit"),
    ] {
        let slot = Slot::new(1);
        slot.functions[0].script(|script| script.entries = [Some(failure)].into());
        off(&slot);
        eventually("held", || phase(&slot, 0) == Phase::Held);
        assert_eq!(counters(&slot).failures[kind as usize], 1, "{failure:?}");
        let said = |news: &News| matches!(news, News::Failed { message, .. } if message.contains(remedy));
        eventually("told", || slot.news.has(said));
        on_and_ready(&slot);
    }
}

#[test]
fn a_wake_before_the_entry_is_no_event_and_one_right_after_it_is() {
    let slot = slot(|policy| policy.hold_off = Duration::from_millis(500));
    let function = &slot.functions[0];
    function.set_pme_enabled(true);
    off(&slot);
    assert!(!function.host_wake(), "the device is on: the host has nothing to wake");
    eventually("woken in the moment of entry", || function.host_wake());
    eventually("the guest is told", || slot.wake.count() == 1);
    assert_eq!(counters(&slot).wakes, 1);
    on_and_ready(&slot);
}

#[test]
fn a_wake_storm_makes_each_hold_off_longer_up_to_a_bound() {
    let slot = Slot::with(1, |spec| {
        spec.members[0].policy.wake_storm = 4;
        spec.timing.reentry_first = Duration::from_millis(1);
        spec.timing.reentry_max = Duration::from_millis(1);
    });
    let function = &slot.functions[0];
    slot.off_and_entered(0);
    let mut waits = Vec::new();
    for entry in 2..8 {
        let woken = Instant::now();
        assert!(function.host_wake());
        eventually("entered again", || function.count(Call::EnterWithWakeup) == entry);
        waits.push(woken.elapsed());
        eventually("off", || phase(&slot, 0) == Phase::Off);
    }
    for (wait, at_least) in waits.iter().zip([0, 0, 40, 80, 150, 150]) {
        assert!(*wait >= Duration::from_millis(at_least), "{waits:?}");
    }
    on_and_ready(&slot);
    let asked = Instant::now();
    off(&slot);
    function.wait_engaged();
    assert!(asked.elapsed() >= Duration::from_millis(150), "_OFF in a storm: {:?}", asked.elapsed());
    assert_eq!(counters(&slot).storm_hold_offs, 1);
}

#[test]
fn ignored_wakes_are_counted_and_the_function_sleeps_again_without_the_guest() {
    let slot = slot(|policy| policy.wake = WakePolicy::Ignore);
    slot.functions[0].set_pme_enabled(true);
    slot.off_and_entered(0);
    assert!(slot.functions[0].host_wake(), "entered with a wakeup");
    eventually("entered again", || slot.functions[0].count(Call::EnterWithWakeup) == 2);
    assert_eq!((slot.wake.count(), slot.functions[0].pme_status()), (0, false));
    assert_eq!(counters(&slot).wakes_by[WakeCause::Unknown as usize], 1);
}

#[test]
fn siblings_that_the_host_wakes_together_sleep_again_each_by_itself() {
    let slot = Slot::new(2);
    slot.functions[1].set_pme_enabled(true);
    slot.off_and_entered(0);
    slot.off_and_entered(1);
    assert!(slot.functions[0].host_wake() && slot.functions[1].host_wake());
    eventually("the one that asked is told", || slot.domain.take_wake(slot.resource(1)));
    eventually("the other sleeps again", || slot.functions[0].count(Call::EnterWithWakeup) == 2);
    assert!(!slot.domain.take_wake(slot.resource(0)), "it had no PME");
    assert_eq!(slot.functions[1].count(Call::EnterWithWakeup), 1, "its driver may be at work");
}

#[test]
fn a_wake_that_the_guest_has_answered_or_a_reset_has_ended_is_not_told_later() {
    let slot = Slot::with(1, |spec| spec.timing.confirm = Duration::from_secs(3600));
    slot.functions[0].set_pme_enabled(true);
    for reset in [false, true] {
        let told = slot.wake.count();
        slot.off_and_entered(0);
        assert!(slot.functions[0].host_wake());
        eventually("the guest is interrupted", || slot.wake.count() == told + 1);
        if reset {
            assert!(slot.domain.reset(Duration::from_secs(5)));
        } else {
            on_and_ready(&slot);
        }
        assert!(!slot.domain.take_wake(slot.resource(0)), "reset: {reset}");
    }
}

#[test]
fn a_crash_kernel_reads_the_truth_from_status_and_turns_power_on() {
    let slot = Slot::new(1);
    slot.off_and_entered(0);
    assert_eq!(status(&slot), 0, "whoever asks, and whatever AML remembers");
    assert_eq!(slot.domain.status(Slot::PORT), STATUS_ON);
    on_and_ready(&slot);
}

#[test]
fn a_device_pulled_out_of_the_vm_while_off_is_left_to_the_kernel_at_once() {
    let slot = Slot::new(1);
    slot.off_and_entered(0);
    let calls = slot.functions[0].calls().len();
    let started = Instant::now();
    slot.domain.shutdown();
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_eq!(slot.functions[0].calls().len(), calls, "no call to a device that goes");
    let weak = Arc::downgrade(&slot.domain);
    drop(slot);
    assert!(weak.upgrade().is_none());
}

#[test]
fn a_device_that_the_host_wants_back_stays_with_the_guest_as_long_as_it_answers() {
    let slot = Slot::new(1);
    let wanted = |news: &News| matches!(news, News::Failed { failure: "release-wanted", message } if message.contains("stop the VM"));
    slot.functions[0].host_wants_it_back();
    eventually("the operator is told", || slot.news.has(wanted));
    assert_eq!((status(&slot), slot.functions[0].count(Call::Answers)), (STATUS_ON, 1));
    slot.off_and_entered(0);
    slot.functions[0].host_wants_it_back();
    let told = || counters(&slot).failures[FailureKind::ReleaseWanted as usize];
    eventually("told again", || told() == 2);
    assert_eq!(slot.functions[0].count(Call::Answers), 1, "a sleeping device is left asleep");
    assert!(slot.functions[0].is_engaged());
}

#[test]
fn a_device_pulled_out_while_it_is_on_is_taken_from_the_guest_at_once() {
    let slot = Slot::new(2);
    slot.functions[0].script(|script| script.silent = true);
    slot.functions[0].host_wants_it_back();
    eventually("lost", || status(&slot) == STATUS_LOST);
    eventually("all ones", || slot.functions[0].is_lost() && !slot.functions[0].gate_is_open());
    assert!(slot.domain.report()[1].latched_by.is_some());
    assert_eq!(slot.domain.status(slot.resource(1)), STATUS_ON, "its sibling is as it was");
    // The guest's driver still does what it does with a dead device.
    off(&slot);
    slot.functions[0].script(|script| (script.answers, script.resets) = ([false].into(), [false].into()));
    on(&slot);
    eventually("lost for good", || {
        status(&slot) == STATUS_LOST && counters(&slot).failures[FailureKind::ResetFailed as usize] == 1
    });
}

#[test]
fn an_error_of_the_bus_is_told_and_the_device_is_not_asked() {
    let slot = Slot::new(1);
    slot.functions[0].bus_error();
    eventually("told", || slot.news.has(|news| matches!(news, News::Failed { failure: "bus-error", .. })));
    assert_eq!(slot.functions[0].calls(), []);
}

#[test]
fn several_wakes_while_paused_become_one_and_nothing_is_entered_meanwhile() {
    let slot = Slot::new(1);
    slot.off_and_entered(0);
    slot.domain.pause();
    assert!(slot.functions[0].host_wake());
    assert!(!slot.functions[0].host_wake(), "there is nothing to wake any more");
    eventually("noted", || phase(&slot, 0) == Phase::Awake);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(slot.functions[0].count(Call::EnterWithWakeup), 1);
    slot.domain.resume();
    eventually("sleeps again", || slot.functions[0].count(Call::EnterWithWakeup) == 2);
    assert_eq!(counters(&slot).wakes, 1);
}

#[test]
fn power_off_at_run_time_brings_the_device_back_and_auto_lets_it_sleep_again() {
    let slot = Slot::new(1);
    let bdf = slot.functions[0].bdf();
    slot.off_and_entered(0);
    slot.domain.change_policy(bdf, &power(PowerChoice::Off)).unwrap();
    eventually("held", || phase(&slot, 0) == Phase::Held);
    assert!(!slot.functions[0].is_engaged() && !slot.functions[0].gate_is_open());
    assert_eq!(counters(&slot).wakes_by[WakeCause::Host as usize], 1);
    on_and_ready(&slot);
    off(&slot);
    eventually("held", || phase(&slot, 0) == Phase::Held);
    assert_eq!(slot.functions[0].count(Call::EnterWithWakeup), 1);
    slot.domain.change_policy(bdf, &power(PowerChoice::Auto)).unwrap();
    slot.functions[0].wait_engaged();
    on_and_ready(&slot);
}

#[test]
fn d3hot_at_run_time_puts_hardware_there_and_never_in_low_power() {
    let slot = Slot::new(1);
    let (bdf, function) = (slot.functions[0].bdf(), &slot.functions[0]);
    slot.domain.change_policy(bdf, &power(PowerChoice::D3hot)).unwrap();
    off(&slot);
    eventually("D3hot", || function.is_in_d3hot() && phase(&slot, 0) == Phase::D3hot);
    assert_eq!(status(&slot), 0);
    assert_eq!(function.count(Call::EnterWithWakeup), 0);
    assert_eq!(counters(&slot).denials[Denial::D3hotOnly as usize], 1);
    on_and_ready(&slot);
    assert!(!function.is_in_d3hot());
    off(&slot);
    eventually("D3hot", || phase(&slot, 0) == Phase::D3hot);
    slot.domain.change_policy(bdf, &power(PowerChoice::Off)).unwrap();
    eventually("D0", || !function.is_in_d3hot() && phase(&slot, 0) == Phase::Held);
    on_and_ready(&slot);
}

#[test]
fn d3hot_set_while_the_device_sleeps_brings_it_out_of_low_power() {
    let slot = Slot::new(1);
    slot.off_and_entered(0);
    slot.domain.change_policy(slot.functions[0].bdf(), &power(PowerChoice::D3hot)).unwrap();
    eventually("D3hot", || slot.functions[0].is_in_d3hot() && phase(&slot, 0) == Phase::D3hot);
    assert!(!slot.functions[0].is_engaged());
    slot.domain.change_policy(slot.functions[0].bdf(), &power(PowerChoice::Auto)).unwrap();
    slot.functions[0].wait_engaged();
    on_and_ready(&slot);
}

#[test]
fn with_power_off_the_guests_d3hot_is_a_model_only() {
    let slot = slot(|policy| policy.power = PowerChoice::Off);
    let function = &slot.functions[0];
    function.guest_writes_d3hot(&slot.domain);
    std::thread::sleep(Duration::from_millis(40));
    assert!(!function.is_in_d3hot());
    assert!(function.guest_writes_d0(&slot.domain));
    function.guest_writes_d3hot(&slot.domain);
    slot.domain.change_policy(function.bdf(), &power(PowerChoice::D3hot)).unwrap();
    eventually("hardware follows", || function.is_in_d3hot());
    slot.domain.change_policy(function.bdf(), &power(PowerChoice::Off)).unwrap();
    eventually("and comes back", || !function.is_in_d3hot());
}

#[test]
fn what_was_not_offered_at_start_cannot_be_offered_later_and_says_so() {
    let slot = Slot::with(1, |spec| spec.members[0].resource = None);
    let bdf = slot.functions[0].bdf();
    let error = slot.domain.change_policy(bdf, &power(PowerChoice::Auto)).unwrap_err();
    assert_eq!(error, ControlError::NotOffered(bdf));
    assert!(error.to_string().contains("start the VM with power=auto"), "{error}");
    let wrong = PolicyChange { on_timeout: Some(1), ..PolicyChange::default() };
    assert!(matches!(slot.domain.change_policy(bdf, &wrong), Err(ControlError::Policy(_))));
    assert_eq!(slot.domain.policy(bdf).unwrap().on_timeout, Policy::default().on_timeout);
}

#[test]
fn a_changed_hold_off_and_wake_policy_count_from_the_next_off() {
    let slot = slot(|policy| policy.hold_off = Duration::from_secs(3600));
    let change =
        PolicyChange { hold_off: Some(1), wake: Some(WakePolicy::HostOnly), ..PolicyChange::default() };
    slot.domain.change_policy(slot.functions[0].bdf(), &change).unwrap();
    slot.off_and_entered(0);
    assert_eq!(slot.functions[0].count(Call::Enter), 1);
    on_and_ready(&slot);
}

#[test]
fn a_trip_is_told_step_by_step_and_counted_without_touching_the_device() {
    let slot = Slot::new(1);
    slot.functions[0].set_pme_enabled(true);
    slot.off_and_entered(0);
    slot.functions[0].host_wake();
    eventually("the guest is told", || slot.wake.count() == 1);
    on_and_ready(&slot);
    slot.off_and_entered(0);
    on_and_ready(&slot);
    eventually("the last step is told", || {
        let told = slot.news.told();
        told.last().is_some_and(|last| matches!(last.news, News::Transition { to: "on", .. }))
    });
    let steps: Vec<&str> = slot
        .news
        .told()
        .iter()
        .filter_map(|told| match told.news {
            News::Transition { to, .. } => Some(to),
            _ => None,
        })
        .collect();
    let there = ["hold-off", "entering", "off"];
    let expected = [&there[..], &["awake", "exiting", "on"], &there, &["exiting", "on"]].concat();
    assert_eq!(steps, expected);

    let calls = slot.functions[0].calls().len();
    let snapshot = slot.domain.snapshots().remove(0);
    assert_eq!((snapshot.state, snapshot.transitions), ("on", 11));
    assert_eq!(
        (snapshot.counts["entries"], snapshot.counts["exits"], snapshot.counts["hold_offs"]),
        (2, 2, 2)
    );
    assert_eq!((snapshot.wakes["pme"], snapshot.wakes["guest"]), (1, 1));
    let histograms = [&snapshot.entry_latency, &snapshot.exit_latency, &snapshot.ready_latency];
    assert_eq!(histograms.map(|histogram| histogram.count), [2, 2, 2]);
    assert_eq!(snapshot.wake_latency.count, 1);
    assert!(snapshot.time_in_ms.contains_key("off") && snapshot.last_wake_ms.is_some());
    assert_eq!(slot.functions[0].calls().len(), calls, "reading it touches no device");
}

/// A small xorshift generator: reproducible, no dependency.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state >> 20
}

#[test]
fn guest_host_operator_and_failing_hardware_at_random_end_in_a_working_slot() {
    let slot = Slot::with(2, |spec| {
        for member in &mut spec.members {
            member.policy.hold_off = Duration::from_micros(100);
            member.policy.toggles = Rate { per_minute: 60_000, burst: 20 };
        }
        spec.timing.park = Duration::from_micros(200);
        spec.timing.confirm = Duration::from_micros(300);
        spec.timing.reentry_first = Duration::from_micros(100);
        spec.timing.storm_first = Duration::from_micros(100);
        spec.timing.storm_max = Duration::from_micros(500);
    });
    let shared = &slot;
    std::thread::scope(|scope| {
        for seed in [0x1234_5678_9abc_def1_u64, 0xfeed_beef_0bad_cafe, 0x0dd0_5eed_0dd0_5eed] {
            scope.spawn(move || {
                let mut state = seed;
                for _ in 0..1500 {
                    let roll = random(&mut state);
                    let number = u8::from(roll & 0x100 != 0);
                    let function = &shared.functions[usize::from(number)];
                    let bdf = function.bdf();
                    match roll % 17 {
                        0..=2 => shared.domain.request(shared.resource(number), false),
                        3..=5 => shared.domain.request(shared.resource(number), true),
                        6 => shared.domain.request(Slot::PORT, roll & 0x200 != 0),
                        7 => function.guest_writes_d3hot(&shared.domain),
                        8 => drop(function.guest_writes_d0(&shared.domain)),
                        9 => drop(shared.domain.take_wake(shared.resource(number))),
                        10 => drop(function.host_wake()),
                        11 => {
                            let choices = [PowerChoice::Auto, PowerChoice::D3hot, PowerChoice::Off];
                            let wakes = [WakePolicy::Notify, WakePolicy::Ignore, WakePolicy::HostOnly];
                            let pick = usize::try_from((roll >> 12) % 3).unwrap();
                            let change = PolicyChange {
                                power: Some(choices[pick]),
                                wake: Some(wakes[usize::try_from((roll >> 16) % 3).unwrap()]),
                                ..PolicyChange::default()
                            };
                            shared.domain.change_policy(bdf, &change).unwrap();
                        }
                        12 => drop(shared.domain.clear_latch()),
                        13 => drop(shared.domain.recover(bdf)),
                        14 => function.host_wants_it_back(),
                        15 => function.script(|script| {
                            script.answers.push_back(roll & 0x1000 != 0);
                            script.resets.push_back(roll & 0x2000 != 0);
                            script.exits.push_back(roll & 0xc000 != 0);
                            let failure = [None, Some(EntryFailure::Engaged), Some(EntryFailure::Io)];
                            script.entries.push_back(failure[usize::try_from((roll >> 16) % 3).unwrap()]);
                            script.silent = roll & 0xf0_0000 == 0;
                        }),
                        _ => drop(shared.domain.snapshots()),
                    }
                    if roll & 0x400 != 0 {
                        std::thread::sleep(Duration::from_micros((roll >> 24) % 500));
                    }
                }
            });
        }
    });
    for function in &slot.functions {
        function.script(|script| *script = crate::fake::Script::default());
        slot.domain.change_policy(function.bdf(), &power(PowerChoice::Auto)).unwrap();
    }
    // What the last failure has begun ends first; then everything is well.
    std::thread::sleep(Duration::from_millis(50));
    assert!(slot.domain.reset(Duration::from_secs(5)), "{:?}", slot.domain.report());
    slot.domain.clear_latch();
    for (number, function) in (0_u8..).zip(&slot.functions) {
        assert!(function.gate_is_open() && !function.is_engaged() && !function.is_in_d3hot(), "{function:?}");
        assert!(function.count(Call::Reset) > 0 && function.count(Call::EnterWithWakeup) > 0, "{function:?}");
        slot.domain
            .change_policy(
                function.bdf(),
                &PolicyChange {
                    wake: Some(WakePolicy::Notify),
                    toggle_rate: Some(0),
                    ..PolicyChange::default()
                },
            )
            .unwrap();
        slot.off_and_entered(number);
        slot.domain.request(slot.resource(number), true);
        eventually("ready", || slot.domain.status(slot.resource(number)) == STATUS_ON);
    }
}
