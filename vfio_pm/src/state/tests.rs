//! The whole table, and the trips through it that matter.

use std::collections::HashSet;

use super::*;

mod walk;

const WANTS: [Want; 3] = [Want::On, Want::D3hot, Want::Off];
const HARDWARE: [Hardware; 12] = [
    Hardware::D0,
    Hardware::ToD3hot,
    Hardware::D3hot,
    Hardware::ToD0,
    Hardware::Entering,
    Hardware::LowPower,
    Hardware::Woken,
    Hardware::Exiting,
    Hardware::Held,
    Hardware::Shallow,
    Hardware::Lost,
    Hardware::Resetting,
];
const EVENTS: [PowerEvent; 25] = [
    PowerEvent::Off,
    PowerEvent::On,
    PowerEvent::Parked,
    PowerEvent::Unparked,
    PowerEvent::HoldOffElapsed,
    PowerEvent::ParkElapsed,
    PowerEvent::ReentryDue,
    PowerEvent::Entered,
    PowerEvent::EntryRefused,
    PowerEvent::Woke,
    PowerEvent::Exited,
    PowerEvent::ExitFailed,
    PowerEvent::ExitFailedReset,
    PowerEvent::ResetAnswered,
    PowerEvent::ResetFailed,
    PowerEvent::EntryDenied,
    PowerEvent::EntryShallow,
    PowerEvent::Reconsider,
    PowerEvent::Restrain,
    PowerEvent::Recover,
    PowerEvent::Gone,
    PowerEvent::D3hotSet,
    PowerEvent::D0Set,
    PowerEvent::D0Failed,
    PowerEvent::Reset,
];

fn all_states() -> impl Iterator<Item = PowerState> {
    WANTS.into_iter().flat_map(|want| HARDWARE.map(|hardware| PowerState { want, hardware }))
}

fn table() -> impl Iterator<Item = (PowerState, PowerEvent, PowerState, Effects)> {
    all_states().flat_map(|state| {
        EVENTS.map(|event| {
            let (next, effects) = state.next(event);
            (state, event, next, effects)
        })
    })
}

fn reachable() -> HashSet<PowerState> {
    let mut found = HashSet::from([PowerState::ON]);
    let mut fresh = vec![PowerState::ON];
    while let Some(state) = fresh.pop() {
        for event in EVENTS {
            let (next, _) = state.next(event);
            if found.insert(next) {
                fresh.push(next);
            }
        }
    }
    found
}

/// Ends the worker's operation well, and every one that follows from it.
fn run(mut state: PowerState) -> PowerState {
    for _ in 0..8 {
        let done = match state.hardware {
            Hardware::ToD3hot => PowerEvent::D3hotSet,
            Hardware::ToD0 => PowerEvent::D0Set,
            Hardware::Entering => PowerEvent::Entered,
            Hardware::Exiting => PowerEvent::Exited,
            Hardware::Resetting => PowerEvent::ResetAnswered,
            _ => return state,
        };
        state = state.next(done).0;
    }
    panic!("{state:?} never comes to rest");
}

#[test]
fn the_gate_is_closed_whenever_hardware_may_be_suspended() {
    for state in all_states().filter(|state| state.gate_open()) {
        assert!(
            !matches!(
                state.hardware,
                Hardware::Entering
                    | Hardware::LowPower
                    | Hardware::Woken
                    | Hardware::Exiting
                    | Hardware::Held
                    | Hardware::Shallow
                    | Hardware::Lost
                    | Hardware::Resetting
            ),
            "{state:?}"
        );
    }
}

#[test]
fn an_operation_starts_exactly_when_hardware_becomes_busy() {
    for (state, event, next, effects) in table() {
        let started = next.hardware.is_busy() && next.hardware != state.hardware;
        assert_eq!(effects.operation.is_some(), started, "{state:?} {event:?} -> {next:?} {effects:?}");
    }
}

