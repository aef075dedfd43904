//! The races and failures of a power domain, driven by fake functions.

use std::sync::Arc;
use std::time::{Duration, Instant};

use acpi::notify_abi::{STATUS_BUSY, STATUS_LOST, STATUS_ON};

use crate::fake::{Call, EntryFailure, Slot, eventually};
use crate::policy::{LostPolicy, WakePolicy};
use crate::spec::Timing;
use crate::state::Phase;

fn ready(slot: &Slot, function: u8) -> bool {
    slot.domain.status(slot.resource(function)) == STATUS_ON
}

fn on_and_ready(slot: &Slot, function: u8) {
    slot.domain.request(slot.resource(function), true);
    eventually("the function is ready", || ready(slot, function));
}

fn phase(slot: &Slot, function: usize) -> Phase {
    slot.domain.report()[function].phase
}

#[test]
fn off_then_on_takes_the_function_through_low_power_and_back() {
    let slot = Slot::new(1);
    slot.domain.request(slot.resource(0), false);
    assert!(!slot.functions[0].gate_is_open(), "the guest is out when _OFF returns");
    assert_eq!(slot.domain.status(slot.resource(0)), 0);
    slot.functions[0].wait_engaged();
    on_and_ready(&slot, 0);
    assert!(slot.functions[0].gate_is_open());
    use Call::*;
    assert_eq!(slot.functions[0].calls(), [Close, EnterWithWakeup, Exit, Settle, Open]);
    let counters = &slot.domain.report()[0].counters;
    assert_eq!((counters.entries, counters.exits, counters.wakes), (1, 1, 0));
}

#[test]
fn on_inside_the_hold_off_is_ready_at_once_and_touches_no_hardware() {
    let slot = Slot::with(1, |spec| spec.members[0].policy.hold_off = Duration::from_secs(3600));
    for _ in 0..1000 {
        slot.domain.request(slot.resource(0), false);
        slot.domain.request(slot.resource(0), true);
        assert!(ready(&slot, 0), "no polling inside the hold-off");
    }
    assert_eq!(slot.functions[0].count(Call::EnterWithWakeup), 0);
    assert_eq!(slot.functions[0].count(Call::Exit), 0);
}

#[test]
fn a_vcpu_never_waits_for_slow_hardware() {
    let slot = Slot::new(1);
    slot.functions[0].script(|script| script.delay = Duration::from_secs(1));
    slot.domain.request(slot.resource(0), false);
    eventually("entry is under way", || phase(&slot, 0) == Phase::Entering);
    let started = Instant::now();
    slot.domain.request(slot.resource(0), true);
    assert_eq!(slot.domain.status(slot.resource(0)), STATUS_BUSY);
    slot.domain.request(slot.resource(0), false);
    slot.domain.request(slot.resource(0), true);
    assert!(started.elapsed() < Duration::from_millis(500), "took {:?}", started.elapsed());
    eventually("ready in the end", || ready(&slot, 0));
    assert_eq!(slot.functions[0].count(Call::EnterWithWakeup), 1);
    assert_eq!(slot.functions[0].count(Call::Exit), 1);
}

#[test]
fn off_while_coming_back_leaves_the_gate_closed_and_sleeps_again() {
    let slot = Slot::new(1);
    slot.off_and_entered(0);
    slot.functions[0].script(|script| script.delay = Duration::from_millis(200));
    slot.domain.request(slot.resource(0), true);
    slot.domain.request(slot.resource(0), false);
    eventually("a second entry", || slot.functions[0].count(Call::EnterWithWakeup) == 2);
    assert_eq!(slot.functions[0].count(Call::Open), 0);
}

#[test]
fn an_entry_refused_as_engaged_is_retried_once_after_an_exit() {
    let slot = Slot::new(1);
    slot.functions[0].script(|script| script.entries = [Some(EntryFailure::Engaged)].into());
    slot.off_and_entered(0);
    use Call::*;
    assert_eq!(slot.functions[0].calls(), [Close, EnterWithWakeup, Exit, EnterWithWakeup]);
    assert_eq!(phase(&slot, 0), Phase::Off);
}

#[test]
fn an_entry_that_fails_for_good_keeps_the_function_off_for_the_guest_with_hardware_on() {
    for failure in [EntryFailure::Unsupported, EntryFailure::Io] {
        let slot = Slot::new(1);
        slot.functions[0].script(|script| script.entries = [Some(failure)].into());
        slot.domain.request(slot.resource(0), false);
        eventually("held", || phase(&slot, 0) == Phase::Held);
        assert_eq!(slot.domain.status(slot.resource(0)), 0);
        assert!(!slot.functions[0].gate_is_open());
        assert_eq!(slot.domain.report()[0].counters.entry_failures, 1);
        on_and_ready(&slot, 0);
    }
}

