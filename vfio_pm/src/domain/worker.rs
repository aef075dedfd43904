//! A domain's worker thread: operates hardware, counts timers, listens for wakes.
//!
//! One round takes what is due under the state lock, does it without, and then sleeps in epoll until it is called, a wakeup eventfd
//! fires, or the next deadline; with no deadline it sleeps without a time-out.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::member::{Admission, MemberState, TimerKind};
use super::{Shared, lock, millis};
use crate::event::News;
use crate::low_power::EnterError;
use crate::offer::PowerChoice;
use crate::policy::{LostPolicy, Policy};
use crate::spec::MemberSpec;
use crate::state::{Hardware, Operation, PowerEvent};
use crate::stats::{Denial, FailureKind, WakeCause};

/// The token of the kick eventfd; wakeup eventfds have the member's number above their generation.
const KICK: u64 = u64::MAX;
/// Marks the tokens of what the host says, which have the member's number above one of these.
const HOST_SIGNAL: u64 = 1 << 63;
const RELEASE: u64 = 0;
const ERROR: u64 = 1;

/// What becomes of a lost device, and what to do.
const LOST: &str = "the guest reads all ones until its next _ON; look in the host's kernel log, and reset or rescan the device if it \
                    stays away";

/// What the worker waits on.
#[derive(Debug)]
pub(super) struct Poller {
    epoll: Epoll,
    events: Vec<EpollEvent>,
}

