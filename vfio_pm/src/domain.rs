//! The power domain of one slot: a root port and the functions below it, each with a power resource of its own (ACPI 6.5, section 7.2).
//!
//! `_OFF` of a function puts that function away; `_OFF` of the port puts away what is still on, which is how functions without a
//! guest driver lose power; `_ON` of the port brings back only what the port put away; `_ON` of a function brings that
//! function back whatever put it away. Decisions are [`crate::state`]'s; this module books them and runs their effects.

mod control;
mod delivery;
#[cfg(test)]
mod failure_tests;
mod host;
mod member;
mod worker;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use acpi::notify_abi::{ResourceIndex, STATUS_BUSY, STATUS_ON};
use pci::{Bdf, DevFn};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::spec::{CreateError, DomainSpec, MemberSpec};
use crate::state::{Hardware, Phase, PowerEvent, Want};
use crate::stats::FailureKind;
pub use control::ControlError;
use member::MemberState;

/// Stack of a slot's worker. The customary 2 MiB would be one huge page, and all of it resident at the first touch.
const STACK_BYTES: usize = 512 << 10;

/// The sole owner of the power state of one slot's functions.
///
/// Calls may come from any thread; those that vCPUs make take no time beyond a gate's. Hardware is operated by one worker
/// thread per domain, which sleeps without a time-out as long as nothing is under way.
///
/// Lock order: a member's gate lock (held over the gate's `open`, `close` and `lost`) -> the locks of the function behind it -> the domain's
/// state lock. The state lock is a leaf: nothing is called and nothing waited for under it, and no lock is held over an ioctl
/// of low power. The worker's handle has a lock of its own, taken by `shutdown` only. The news lock keeps news in order: it is taken
/// with no other lock held, and the state lock under it.
#[derive(Debug)]
pub struct PowerDomain {
    shared: Arc<Shared>,
    worker: Mutex<Option<JoinHandle<()>>>,
}

/// What the worker and the callers share.
#[derive(Debug)]
struct Shared {
    spec: DomainSpec,
    members: Vec<Member>,
    state: Mutex<DomainState>,
    /// Signalled when an operation of the worker has ended and its gate has followed.
    settled: Condvar,
    /// Wakes the worker when there is something for it in `state`.
    kick: EventFd,
    /// Orders the news on their way to the sink.
    news_turn: Mutex<()>,
}

/// The unchanging part of one function, beside its [`MemberSpec`].
#[derive(Debug)]
struct Member {
    bdf: Bdf,
    /// Orders the gate's opening and closing; see [`PowerDomain`] for its place among the locks.
    gate_turn: Mutex<()>,
}

#[derive(Debug)]
struct DomainState {
    members: Vec<MemberState>,
    port_off: bool,
    paused: bool,
    stopping: bool,
    /// The function that did not come back, for which none of the slot is cut from power until somebody says so.
    latched: Option<usize>,
}

/// Whose power resource an index names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Port,
    Member(usize),
}