#[test]
fn only_the_end_of_an_operation_ends_a_busy_state() {
    use PowerEvent::*;
    for (state, event, next, _) in table().filter(|(state, ..)| state.hardware.is_busy()) {
        let ends = match state.hardware {
            Hardware::Entering => matches!(event, Entered | EntryRefused),
            Hardware::Exiting => matches!(event, Exited | ExitFailed | ExitFailedReset),
            Hardware::Resetting => matches!(event, ResetAnswered | ResetFailed),
            Hardware::ToD3hot => event == D3hotSet,
            _ => matches!(event, D0Set | D0Failed),
        };
        assert_eq!(next.hardware != state.hardware, ends, "{state:?} {event:?} -> {next:?}");
    }
}

#[test]
fn low_power_is_entered_only_out_of_the_hold_off_or_after_a_wake_and_never_for_a_guest_that_wants_power() {
    for (state, event, next, effects) in table() {
        if effects.operation == Some(Operation::Enter) {
            assert!(
                matches!(event, PowerEvent::HoldOffElapsed | PowerEvent::ReentryDue),
                "{state:?} {event:?}"
            );
            assert_eq!(next.want, Want::Off);
            assert!(!state.gate_open() && !next.gate_open());
        }
    }
}

#[test]
fn only_guest_requests_and_reset_change_what_the_guest_wants() {
    for (state, event, next, _) in table() {
        let guest =
            [PowerEvent::Off, PowerEvent::On, PowerEvent::Parked, PowerEvent::Unparked, PowerEvent::Reset];
        // The long way back out of D3hot ends in D0.
        let to_d0 = event == PowerEvent::D0Failed && (state.want, next.want) == (Want::D3hot, Want::On);
        assert!(
            next.want == state.want || guest.contains(&event) || to_d0,
            "{state:?} {event:?} -> {next:?}"
        );
    }
}

#[test]
fn a_wake_counts_only_in_low_power() {
    for (state, event, _, effects) in table() {
        let counts = event == PowerEvent::Woke && state.hardware == Hardware::LowPower;
        assert_eq!(effects.woken, counts, "{state:?} {event:?}");
    }
}

#[test]
fn a_guest_that_wants_power_never_rests_without_it_unless_the_device_is_lost() {
    for state in reachable() {
        if state.want != Want::Off {
            assert!(
                !matches!(
                    state.hardware,
                    Hardware::LowPower | Hardware::Woken | Hardware::Held | Hardware::Shallow
                ),
                "{state:?}"
            );
        }
    }
}

#[test]
fn from_everywhere_on_leads_to_d0_with_an_open_gate() {
    for state in reachable() {
        let end = run(state.next(PowerEvent::On).0);
        assert!(end.gate_open() || end.hardware == Hardware::Lost, "{state:?} -> {end:?}");
        let reset = run(state.next(PowerEvent::Reset).0);
        assert_eq!(reset, PowerState::ON, "{state:?}");
    }
}

#[test]
fn from_everywhere_off_leads_to_low_power_unless_held_or_lost() {
    for state in reachable() {
        let off = run(state.next(PowerEvent::Off).0);
        let end = run(off.next(PowerEvent::HoldOffElapsed).0);
        assert!(
            matches!(end.hardware, Hardware::LowPower | Hardware::Woken | Hardware::Held | Hardware::Lost),
            "{state:?} -> {end:?}"
        );
    }
}

#[test]
fn every_rest_that_is_not_final_has_its_timer_armed() {
    for state in reachable() {
        for event in EVENTS {
            let (next, effects) = state.next(event);
            if next == state || next.hardware.is_busy() {
                continue;
            }
            let needs = match (next.want, next.hardware) {
                (Want::Off, Hardware::D0 | Hardware::D3hot) => Some(TimerChange::HoldOff),
                (Want::D3hot, Hardware::D0) => Some(TimerChange::Park),
                _ => None,
            };
            if let Some(timer) = needs {
                assert_eq!(effects.timer, timer, "{state:?} {event:?} -> {next:?}");
            } else {
                assert!(
                    !matches!(effects.timer, TimerChange::HoldOff | TimerChange::Park),
                    "{state:?} {event:?}"
                );
            }
        }
    }
}