#[test]
fn a_device_that_does_not_answer_is_lost_until_an_on_finds_it_again() {
    for exit_fails in [false, true] {
        let slot = Slot::with(1, |spec| spec.members[0].policy.on_lost = LostPolicy::Keep);
        slot.off_and_entered(0);
        slot.functions[0].script(|script| {
            if exit_fails {
                script.exits = [false].into();
            } else {
                script.answers = [false].into();
            }
        });
        slot.domain.request(slot.resource(0), true);
        eventually("lost", || slot.domain.status(slot.resource(0)) == STATUS_LOST);
        eventually("the gate is told", || slot.functions[0].is_lost());
        assert!(!slot.functions[0].gate_is_open());
        on_and_ready(&slot, 0);
        assert!(!slot.functions[0].is_lost());
        assert_eq!(slot.domain.report()[0].counters.losses, 1);
    }
}

#[test]
fn the_eventfd_of_its_own_exit_is_no_wake() {
    let slot = Slot::new(1);
    slot.functions[0].set_pme_enabled(true);
    for _ in 0..20 {
        slot.off_and_entered(0);
        on_and_ready(&slot, 0);
    }
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(slot.wake.count(), 0);
    assert_eq!(slot.domain.report()[0].counters.wakes, 0);
}

#[test]
fn off_then_host_wake_raises_one_pme_through_the_event_device_when_the_guest_reads_the_bit() {
    let slot = Slot::with(1, |spec| spec.timing.confirm = Duration::from_secs(2));
    slot.functions[0].set_pme_enabled(true);
    slot.off_and_entered(0);
    slot.functions[0].host_wake();
    eventually("the guest is interrupted", || slot.wake.count() == 1);
    assert!(slot.functions[0].pme_status());
    assert!(slot.domain.take_wake(slot.resource(0)));
    assert!(!slot.domain.take_wake(slot.resource(0)), "once");
    on_and_ready(&slot, 0);
    std::thread::sleep(Duration::from_millis(60));
    assert_eq!(slot.wake.count(), 1);
    assert!(slot.pme.raised().is_empty());
    assert_eq!(slot.functions[0].count(Call::EnterWithWakeup), 1);
}

#[test]
fn a_guest_that_does_not_read_the_bit_gets_the_root_ports_pme_instead_of_it() {
    let slot = Slot::with(1, |spec| spec.timing.retries = vec![Duration::from_secs(3600)]);
    slot.functions[0].set_pme_enabled(true);
    slot.off_and_entered(0);
    let woken = Instant::now();
    slot.functions[0].host_wake();
    eventually("the root port is asked", || slot.pme.raised().len() == 1);
    assert!(woken.elapsed() >= Duration::from_millis(30), "the guest had its time: {:?}", woken.elapsed());
    assert!(
        Timing::default().confirm <= Duration::from_millis(50),
        "the driver is to be woken within 100 ms"
    );
    assert!(!slot.domain.take_wake(slot.resource(0)), "the bit is withdrawn: one path per wake");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!((slot.wake.count(), slot.pme.raised().len()), (1, 1));
}

#[test]
fn a_port_without_pme_interrupts_leaves_the_wake_with_the_event_device() {
    let slot = Slot::with(1, |spec| spec.timing.retries = vec![Duration::from_secs(3600)]);
    slot.pme.refuse(true);
    slot.functions[0].set_pme_enabled(true);
    slot.off_and_entered(0);
    slot.functions[0].host_wake();
    eventually("told again", || slot.wake.count() == 2);
    assert!(slot.domain.take_wake(slot.resource(0)));
}

#[test]
fn a_guest_that_ignores_a_wake_is_told_a_few_times_and_hardware_stays_on() {
    let slot = Slot::new(1);
    slot.functions[0].set_pme_enabled(true);
    slot.off_and_entered(0);
    slot.functions[0].host_wake();
    eventually("told three times", || slot.pme.raised().len() == 3);
    std::thread::sleep(Duration::from_millis(150));
    assert_eq!(slot.pme.raised().len(), 3);
    assert_eq!(phase(&slot, 0), Phase::Awake);
    on_and_ready(&slot, 0);
}

