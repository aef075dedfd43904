//! An operator's wishes, driven on fake functions.

use std::time::Duration;

use acpi::notify_abi::STATUS_ON;

use crate::domain::ControlError;
use crate::fake::{Call, Slot, eventually};
use crate::state::Phase;
use crate::stats::WakeCause;

fn phase(slot: &Slot) -> Phase {
    slot.domain.report()[0].phase
}

#[test]
fn waking_a_sleeping_function_tells_a_guest_that_wants_to_know() {
    let slot = Slot::new(1);
    slot.functions[0].set_pme_enabled(true);
    slot.off_and_entered(0);
    let bdf = slot.domain.report()[0].bdf;
    assert_eq!(slot.domain.wake(bdf), Ok(true));
    eventually("the guest is told", || slot.wake.count() > 0);
    assert_eq!(phase(&slot), Phase::Awake);
    let report = &slot.domain.report()[0];
    assert_eq!(report.last_wake.map(|(_, cause)| cause), Some(WakeCause::Host));
    assert_eq!((report.counters.wakes_by[WakeCause::Host as usize], report.counters.wakes), (1, 1));
    slot.domain.request(slot.resource(0), true);
    eventually("the guest gets it", || slot.domain.status(slot.resource(0)) == STATUS_ON);
}

#[test]
fn a_guest_that_wants_no_wakes_lets_a_woken_function_sleep_again() {
    let slot = Slot::new(1);
    slot.off_and_entered(0);
    let bdf = slot.domain.report()[0].bdf;
    assert_eq!(slot.domain.wake(bdf), Ok(true));
    eventually("low power again", || slot.functions[0].count(Call::EnterWithWakeup) == 2);
    assert_eq!(slot.functions[0].count(Call::Exit), 1);
    assert_eq!(slot.wake.count(), 0);
}

#[test]
fn waking_what_is_awake_touches_nothing() {
    let slot = Slot::new(1);
    let bdf = slot.domain.report()[0].bdf;
    assert_eq!(slot.domain.wake(bdf), Ok(false));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(slot.functions[0].calls(), []);
    let nobody = pci::Bdf { bus: 0xee, ..bdf };
    assert_eq!(slot.domain.wake(nobody), Err(ControlError::NoFunction(nobody)));
}

#[test]
fn a_wake_that_the_host_refuses_leaves_the_function_asleep() {
    let slot = Slot::new(1);
    slot.off_and_entered(0);
    slot.functions[0].script(|script| script.exits = [false].into());
    let bdf = slot.domain.report()[0].bdf;
    assert_eq!(slot.domain.wake(bdf), Ok(true));
    eventually("it is tried", || slot.functions[0].count(Call::Exit) == 1);
    eventually("it is booked", || slot.domain.report()[0].counters.failures.iter().sum::<u64>() == 1);
    assert_eq!(phase(&slot), Phase::Off);
}