#[test]
fn on_inside_the_hold_off_needs_no_operation() {
    let off = PowerState::ON.next(PowerEvent::Off).0;
    let (on, effects) = off.next(PowerEvent::On);
    assert_eq!(on, PowerState::ON);
    assert_eq!(effects, Effects { timer: TimerChange::Disarm, ..Effects::default() });
}

#[test]
fn off_out_of_hardware_d3hot_comes_back_through_exit_even_inside_the_hold_off() {
    let parked = run(PowerState::ON.next(PowerEvent::Parked).0.next(PowerEvent::ParkElapsed).0);
    assert_eq!(parked, PowerState { want: Want::D3hot, hardware: Hardware::D3hot });
    let off = parked.next(PowerEvent::Off).0;
    assert_eq!(off.phase(), Phase::HoldOff);
    let (on, effects) = off.next(PowerEvent::On);
    assert_eq!(effects.operation, Some(Operation::Exit));
    assert!(!on.gate_open(), "hardware is in D3hot: a BAR access would fault");
}

#[test]
fn off_while_coming_back_keeps_the_gate_closed_and_counts_the_hold_off_again() {
    let exiting = PowerState { want: Want::On, hardware: Hardware::Exiting };
    let off = exiting.next(PowerEvent::Off).0;
    let (back, effects) = off.next(PowerEvent::Exited);
    assert_eq!(effects.timer, TimerChange::HoldOff);
    assert!(!back.gate_open());
}

#[test]
fn phases_name_every_state_and_count_in_order() {
    for (number, phase) in Phase::ALL.into_iter().enumerate() {
        assert_eq!(phase as usize, number);
    }
    let seen: HashSet<Phase> = reachable().into_iter().map(PowerState::phase).collect();
    assert_eq!(seen.len(), Phase::ALL.len());
}

/// Every change of hardware that there is: from where, on which events, to where. A busy state is left as `rest` says; what follows
/// from what the guest wants by then is in [`rest`].
const EDGES: &[(Hardware, &[PowerEvent], Hardware)] = {
    use Hardware::*;
    use PowerEvent as E;
    &[
        (D0, &[E::HoldOffElapsed], Entering),
        (D0, &[E::ParkElapsed, E::EntryShallow], ToD3hot),
        (D0, &[E::EntryDenied], Held),
        (D3hot, &[E::HoldOffElapsed], Entering),
        (D3hot, &[E::On, E::Reset], Exiting),
        (D3hot, &[E::Unparked, E::Reset, E::Restrain], ToD0),
        (D3hot, &[E::EntryDenied], Held),
        (D3hot, &[E::EntryShallow], Shallow),
        (ToD3hot, &[E::D3hotSet], D3hot),
        (ToD3hot, &[E::D3hotSet], ToD0),
        (ToD0, &[E::D0Set], D0),
        (ToD0, &[E::D0Failed], Exiting),
        (Entering, &[E::Entered], LowPower),
        (Entering, &[E::EntryRefused], Held),
        (Entering, &[E::Entered, E::EntryRefused], Exiting),
        (LowPower, &[E::Woke], Woken),
        (LowPower, &[E::On, E::Reset, E::Restrain], Exiting),
        (Woken, &[E::ReentryDue], Entering),
        (Woken, &[E::On, E::Reset], Exiting),
        (Woken, &[E::EntryDenied], Held),
        (Woken, &[E::EntryShallow], ToD3hot),
        (Exiting, &[E::Exited], D0),
        (Exiting, &[E::ExitFailed], Lost),
        (Exiting, &[E::ExitFailedReset], Resetting),
        (Held, &[E::HoldOffElapsed], Entering),
        (Held, &[E::On, E::Reset], Exiting),
        (Held, &[E::EntryShallow], Exiting),
        (Shallow, &[E::HoldOffElapsed], Entering),
        (Shallow, &[E::On, E::Reset, E::Restrain], Exiting),
        (Lost, &[E::On, E::Reset], Exiting),
        (D0, &[E::Gone], Lost),
        (Lost, &[E::Recover], Resetting),
        (Resetting, &[E::ResetAnswered], D0),
        (Resetting, &[E::ResetFailed], Lost),
    ]
};