/// A lock whose holder panicked still guards consistent state: every change is made in one step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PowerDomain {
    /// Makes the domain and starts its worker thread. All functions are on and their gates open.
    pub fn new(spec: DomainSpec) -> Result<Arc<Self>, CreateError> {
        let slot =
            || spec.members.first().map_or_else(|| "an empty slot".to_owned(), |m| m.gate.bdf().to_string());
        let descriptor = |source| CreateError::Descriptor { slot: slot(), source };
        let kick = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(descriptor)?;
        let poller = worker::Poller::new(&kick, &spec.members).map_err(descriptor)?;
        let name = spec.members.first().map_or_else(
            || "pm".to_owned(),
            |m| format!("pm-{:02x}:{:02x}", m.gate.bdf().bus, m.gate.bdf().devfn.device()),
        );
        let thread_error = |slot: String| move |source| CreateError::Thread { slot, source };
        let thread_error = thread_error(slot());
        let now = Instant::now();
        let listened = spec.news.is_some();
        let states = spec.members.iter().map(|member| {
            MemberState::new(now, member.policy, member.resource.is_some(), &spec.timing, listened)
        });
        let shared = Arc::new(Shared {
            state: Mutex::new(DomainState {
                members: states.collect(),
                port_off: false,
                paused: false,
                stopping: false,
                latched: spec
                    .latched_by
                    .and_then(|bdf| spec.members.iter().position(|member| member.gate.bdf() == bdf)),
            }),
            members: spec
                .members
                .iter()
                .map(|member| Member { bdf: member.gate.bdf(), gate_turn: Mutex::new(()) })
                .collect(),
            settled: Condvar::new(),
            kick,
            news_turn: Mutex::new(()),
            spec,
        });
        let for_worker = Arc::clone(&shared);
        let worker = thread::Builder::new()
            .stack_size(STACK_BYTES)
            .name(name)
            .spawn(move || worker::Worker::new(for_worker, poller).run())
            .map_err(thread_error)?;
        Ok(Arc::new(Self { shared, worker: Mutex::new(Some(worker)) }))
    }

    /// The power resources this domain answers for: those of its functions and of its port.
    pub fn resources(&self) -> impl Iterator<Item = ResourceIndex> + '_ {
        let spec = &self.shared.spec;
        spec.members.iter().filter_map(|member| member.resource).chain(spec.port_resource)
    }

    /// `_ON` (`true`) or `_OFF` (`false`) from the guest. Does not wait; an index that is not of this domain is ignored.
    ///
    /// When `_OFF` returns the guest can no longer reach the hardware it put away.
    pub fn request(&self, index: ResourceIndex, on: bool) {
        let Some(target) = self.shared.target(index) else { return };
        let now = Instant::now();
        let mut moved = Vec::new();
        {
            let mut state = lock(&self.shared.state);
            let state = &mut *state;
            let event = if on { PowerEvent::On } else { PowerEvent::Off };
            if target == Target::Port {
                state.port_off = !on;
            }
            for (number, member) in state.members.iter_mut().enumerate() {
                let offered = self.shared.spec.members[number].resource.is_some();
                let put_away = member.power.want == Want::Off;
                let meant = match target {
                    Target::Member(wanted) => wanted == number,
                    Target::Port => offered && if on { member.by_port } else { !put_away },
                };
                if !meant {
                    continue;
                }
                let before = member.power;
                member.apply(event, now);
                // `_OFF` of its own makes a function its own business again, as does any `_ON`.
                member.by_port = target == Target::Port && !on;
                if target == Target::Port && on {
                    member.back_for_port = member.is_busy();
                }
                if member.power != before {
                    moved.push((number, member.may_log(now)));
                }
            }
        }
        if target == Target::Port {
            self.shared.spec.pme.power(on);
        }
        for (number, log) in moved {
            if log {
                let verb = if on { "_ON" } else { "_OFF" };
                let through = if target == Target::Port { " (port)" } else { "" };
                log::info!("power {}: {verb} from the guest{through}", self.shared.members[number].bdf);
            }
            self.shared.sync_gate(number);
            self.shared.report_ready(number, log);
        }
        self.shared.kick();
        self.shared.publish();
    }

    /// The STATUS register of a resource; 0 for an index that is not of this domain.
    ///
    /// It is also where an `_ON` that takes too long is noticed: whoever waits for it looks here.
    pub fn status(&self, index: ResourceIndex) -> u32 {
        let target = self.shared.target(index);
        if target.is_some() {
            self.shared.note_overdue(Instant::now());
        }
        let state = lock(&self.shared.state);
        match target {
            None => 0,
            Some(Target::Member(number)) => state.members[number].status(),
            Some(Target::Port) if state.port_off => 0,
            Some(Target::Port) => {
                let busy = state.members.iter().any(|member| member.back_for_port && member.is_awaited());
                STATUS_ON | if busy { STATUS_BUSY } else { 0 }
            }
        }
    }

    /// Takes the WAKE bit of a resource: the guest has read it.
    pub fn take_wake(&self, index: ResourceIndex) -> bool {
        match self.shared.target(index) {
            Some(Target::Member(number)) => {
                std::mem::take(&mut lock(&self.shared.state).members[number].wake.bit)
            }
            _ => false,
        }
    }

    /// The guest has written D3hot to the function's PMCSR while its power is on.
    ///
    /// The function closes its BAR slots itself. Ignored while power is off or coming back. Calls of `parked` and `unparked` come in the
    /// order of the writes to PMCSR: one lock of the function's, which its gate does not take, is held over write and call.
    pub fn parked(&self, devfn: DevFn) {
        let Some(number) = self.shared.number(devfn) else { return };
        let mut state = lock(&self.shared.state);
        let member = &mut state.members[number];
        // A gate that is about to open puts the function in D0 whatever it was told a moment ago; hardware must not go to D3hot then.
        if member.gate_is_open && !member.reopening {
            member.apply(PowerEvent::Parked, Instant::now());
            drop(state);
            self.shared.kick();
            self.shared.publish();
        }
    }

    /// The guest has written D0 to the function's PMCSR.
    ///
    /// `true`: hardware is in D0 and the caller opens its BAR slots itself, unless its gate has been closed meanwhile by
    /// another vCPU's `_OFF`. `false`: the worker brings hardware to D0 and opens the gate, or has done so by now; the call waits
    /// for that [`crate::Timing::unpark_wait`] at most. Power that is off stays off, at once (`false`).
    pub fn unparked(&self, devfn: DevFn) -> bool {
        let Some(number) = self.shared.number(devfn) else { return true };
        let mut state = lock(&self.shared.state);
        state.members[number].apply(PowerEvent::Unparked, Instant::now());
        let pending = |state: &mut DomainState| {
            let member = &state.members[number];
            let under_way = matches!(member.power.hardware, Hardware::ToD3hot | Hardware::ToD0);
            member.power.want == Want::On && (under_way || member.reopening) && !state.stopping
        };
        if !pending(&mut state) {
            let member = &state.members[number];
            let here = member.is_ready() && member.power.hardware == Hardware::D0;
            drop(state);
            self.shared.publish();
            return here;
        }
        self.shared.kick();
        let wait = self.shared.spec.timing.unpark_wait;
        drop(
            self.shared
                .settled
                .wait_timeout_while(state, wait, pending)
                .unwrap_or_else(PoisonError::into_inner),
        );
        false
    }

    /// Forces everything on and forgets wakes and timers: guest reboot. Waits up to `within` for hardware; `true` when every
    /// function is on and answers. Not for vCPU threads unless `within` is zero.
    pub fn reset(&self, within: Duration) -> bool {
        let now = Instant::now();
        {
            let mut state = lock(&self.shared.state);
            state.port_off = false;
            for member in &mut state.members {
                member.apply(PowerEvent::Reset, now);
                member.by_port = false;
                member.back_for_port = false;
            }
        }
        for number in 0..self.shared.members.len() {
            self.shared.sync_gate(number);
            self.shared.report_ready(number, true);
        }
        self.shared.kick();
        self.shared.publish();
        let state = lock(&self.shared.state);
        let unsettled = |state: &mut DomainState| {
            !state.stopping
                && state
                    .members
                    .iter()
                    .any(|member| member.is_busy() || member.power.hardware.is_busy() || member.reopening)
        };
        let (state, _) = self
            .shared
            .settled
            .wait_timeout_while(state, within, unsettled)
            .unwrap_or_else(PoisonError::into_inner);
        state.members.iter().all(|member| member.is_ready() && member.power.hardware == Hardware::D0)
    }

    /// The guest is paused: wakes are kept and neither delivered nor answered by entering low power again.
    pub fn pause(&self) {
        lock(&self.shared.state).paused = true;
    }

    /// The guest runs again: kept wakes are delivered.
    pub fn resume(&self) {
        lock(&self.shared.state).paused = false;
        self.shared.kick();
    }

    /// Stops and joins the worker, which may be waiting for the host to resume a device. Leaves hardware as it is: closing the
    /// device's descriptor ends low power. After this only closing gates and reading status still work.
    pub fn shutdown(&self) {
        lock(&self.shared.state).stopping = true;
        self.shared.kick();
        self.shared.settled.notify_all();
        let Some(worker) = lock(&self.worker).take() else { return };
        // The last reference may be dropped by the worker itself, out of a gate.
        if worker.thread().id() != thread::current().id() && worker.join().is_err() {
            log::error!("power: the power thread has panicked; its devices keep their present state");
        }
    }
}