impl Poller {
    pub(super) fn new(kick: &EventFd, members: &[MemberSpec]) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let add = |eventfd: &EventFd, token, how| {
            let event = EpollEvent::new(EventSet::IN | how, token);
            epoll.ctl(ControlOperation::Add, eventfd.as_raw_fd(), event)
        };
        add(kick, KICK, EventSet::empty())?;
        for (number, member) in (0..).zip(members) {
            for (kind, eventfd) in [(RELEASE, &member.signals.release), (ERROR, &member.signals.error)] {
                if let Some(eventfd) = eventfd {
                    // Told once for each signal, and left readable: whoever closes the device looks at it as well.
                    add(eventfd, HOST_SIGNAL | number << 1 | kind, EventSet::EDGE_TRIGGERED)?;
                }
            }
        }
        // The kick, and of each member a wakeup and two signals.
        let events = vec![EpollEvent::default(); members.len().saturating_mul(3).saturating_add(1)];
        Ok(Self { epoll, events })
    }

    /// The tokens that are readable; none when the time is over or a signal came.
    fn wait(&mut self, until: Option<Instant>) -> Vec<u64> {
        let timeout = until.map_or(-1, |until| {
            let left = until.saturating_duration_since(Instant::now());
            // Rounded up, so that the deadline has passed when the wait is over.
            i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        let ready = self.epoll.wait(timeout, &mut self.events).unwrap_or(0);
        self.events.iter().take(ready).map(EpollEvent::data).collect()
    }
}

/// The wakeup eventfd of the present entry.
#[derive(Debug)]
struct Armed {
    eventfd: EventFd,
    token: u64,
}

/// What a round has to do for one member.
#[derive(Clone, Copy, Debug)]
enum Job {
    Operate(Operation),
    /// The hold-off is over: log it, then `Operate`.
    HeldOff(Duration),
    /// Low power is put off for so long: log it.
    PutOff(Duration),
    /// Low power is not to be: log why.
    Denied(Denial),
    /// An operator wants it woken.
    Wake,
    Deliver,
    Confirm,
    Retry,
}

/// One round's work: jobs by member, in order, and when the next one will be due by itself.
#[derive(Debug)]
struct Round {
    jobs: Vec<(usize, Job)>,
    until: Option<Instant>,
}

/// The thread's own state: nobody else sees the eventfds.
#[derive(Debug)]
pub(super) struct Worker {
    shared: Arc<Shared>,
    poller: Poller,
    armed: Vec<Option<Armed>>,
    generation: u32,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, poller: Poller) -> Self {
        let armed = shared.members.iter().map(|_| None).collect();
        Self { shared, poller, armed, generation: 0 }
    }

    pub(super) fn run(mut self) {
        while let Some(Round { jobs, until }) = self.due() {
            let worked = !jobs.is_empty();
            for (number, job) in jobs {
                self.work(number, job);
                self.shared.publish();
            }
            // After work there may be more; only look at the eventfds then.
            let until = if worked { Some(Instant::now()) } else { until };
            for token in self.poller.wait(until) {
                self.readable(token);
            }
            self.shared.publish();
        }
    }

    /// What is due now, and when the next thing will be; `None` when the domain is shutting down.
    fn due(&self) -> Option<Round> {
        let now = Instant::now();
        let mut state = lock(&self.shared.state);
        if state.stopping {
            return None;
        }
        let paused = state.paused;
        let latched = state.latched.is_some();
        let mut jobs = Vec::new();
        let mut until: Option<Instant> = None;
        for (number, member) in state.members.iter_mut().enumerate() {
            match member.take_due(now, paused) {
                Some(kind @ (TimerKind::HoldOff | TimerKind::Reentry)) => {
                    jobs.extend(enter_or_not(member, kind, latched, now).map(|job| (number, job)));
                }
                // With `power=off` the guest's D3hot is a model only.
                Some(TimerKind::Park) if member.policy.power == PowerChoice::Off => {}
                Some(TimerKind::Park) => {
                    member.apply(PowerEvent::ParkElapsed, now);
                }
                Some(TimerKind::Confirm) => jobs.push((number, Job::Confirm)),
                Some(TimerKind::Retry) => jobs.push((number, Job::Retry)),
                None => {}
            }
            if let Some(operation) = member.operation.take() {
                jobs.push((number, Job::Operate(operation)));
            }
            // One that is still on its way into low power is woken once it is there.
            if member.wake.wanted && !member.power.hardware.is_busy() {
                member.wake.wanted = false;
                jobs.push((number, Job::Wake));
            }
            if !paused && std::mem::take(&mut member.wake.deferred) {
                jobs.push((number, Job::Deliver));
            }
            if let Some(timer) = member.timer.filter(|timer| !(paused && timer.kind.is_wake())) {
                until = Some(until.map_or(timer.at, |until| until.min(timer.at)));
            }
        }
        Some(Round { jobs, until })
    }

    fn work(&mut self, number: usize, job: Job) {
        match job {
            Job::HeldOff(hold_off) => {
                log::info!("power {}: held off {} ms", self.shared.members[number].bdf, hold_off.as_millis());
            }
            Job::PutOff(wait) => log::warn!(
                "power {}: budget of toggles used up; stays powered for {} more while the guest has it off",
                self.shared.members[number].bdf,
                millis(wait)
            ),
            Job::Denied(denial) => self.denied(number, denial),
            Job::Operate(Operation::Enter) => self.enter(number),
            Job::Operate(Operation::Exit) => self.exit(number),
            Job::Operate(Operation::SetD3hot) => self.set_d3hot(number),
            Job::Operate(Operation::SetD0) => self.set_d0(number),
            Job::Operate(Operation::Reset) => self.reset(number),
            Job::Wake => self.wake(number),
            Job::Deliver => self.shared.deliver_wake(number, false),
            Job::Confirm => self.shared.confirm_wake(number),
            Job::Retry => self.shared.retry_wake(number),
        }
    }

    fn readable(&mut self, token: u64) {
        if token == KICK {
            let _ = self.shared.kick.read();
            return;
        }
        if token & HOST_SIGNAL != 0 {
            let number = usize::try_from((token & !HOST_SIGNAL) >> 1).unwrap_or(usize::MAX);
            self.shared.host_says(number, token & 1 == ERROR);
            return;
        }
        let fired = |slot: &Option<Armed>| slot.as_ref().is_some_and(|armed| armed.token == token);
        // A token of an entry that has been ended since is of no interest.
        let Some(number) = self.armed.iter().position(fired) else { return };
        self.disarm(number);
        let woken = lock(&self.shared.state).members[number].apply(PowerEvent::Woke, Instant::now()).woken;
        if woken {
            self.shared.deliver_wake(number, true);
        }
    }

    fn enter(&mut self, number: usize) {
        let shared = Arc::clone(&self.shared);
        let bdf = shared.members[number].bdf;
        // A vCPU may still be on its way from the state's change to the gate's.
        shared.sync_gate(number);
        let policy = lock(&shared.state).members[number].policy;
        let started = Instant::now();
        let result = match self.enter_once(number, &policy) {
            Err(EnterError::Engaged) => {
                let message = "the host says it is in low power already; ending that and trying once more";
                log::warn!("power {bdf}: {message}");
                lock(&shared.state).members[number].failed(
                    FailureKind::EntryEngaged,
                    message.to_owned(),
                    Instant::now(),
                );
                match shared.spec(number).low_power.exit() {
                    Ok(()) => self.enter_once(number, &policy),
                    Err(_) => Err(EnterError::Engaged),
                }
            }
            result => result,
        };
        let took = started.elapsed();
        match result {
            Ok(()) => {
                let mut state = lock(&shared.state);
                let member = &mut state.members[number];
                member.counters.entry_latency.add(took);
                member.apply(PowerEvent::Entered, Instant::now());
                drop(state);
                log::info!("power {bdf}: entered low power in {}", millis(took));
            }
            Err(error) => {
                let message = format!("stays powered while the guest has it off: {}", chain(&error));
                log::warn!("power {bdf}: {message}");
                let now = Instant::now();
                let mut state = lock(&shared.state);
                let member = &mut state.members[number];
                member.failed(kind_of(&error), message, now);
                member.apply(PowerEvent::EntryRefused, now);
            }
        }
        shared.settled.notify_all();
    }

    fn enter_once(&mut self, number: usize, policy: &Policy) -> Result<(), EnterError> {
        let member = self.shared.spec(number);
        if policy.enters_silently() {
            return member.low_power.enter(None);
        }
        let eventfd = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(EnterError::EventFd)?;
        self.generation = self.generation.wrapping_add(1);
        let token = u64::try_from(number).unwrap_or(u64::MAX) << 32 | u64::from(self.generation);
        let event = EpollEvent::new(EventSet::IN, token);
        self.poller
            .epoll
            .ctl(ControlOperation::Add, eventfd.as_raw_fd(), event)
            .map_err(EnterError::EventFd)?;
        let armed = Armed { eventfd, token };
        let result = member.low_power.enter(Some(&armed.eventfd));
        self.armed[number] = Some(armed);
        if result.is_err() {
            self.disarm(number);
        }
        result
    }

    fn exit(&mut self, number: usize) {
        let shared = Arc::clone(&self.shared);
        let bdf = shared.members[number].bdf;
        let member = shared.spec(number);
        let started = Instant::now();
        let result = member.low_power.exit();
        let took = started.elapsed();
        // The kernel has signalled this entry's eventfd; with the descriptor goes the signal.
        self.disarm(number);
        let failure = match result {
            Err(error) => Some((FailureKind::ExitRefused, chain(&error))),
            Ok(()) => {
                log::info!("power {bdf}: exited low power in {}", millis(took));
                (!member.gate.settle()).then(|| {
                    let what = "the device does not answer after the end of low power";
                    (FailureKind::NoAnswer, what.to_owned())
                })
            }
        };
        let now = Instant::now();
        match failure {
            None => {
                {
                    let mut state = lock(&shared.state);
                    let member = &mut state.members[number];
                    member.counters.exit_latency.add(now.saturating_duration_since(started));
                    member.apply(PowerEvent::Exited, now);
                }
                self.back(number);
            }
            Some((kind, what)) => self.not_back(number, kind, &what, now),
        }
    }

    /// Wakes the device for an operator. The guest hears of it as of any wake; it has the last word on what follows.
    fn wake(&mut self, number: usize) {
        let shared = Arc::clone(&self.shared);
        let bdf = shared.members[number].bdf;
        if lock(&shared.state).members[number].power.hardware != Hardware::LowPower {
            return;
        }
        if let Err(error) = shared.spec(number).low_power.exit() {
            let message = format!("not woken for the operator: {}", chain(&error));
            log::warn!("power {bdf}: {message}");
            lock(&shared.state).members[number].failed(FailureKind::ExitRefused, message, Instant::now());
            return;
        }
        self.disarm(number);
        let now = Instant::now();
        let woken = {
            let mut state = lock(&shared.state);
            let member = &mut state.members[number];
            let woken = member.apply(PowerEvent::Woke, now).woken;
            if woken {
                member.wake.unbooked = false;
                member.woken(WakeCause::Host, now);
            }
            woken
        };
        if woken {
            log::info!("power {bdf}: woken for the operator");
            shared.deliver_wake(number, false);
        }
    }

    /// The device answers: let the guest in, if it wants.
    fn back(&self, number: usize) {
        self.shared.sync_gate(number);
        self.shared.report_ready(number, true);
        self.shared.settled.notify_all();
    }

    /// The device did not come back: keep its slot from low power, and reset it if that is wanted and was not done yet.
    fn not_back(&self, number: usize, kind: FailureKind, what: &str, now: Instant) {
        let shared = &self.shared;
        let bdf = shared.members[number].bdf;
        let (resetting, latched, message) = {
            let mut state = lock(&shared.state);
            let latched = shared.latch(&mut state, number, now);
            let member = &mut state.members[number];
            let resetting = member.policy.on_lost == LostPolicy::Reset && !member.reset_tried;
            let next = if resetting { "resetting it once" } else { LOST };
            let message = format!("lost: {what}; {next}");
            member.failed(kind, message.clone(), now);
            let event = if resetting { PowerEvent::ExitFailedReset } else { PowerEvent::ExitFailed };
            member.apply(event, now);
            (resetting, latched, message)
        };
        log::error!("power {bdf}: {message}");
        if latched {
            log::warn!(
                "power {bdf}: latched: no device of its slot is cut from power any more, until the latch is cleared or the VM starts again"
            );
        }
        if !resetting {
            shared.lose_gate(number);
        }
    }

    /// A reset of a device that did not come back.
    fn reset(&self, number: usize) {
        let shared = &self.shared;
        let bdf = shared.members[number].bdf;
        let member = shared.spec(number);
        // Under an entry that is still engaged BARs would stay dead after the reset; that of a lost device may have failed to end.
        let answers = member.low_power.exit().is_ok() && member.gate.reset_hardware();
        let now = Instant::now();
        if answers {
            {
                let mut state = lock(&shared.state);
                let member = &mut state.members[number];
                member.apply(PowerEvent::ResetAnswered, now);
                member.outbox.plain(News::Recovered, now);
            }
            log::warn!("power {bdf}: back after a reset; what the device had in it is gone");
            self.back(number);
        } else {
            let message = format!("lost: it does not answer after a reset either; {LOST}");
            {
                let mut state = lock(&shared.state);
                let member = &mut state.members[number];
                member.failed(FailureKind::ResetFailed, message.clone(), now);
                member.apply(PowerEvent::ResetFailed, now);
            }
            log::error!("power {bdf}: {message}");
            shared.lose_gate(number);
        }
    }

    fn denied(&self, number: usize, denial: Denial) {
        let bdf = self.shared.members[number].bdf;
        match denial {
            Denial::Latched => log::warn!(
                "power {bdf}: stays powered while the guest has it off: a device of its slot did not come back before; clear the latch \
                 or start the VM again to let it sleep"
            ),
            _ => log::info!("power {bdf}: stays powered while the guest has it off: power=off"),
        }
        self.shared.settled.notify_all();
    }

    fn set_d3hot(&mut self, number: usize) {
        let shared = &self.shared;
        let bdf = shared.members[number].bdf;
        // A vCPU may still be on its way from the state's change to the gate's.
        shared.sync_gate(number);
        let taken = shared.spec(number).gate.set_hardware_d3hot(true);
        let refused = "the host did not take D3hot; the device may have stayed in D0";
        if taken {
            log::info!("power {bdf}: in D3hot with the guest");
        } else {
            log::warn!("power {bdf}: {refused}");
        }
        let now = Instant::now();
        let mut state = lock(&shared.state);
        let member = &mut state.members[number];
        if !taken {
            member.failed(FailureKind::D3hotRefused, refused.to_owned(), now);
        }
        member.apply(PowerEvent::D3hotSet, now);
        drop(state);
        shared.settled.notify_all();
    }

    fn set_d0(&mut self, number: usize) {
        let shared = &self.shared;
        let bdf = shared.members[number].bdf;
        let answers = shared.spec(number).gate.set_hardware_d3hot(false);
        let silent = "no answer after the way from D3hot to D0; trying the way back from low power";
        let effects = {
            let now = Instant::now();
            let mut state = lock(&shared.state);
            let member = &mut state.members[number];
            if answers {
                member.apply(PowerEvent::D0Set, now)
            } else {
                member.failed(FailureKind::D0NoAnswer, silent.to_owned(), now);
                member.apply(PowerEvent::D0Failed, now)
            }
        };
        if answers {
            log::info!("power {bdf}: in D0 with the guest");
        } else {
            log::warn!("power {bdf}: {silent}");
            shared.sync_gate(number);
        }
        if effects.reopen {
            shared.reopen_gate(number);
            shared.report_ready(number, true);
        }
        shared.settled.notify_all();
    }

    fn disarm(&mut self, number: usize) {
        if let Some(armed) = self.armed[number].take() {
            let event = EpollEvent::default();
            // Fails for no descriptor that was added; dropping it takes it out as well.
            let _ = self.poller.epoll.ctl(ControlOperation::Delete, armed.eventfd.as_raw_fd(), event);
        }
    }
}