#[test]
fn hardware_changes_by_the_listed_edges_and_by_each_of_them() {
    let mut seen = HashSet::new();
    for state in reachable() {
        for event in EVENTS {
            let next = state.next(event).0;
            if next.hardware != state.hardware {
                let edge = EDGES.iter().position(|(from, events, to)| {
                    (*from, *to) == (state.hardware, next.hardware) && events.contains(&event)
                });
                let edge = edge.unwrap_or_else(|| panic!("{state:?} {event:?} -> {next:?} is not listed"));
                seen.insert((edge, event));
            }
        }
    }
    for (number, (from, events, to)) in EDGES.iter().enumerate() {
        for event in *events {
            assert!(seen.contains(&(number, *event)), "{from:?} {event:?} -> {to:?} never happens");
        }
    }
}

#[test]
fn the_timers_events_mean_nothing_where_no_timer_runs() {
    use PowerEvent::*;
    for state in all_states() {
        let counts = match (state.want, state.hardware) {
            (Want::Off, Hardware::D0 | Hardware::D3hot | Hardware::Held | Hardware::Shallow) => {
                vec![HoldOffElapsed]
            }
            (Want::Off, Hardware::Woken) => vec![ReentryDue],
            (Want::D3hot, Hardware::D0) => vec![ParkElapsed],
            _ => Vec::new(),
        };
        for event in [HoldOffElapsed, ReentryDue, ParkElapsed] {
            let (next, effects) = state.next(event);
            let acted = (next, effects) != (state, Effects::default());
            assert_eq!(acted, counts.contains(&event), "{state:?} {event:?}");
        }
    }
}

#[test]
fn only_a_lost_device_is_reset_and_each_end_of_it_is_known() {
    for (state, event, next, effects) in table() {
        if effects.operation == Some(Operation::Reset) {
            let lost = matches!(
                (state.hardware, event),
                (Hardware::Lost, PowerEvent::Recover) | (Hardware::Exiting, PowerEvent::ExitFailedReset)
            );
            assert!(lost && !next.gate_open(), "{state:?} {event:?}");
        }
    }
    let resetting = PowerState { want: Want::On, hardware: Hardware::Resetting };
    assert_eq!(resetting.next(PowerEvent::ResetAnswered).0, PowerState::ON);
    let (lost, effects) = resetting.next(PowerEvent::ResetFailed);
    assert!(lost.phase() == Phase::Lost && effects.lost);
    assert!(resetting.is_coming_back(), "the guest's _ON waits for it");
}

#[test]
fn a_function_kept_from_low_power_goes_there_when_it_is_reconsidered_and_comes_back_when_restrained() {
    let off = PowerState::ON.next(PowerEvent::Off).0;
    for denied in [PowerEvent::EntryDenied, PowerEvent::EntryShallow] {
        let mut state = run(off.next(denied).0);
        if denied == PowerEvent::EntryShallow {
            assert_eq!(state.hardware, Hardware::D3hot);
            state = state.next(denied).0;
        }
        assert!(matches!(state.hardware, Hardware::Held | Hardware::Shallow), "{state:?}");
        assert_eq!(state.next(PowerEvent::Reconsider).1.timer, TimerChange::HoldOff);
        let sleeping = run(state.next(PowerEvent::HoldOffElapsed).0);
        assert_eq!(sleeping.hardware, Hardware::LowPower);
        let back = run(sleeping.next(PowerEvent::Restrain).0);
        assert_eq!(back, off, "hardware is on and the guest still has it off");
    }
}