impl Drop for PowerDomain {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl Shared {
    fn target(&self, index: ResourceIndex) -> Option<Target> {
        match self.spec.members.iter().position(|member| member.resource == Some(index)) {
            Some(number) => Some(Target::Member(number)),
            None => (self.spec.port_resource == Some(index)).then_some(Target::Port),
        }
    }

    fn number(&self, devfn: DevFn) -> Option<usize> {
        self.spec.members.iter().position(|member| member.devfn == devfn)
    }

    fn spec(&self, number: usize) -> &MemberSpec {
        &self.spec.members[number]
    }

    fn kick(&self) {
        // Fails only when the counter is full, and then the worker is already called.
        let _ = self.kick.write(1);
    }

    /// Brings a member's gate in line with its state. Whoever changes the state calls this afterwards, so the last one wins.
    fn sync_gate(&self, number: usize) {
        let _turn = lock(&self.members[number].gate_turn);
        let gate = &self.spec(number).gate;
        let open = {
            let state = lock(&self.state);
            let member = &state.members[number];
            match member.gate_is_open {
                true if !member.power.gate_open() => false,
                false if member.power.gate_may_open() => true,
                _ => return,
            }
        };
        if open {
            gate.open();
        } else {
            gate.close();
        }
        let mut state = lock(&self.state);
        let member = &mut state.members[number];
        member.gate_is_open = open;
        member.back_for_port &= member.is_busy();
        drop(state);
        self.settled.notify_all();
    }