/// A hold-off or a wait before re-entry is over: on to low power, if policy, latch and budget allow it.
fn enter_or_not(member: &mut MemberState, kind: TimerKind, latched: bool, now: Instant) -> Option<Job> {
    match member.admit(latched, now) {
        Admission::Enter if kind == TimerKind::HoldOff => {
            member.apply(PowerEvent::HoldOffElapsed, now);
            Some(Job::HeldOff(member.held_off))
        }
        Admission::Enter => {
            member.apply(PowerEvent::ReentryDue, now);
            None
        }
        Admission::Later(wait) => {
            member.arm(wait, kind, now);
            Some(Job::PutOff(wait))
        }
        Admission::Shallow => {
            member.apply(PowerEvent::EntryShallow, now);
            None
        }
        Admission::Denied(denial) => {
            member.apply(PowerEvent::EntryDenied, now);
            Some(Job::Denied(denial))
        }
    }
}

fn kind_of(error: &EnterError) -> FailureKind {
    match error {
        EnterError::Engaged => FailureKind::EntryEngaged,
        EnterError::Unsupported => FailureKind::EntryUnsupported,
        EnterError::Refused(_) => FailureKind::EntryRefused,
        EnterError::EventFd(_) => FailureKind::EntryDescriptor,
    }
}

/// The error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