#[test]
fn a_guest_that_takes_the_pme_and_wakes_the_function_slowly_finds_it_powered() {
    let slot = Slot::new(1);
    slot.functions[0].set_pme_enabled(true);
    slot.off_and_entered(0);
    slot.functions[0].host_wake();
    eventually("told", || slot.wake.count() == 1);
    // The guest's kernel switches PME_En off as it begins.
    slot.functions[0].set_pme_enabled(false);
    std::thread::sleep(Duration::from_millis(60));
    assert_eq!(phase(&slot, 0), Phase::Awake);
    assert_eq!(slot.functions[0].count(Call::EnterWithWakeup), 1);
    on_and_ready(&slot, 0);
}

#[test]
fn wakes_nobody_asked_for_are_answered_by_sleeping_again_ever_more_slowly() {
    let slot = Slot::new(1);
    let mut waits = Vec::new();
    slot.off_and_entered(0);
    for entry in 2..6 {
        let woken = Instant::now();
        assert!(slot.functions[0].host_wake());
        eventually("entered again", || slot.functions[0].count(Call::EnterWithWakeup) == entry);
        waits.push(woken.elapsed());
        eventually("off", || phase(&slot, 0) == Phase::Off);
    }
    for (wait, at_least) in waits.iter().zip([10, 20, 40, 40]) {
        assert!(*wait >= Duration::from_millis(at_least), "{waits:?}");
    }
    assert_eq!(slot.wake.count(), 0);
    assert_eq!(slot.domain.report()[0].counters.reentries, 4);
}

#[test]
fn wakes_for_the_host_only_use_entry_without_wakeup() {
    let slot = Slot::with(1, |spec| spec.members[0].policy.wake = WakePolicy::HostOnly);
    slot.functions[0].set_pme_enabled(true);
    slot.off_and_entered(0);
    assert_eq!(slot.functions[0].count(Call::Enter), 1);
    assert!(!slot.functions[0].host_wake());
    on_and_ready(&slot, 0);
}

#[test]
fn a_function_that_needs_its_driver_is_notified_without_pme_and_never_put_back_by_itself() {
    let slot = Slot::with(1, |spec| {
        spec.members[0].policy.needs_driver = true;
        spec.members[0].policy.wake = WakePolicy::Ignore;
    });
    slot.off_and_entered(0);
    slot.functions[0].host_wake();
    eventually("the guest is told", || slot.wake.count() > 0);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(slot.functions[0].count(Call::EnterWithWakeup), 1);
    assert!(slot.domain.take_wake(slot.resource(0)));
}

#[test]
fn a_wake_while_paused_is_delivered_after_resume() {
    let slot = Slot::new(1);
    slot.functions[0].set_pme_enabled(true);
    slot.off_and_entered(0);
    slot.domain.pause();
    slot.functions[0].host_wake();
    eventually("noted", || phase(&slot, 0) == Phase::Awake);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(slot.wake.count(), 0);
    slot.domain.resume();
    eventually("delivered", || slot.wake.count() > 0);
}

#[test]
fn port_off_puts_away_what_is_on_and_port_on_brings_back_only_that() {
    let slot = Slot::new(3);
    slot.off_and_entered(0);
    slot.domain.request(Slot::PORT, false);
    assert_eq!(slot.domain.status(Slot::PORT), 0);
    slot.functions[1].wait_engaged();
    slot.functions[2].wait_engaged();
    // Function 2 is brought back on its own, and so is no longer the port's.
    on_and_ready(&slot, 2);
    slot.off_and_entered(2);
    slot.functions[1].script(|script| script.delay = Duration::from_millis(300));
    slot.domain.request(Slot::PORT, true);
    assert_eq!(slot.domain.status(Slot::PORT), STATUS_ON | STATUS_BUSY);
    eventually("the port is done", || slot.domain.status(Slot::PORT) == STATUS_ON);
    assert!(ready(&slot, 1));
    assert_eq!((phase(&slot, 0), phase(&slot, 2)), (Phase::Off, Phase::Off));
}

#[test]
fn a_lost_function_does_not_keep_its_port_busy() {
    let slot = Slot::with(1, |spec| spec.members[0].policy.on_lost = LostPolicy::Keep);
    slot.domain.request(Slot::PORT, false);
    slot.functions[0].wait_engaged();
    slot.functions[0].script(|script| script.answers = [false].into());
    slot.domain.request(Slot::PORT, true);
    eventually("the port is done", || slot.domain.status(Slot::PORT) == STATUS_ON);
    assert_eq!(slot.domain.status(slot.resource(0)), STATUS_LOST);
}

#[test]
fn a_function_that_is_not_offered_stays_on_when_its_port_goes_off() {
    let slot = Slot::with(2, |spec| spec.members[1].resource = None);
    slot.domain.request(Slot::PORT, false);
    slot.functions[0].wait_engaged();
    assert!(slot.functions[1].gate_is_open());
    assert_eq!(slot.domain.status(slot.resource(1)), 0, "no such resource");
}