    /// Opens the gate after hardware's D3hot, be it closed or only its BAR slots.
    fn reopen_gate(&self, number: usize) {
        let turn = lock(&self.members[number].gate_turn);
        let open = {
            let power = lock(&self.state).members[number].power;
            power.want == Want::On && power.gate_may_open()
        };
        if open {
            self.spec(number).gate.open();
        }
        {
            let mut state = lock(&self.state);
            let member = &mut state.members[number];
            member.gate_is_open |= open;
            member.reopening = false;
            member.back_for_port &= member.is_busy();
        }
        drop(turn);
        self.settled.notify_all();
    }

    /// Tells the gate that the device is gone, unless it is being tried again already.
    fn lose_gate(&self, number: usize) {
        let _turn = lock(&self.members[number].gate_turn);
        let gone = {
            let member = &lock(&self.state).members[number];
            let given_up = member.overdue && member.is_busy() && !member.gate_is_open;
            member.power.phase() == Phase::Lost || given_up
        };
        if gone {
            self.spec(number).gate.lost();
        }
        self.settled.notify_all();
    }

    /// Logs that the function is ready, once per `_ON`.
    fn report_ready(&self, number: usize, log: bool) {
        let mut state = lock(&self.state);
        let member = &mut state.members[number];
        if !member.is_ready() {
            return;
        }
        let Some(requested) = member.on_requested.take() else { return };
        let took = requested.elapsed();
        let late = std::mem::take(&mut member.overdue);
        if std::mem::take(&mut member.awaited) {
            member.counters.ready_latency.add(took);
        }
        drop(state);
        let bdf = self.members[number].bdf;
        if late {
            log::warn!(
                "power {bdf}: back after all, too late for the guest's _ON; unbind and bind its driver in the guest"
            );
        }
        if log {
            log::info!("power {bdf}: ready after {}", millis(took));
        }
    }

    /// Tells the guest of each `_ON` that takes longer than it may that the device is gone.
    fn note_overdue(&self, now: Instant) {
        let mut overdue = Vec::new();
        {
            let mut state = lock(&self.state);
            for (number, member) in state.members.iter_mut().enumerate() {
                if member.note_overdue(now) {
                    let message = format!(
                        "no end of _ON after {} ms: the guest is told that the device is lost, and gets it when it does come back; \
                         look in the host's kernel log for what it waits for",
                        member.policy.on_timeout.as_millis()
                    );
                    member.failed(FailureKind::OnTimeout, message.clone(), now);
                    overdue.push((number, message));
                }
            }
        }
        if overdue.is_empty() {
            return;
        }
        for (number, message) in overdue {
            log::error!("power {}: {message}", self.members[number].bdf);
            self.lose_gate(number);
        }
        self.publish();
    }

    /// Hands the news of all functions to the sink.
    fn publish(&self) {
        let Some(sink) = &self.spec.news else { return };
        let _turn = lock(&self.news_turn);
        let mut news = Vec::new();
        {
            let mut state = lock(&self.state);
            for (member, state) in self.members.iter().zip(&mut state.members) {
                if !state.outbox.is_empty() {
                    news.extend(state.outbox.take(member.bdf));
                }
            }
        }
        for news in news {
            sink.tell(&news);
        }
    }
}

/// `13.5 ms`.
fn millis(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

#[cfg(test)]
mod tests;