#[test]
fn a_parked_function_goes_to_d3hot_after_a_while_and_back_before_the_guest_goes_on() {
    let slot = Slot::new(1);
    let function = &slot.functions[0];
    function.guest_writes_d3hot(&slot.domain);
    assert!(function.guest_writes_d0(&slot.domain), "hardware is still in D0");
    function.guest_writes_d3hot(&slot.domain);
    eventually("hardware in D3hot", || function.is_in_d3hot() && phase(&slot, 0) == Phase::D3hot);
    assert!(!function.guest_writes_d0(&slot.domain));
    assert!(!function.is_in_d3hot(), "the vCPU waited for the worker");
    assert_eq!(function.calls().last(), Some(&Call::Open));
    assert!(ready(&slot, 0));
}

#[test]
fn the_wait_for_d0_is_bounded() {
    let slot = Slot::with(1, |spec| spec.timing.unpark_wait = Duration::from_millis(20));
    let function = &slot.functions[0];
    function.guest_writes_d3hot(&slot.domain);
    eventually("hardware in D3hot", || phase(&slot, 0) == Phase::D3hot && function.is_in_d3hot());
    function.script(|script| script.delay = Duration::from_secs(2));
    let started = Instant::now();
    assert!(!function.guest_writes_d0(&slot.domain));
    assert!(started.elapsed() < Duration::from_secs(1), "took {:?}", started.elapsed());
    eventually("opened by the worker", || function.calls().last() == Some(&Call::Open));
}

#[test]
fn off_out_of_hardware_d3hot_enters_low_power_and_on_in_the_hold_off_brings_d0_first() {
    let slot = Slot::with(1, |spec| spec.members[0].policy.hold_off = Duration::from_millis(500));
    let function = &slot.functions[0];
    for cancelled in [true, false] {
        function.guest_writes_d3hot(&slot.domain);
        eventually("hardware in D3hot", || phase(&slot, 0) == Phase::D3hot && function.is_in_d3hot());
        slot.domain.request(slot.resource(0), false);
        if !cancelled {
            function.wait_engaged();
        }
        on_and_ready(&slot, 0);
        assert!(!function.is_in_d3hot());
        assert_eq!(function.count(Call::EnterWithWakeup), usize::from(!cancelled));
    }
}

#[test]
fn off_and_on_while_hardware_goes_to_d3hot_let_the_guest_in_only_when_it_is_back() {
    let slot = Slot::with(1, |spec| spec.members[0].policy.hold_off = Duration::from_secs(3600));
    let function = &slot.functions[0];
    function.script(|script| script.delay = Duration::from_millis(300));
    function.guest_writes_d3hot(&slot.domain);
    eventually("D3hot is being written", || phase(&slot, 0) == Phase::D3hot);
    slot.domain.request(slot.resource(0), false);
    slot.domain.request(slot.resource(0), true);
    assert_eq!(slot.domain.status(slot.resource(0)), STATUS_BUSY);
    assert!(!function.gate_is_open());
    eventually("ready", || ready(&slot, 0));
    use Call::*;
    assert_eq!(function.calls(), [Close, SetD3hot(true), SetD3hot(false), Open]);
}

#[test]
fn a_device_that_stays_silent_in_d3hot_is_brought_back_the_long_way() {
    let slot = Slot::new(1);
    let function = &slot.functions[0];
    function.guest_writes_d3hot(&slot.domain);
    eventually("hardware in D3hot", || phase(&slot, 0) == Phase::D3hot && function.is_in_d3hot());
    function.script(|script| script.answers = [false].into());
    assert!(!function.guest_writes_d0(&slot.domain));
    eventually("ready", || ready(&slot, 0) && phase(&slot, 0) == Phase::On);
    use Call::*;
    assert_eq!(function.calls(), [SetD3hot(true), SetD3hot(false), Close, Exit, Settle, Open]);
}

#[test]
fn reset_brings_everything_back_whatever_it_was_doing() {
    let slot = Slot::new(3);
    slot.off_and_entered(0);
    slot.functions[0].host_wake();
    slot.domain.request(Slot::PORT, false);
    slot.functions[1].wait_engaged();
    assert!(slot.domain.reset(Duration::from_secs(5)));
    for function in 0..3 {
        assert!(ready(&slot, function));
        assert!(!slot.domain.take_wake(slot.resource(function)));
    }
    assert_eq!(slot.domain.status(Slot::PORT), STATUS_ON);
    let entries: usize = slot.functions.iter().map(|f| f.count(Call::EnterWithWakeup)).sum();
    std::thread::sleep(Duration::from_millis(30));
    let later: usize = slot.functions.iter().map(|f| f.count(Call::EnterWithWakeup)).sum();
    assert_eq!(entries, later, "no timer is left");
}

#[test]
fn shutdown_ends_the_worker_and_leaves_hardware_alone() {
    let slot = Slot::new(1);
    slot.off_and_entered(0);
    slot.domain.shutdown();
    slot.domain.shutdown();
    assert!(slot.functions[0].is_engaged());
    slot.domain.request(slot.resource(0), true);
    assert_eq!(slot.domain.status(slot.resource(0)), STATUS_BUSY);
}

#[test]
fn time_in_each_phase_adds_up() {
    let started = Instant::now();
    let slot = Slot::new(1);
    slot.off_and_entered(0);
    std::thread::sleep(Duration::from_millis(20));
    let counters = slot.domain.report()[0].counters.clone();
    assert!(counters.time_in[Phase::Off as usize] >= Duration::from_millis(20));
    assert!(counters.time_in.iter().sum::<Duration>() <= started.elapsed());
}

/// A small xorshift generator: reproducible, no dependency.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
fn a_thousand_random_requests_from_each_of_two_vcpus_and_a_waking_host_end_in_a_sound_state() {
    let slot = Slot::with(2, |spec| {
        for member in &mut spec.members {
            member.policy.hold_off = Duration::from_micros(200);
        }
        spec.timing.park = Duration::from_micros(300);
        spec.timing.confirm = Duration::from_micros(500);
        spec.timing.reentry_first = Duration::from_micros(100);
    });
    slot.functions[0].set_pme_enabled(true);
    let slot = &slot;
    std::thread::scope(|scope| {
        for seed in [0x1234_5678_9abc_def1_u64, 0xfeed_beef_0bad_cafe] {
            scope.spawn(move || {
                let mut state = seed;
                for _ in 0..1000 {
                    let roll = random(&mut state);
                    let function = u8::from(roll & 0x100 != 0);
                    let fake = &slot.functions[usize::from(function)];
                    match roll % 9 {
                        0 | 1 => slot.domain.request(slot.resource(function), false),
                        2 | 3 => slot.domain.request(slot.resource(function), true),
                        4 => slot.domain.request(Slot::PORT, roll & 0x200 != 0),
                        5 => fake.guest_writes_d3hot(&slot.domain),
                        6 => drop(fake.guest_writes_d0(&slot.domain)),
                        7 => drop(slot.domain.take_wake(slot.resource(function))),
                        _ => drop(fake.host_wake()),
                    }
                    if roll & 0x400 != 0 {
                        std::thread::sleep(Duration::from_micros(roll >> 53));
                    }
                }
            });
        }
    });
    assert!(slot.domain.reset(Duration::from_secs(5)), "{:?}", slot.domain);
    for (number, function) in slot.functions.iter().enumerate() {
        assert!(function.gate_is_open() && !function.is_engaged() && !function.is_in_d3hot(), "{function:?}");
        assert_eq!(phase(slot, number), Phase::On);
        assert!(function.count(Call::EnterWithWakeup) > 0, "the test never got to low power");
    }
    slot.assert_sound();
}

#[test]
fn power_cycles_and_domains_leave_no_descriptor_and_no_thread_behind() {
    // Other tests of this process open descriptors of their own: so count in a process that runs this test alone.
    const MARK: &str = "VFIO_PM_LEAK_TEST";
    if std::env::var_os(MARK).is_none() {
        let name = "domain::tests::power_cycles_and_domains_leave_no_descriptor_and_no_thread_behind";
        let run = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--test-threads=1"])
            .env(MARK, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&run.stdout);
        assert!(run.status.success() && text.contains("1 passed"), "{text}");
        return;
    }
    let count = |what: &str| std::fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
    let before = (count("fd"), count("task"));
    for _ in 0..10 {
        let slot = Slot::with(2, |spec| {
            spec.members[0].policy.hold_off = Duration::ZERO;
            spec.members[1].policy.hold_off = Duration::ZERO;
        });
        for _ in 0..20 {
            slot.off_and_entered(0);
            slot.functions[0].host_wake();
            on_and_ready(&slot, 0);
        }
        slot.off_and_entered(1);
        let weak = Arc::downgrade(&slot.domain);
        drop(slot);
        assert!(weak.upgrade().is_none());
    }
    assert_eq!((count("fd"), count("task")), before);
}
