//! A scripted function, sinks and a slot made of them, for tests of this crate and of those above it.
//!
//! [`FakeFunction`] behaves as the kernel does where it matters: entry is refused while engaged, a wake ends the entry and fires its
//! eventfd once, and so does exit. It notes what would have gone wrong on hardware (a gate opened over a sleeping device, an
//! entry under an open gate, a second entry without an exit) in [`FakeFunction::violations`].

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use acpi::notify_abi::ResourceIndex;
use pci::pme::PmeSink;
use pci::{Bdf, DevFn};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::domain::PowerDomain;
use crate::event::{News, NewsSink, PowerNews};
use crate::gate::FunctionGate;
use crate::host_signals::HostSignals;
use crate::low_power::{EnterError, ExitError, LowPower, ProbeError, Support};
use crate::policy::Policy;
use crate::spec::{DomainSpec, MemberSpec, Timing};
use crate::wake::WakeSink;

/// A call that a [`FakeFunction`] has taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `enter` with a wakeup eventfd.
    EnterWithWakeup,
    /// `enter` without.
    Enter,
    /// `exit`.
    Exit,
    /// `close`.
    Close,
    /// `open`.
    Open,
    /// `settle`.
    Settle,
    /// `answers`.
    Answers,
    /// `reset_hardware`.
    Reset,
    /// `set_hardware_d3hot`.
    SetD3hot(bool),
    /// `latch_pme`.
    LatchPme,
    /// `lost`.
    Lost,
}

/// How a scripted entry fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryFailure {
    /// `-EINVAL`; and the function is engaged, as the kernel would have it.
    Engaged,
    /// `-ENOTTY`.
    Unsupported,
    /// `-EIO`.
    Io,
    /// No eventfd left.
    Descriptor,
}

/// What a test may script. Lists are used up from the front; an empty list means success.
#[derive(Clone, Debug, Default)]
pub struct Script {
    /// Results of the next entries.
    pub entries: VecDeque<Option<EntryFailure>>,
    /// Whether the next exits succeed.
    pub exits: VecDeque<bool>,
    /// Whether the device answers after the next exits and D0 writes.
    pub answers: VecDeque<bool>,
    /// The device has been pulled out: it does not answer when it is asked out of the blue.
    pub silent: bool,
    /// Whether the device answers after the next resets.
    pub resets: VecDeque<bool>,
    /// How long each call of entry, exit and PMCSR writes takes.
    pub delay: Duration,
}

#[derive(Debug, Default)]
struct Hardware {
    engaged: bool,
    /// The host believes in an entry that the domain does not know of, or could not end: only then may it be entered again.
    stale: bool,
    eventfd: Option<EventFd>,
    d3hot: bool,
    gate_closed: bool,
    virtual_d3hot: bool,
    lost: bool,
    pme_status: bool,
    calls: Vec<Call>,
    violations: Vec<String>,
    script: Script,
}

impl Hardware {
    fn disengage(&mut self) {
        self.engaged = false;
        self.stale = false;
        if let Some(eventfd) = self.eventfd.take() {
            let _ = eventfd.write(1);
        }
    }

    fn slots_up(&self) -> bool {
        !self.gate_closed && !self.virtual_d3hot
    }

    fn forbid(&mut self, wrong: bool, what: &str) {
        if wrong {
            self.violations.push(what.to_owned());
        }
    }
}

/// One function: hardware, kernel and gate in one.
#[derive(Debug)]
pub struct FakeFunction {
    bdf: Bdf,
    hardware: Mutex<Hardware>,
    pme_enabled: AtomicBool,
    signals: HostSignals,
    /// Held over a guest write to PMCSR and the call into the domain that follows.
    pmcsr: Mutex<()>,
}

impl FakeFunction {
    /// A function at `01:00.<function>` of the host.
    pub fn new(function: u8) -> Self {
        Self {
            bdf: Bdf { segment: 0, bus: 1, devfn: DevFn::from_bits(function & 7) },
            hardware: Mutex::default(),
            pme_enabled: AtomicBool::new(false),
            signals: HostSignals { release: signal(), error: signal() },
            pmcsr: Mutex::new(()),
        }
    }

    fn hardware(&self) -> MutexGuard<'_, Hardware> {
        self.hardware.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn delay(&self) {
        let delay = self.hardware().script.delay;
        if !delay.is_zero() {
            std::thread::sleep(delay);
        }
    }

    /// Changes the script.
    pub fn script(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.hardware().script);
    }

    /// The guest's PME_En.
    pub fn set_pme_enabled(&self, enabled: bool) {
        self.pme_enabled.store(enabled, Ordering::SeqCst);
    }

    /// The calls so far.
    pub fn calls(&self) -> Vec<Call> {
        self.hardware().calls.clone()
    }

    /// How often `call` was made.
    pub fn count(&self, call: Call) -> usize {
        self.hardware().calls.iter().filter(|made| **made == call).count()
    }

    /// What would have gone wrong on hardware.
    pub fn violations(&self) -> Vec<String> {
        self.hardware().violations.clone()
    }

    /// Whether the guest can reach the function.
    pub fn gate_is_open(&self) -> bool {
        !self.hardware().gate_closed
    }

    /// Whether the function is in low power.
    pub fn is_engaged(&self) -> bool {
        self.hardware().engaged
    }

    /// Whether hardware is in D3hot.
    pub fn is_in_d3hot(&self) -> bool {
        self.hardware().d3hot
    }

    /// Whether the guest was told that the device is gone.
    pub fn is_lost(&self) -> bool {
        self.hardware().lost
    }

    /// PME_Status of the virtual PM capability.
    pub fn pme_status(&self) -> bool {
        self.hardware().pme_status
    }

    /// Waits for low power; panics when it does not come.
    pub fn wait_engaged(&self) {
        eventually("the function enters low power", || self.is_engaged());
    }

    /// The host resumes the function: ends an entry with wakeup, does nothing to one without. Whether it ended one.
    pub fn host_wake(&self) -> bool {
        let mut hardware = self.hardware();
        let told = hardware.engaged && hardware.eventfd.is_some();
        if told {
            hardware.disengage();
        }
        told
    }

    /// The host wants the function back.
    pub fn host_wants_it_back(&self) {
        let _ = self.signals.release.as_ref().map(|signal| signal.write(1));
    }

    /// The bus reports an error of the function.
    pub fn bus_error(&self) {
        let _ = self.signals.error.as_ref().map(|signal| signal.write(1));
    }

    /// The guest writes D3hot to PMCSR.
    pub fn guest_writes_d3hot(&self, domain: &PowerDomain) {
        let _order = self.pmcsr.lock().unwrap_or_else(PoisonError::into_inner);
        if self.hardware().gate_closed {
            return;
        }
        self.hardware().virtual_d3hot = true;
        domain.parked(self.bdf.devfn);
    }

    /// The guest writes D0 to PMCSR; what [`PowerDomain::unparked`] said.
    pub fn guest_writes_d0(&self, domain: &PowerDomain) -> bool {
        let _order = self.pmcsr.lock().unwrap_or_else(PoisonError::into_inner);
        let here = domain.unparked(self.bdf.devfn);
        let mut hardware = self.hardware();
        if here && !hardware.gate_closed {
            hardware.virtual_d3hot = false;
            let wrong = hardware.engaged || hardware.d3hot;
            hardware.forbid(wrong, "BAR slots up again over sleeping hardware");
        }
        here
    }
}

impl LowPower for FakeFunction {
    fn probe(&self) -> Result<Support, ProbeError> {
        Ok(Support::FULL)
    }

    fn enter(&self, wake: Option<&EventFd>) -> Result<(), EnterError> {
        self.delay();
        let eventfd = wake.map(EventFd::try_clone).transpose().map_err(EnterError::EventFd)?;
        let mut hardware = self.hardware();
        hardware.calls.push(if wake.is_some() { Call::EnterWithWakeup } else { Call::Enter });
        let open = !hardware.gate_closed;
        hardware.forbid(open, "entry under an open gate");
        let again = hardware.engaged && !hardware.stale;
        hardware.forbid(again, "entered twice without an exit");
        let scripted = hardware.script.entries.pop_front().flatten();
        if hardware.engaged || scripted == Some(EntryFailure::Engaged) {
            hardware.engaged = true;
            hardware.stale = true;
            return Err(EnterError::Engaged);
        }
        match scripted {
            Some(EntryFailure::Unsupported) => Err(EnterError::Unsupported),
            Some(EntryFailure::Descriptor) => {
                Err(EnterError::EventFd(io::Error::from_raw_os_error(libc::EMFILE)))
            }
            Some(_) => Err(EnterError::Refused(io::Error::from_raw_os_error(libc::EIO))),
            None => {
                hardware.engaged = true;
                hardware.eventfd = eventfd;
                Ok(())
            }
        }
    }

    fn exit(&self) -> Result<(), ExitError> {
        self.delay();
        let mut hardware = self.hardware();
        hardware.calls.push(Call::Exit);
        let open = !hardware.gate_closed;
        hardware.forbid(open, "exit under an open gate");
        if hardware.script.exits.pop_front() == Some(false) {
            hardware.stale = hardware.engaged;
            return Err(ExitError(io::Error::from_raw_os_error(libc::EIO)));
        }
        hardware.disengage();
        Ok(())
    }
}

impl FunctionGate for FakeFunction {
    fn bdf(&self) -> Bdf {
        self.bdf
    }

    fn close(&self) {
        let mut hardware = self.hardware();
        hardware.calls.push(Call::Close);
        hardware.gate_closed = true;
    }

    fn open(&self) {
        let mut hardware = self.hardware();
        hardware.calls.push(Call::Open);
        hardware.gate_closed = false;
        hardware.virtual_d3hot = false;
        hardware.lost = false;
        let wrong = hardware.engaged || hardware.d3hot;
        hardware.forbid(wrong, "gate opened over sleeping hardware");
    }

    fn settle(&self) -> bool {
        let mut hardware = self.hardware();
        hardware.calls.push(Call::Settle);
        let engaged = hardware.engaged;
        hardware.forbid(engaged, "hardware touched in low power");
        hardware.d3hot = false;
        hardware.script.answers.pop_front().unwrap_or(true)
    }

    fn set_hardware_d3hot(&self, on: bool) -> bool {
        self.delay();
        let mut hardware = self.hardware();
        hardware.calls.push(Call::SetD3hot(on));
        let engaged = hardware.engaged;
        hardware.forbid(engaged, "PMCSR written in low power");
        if on && hardware.slots_up() {
            return false;
        }
        hardware.d3hot = on;
        on || hardware.script.answers.pop_front().unwrap_or(true)
    }

    fn answers(&self) -> bool {
        let mut hardware = self.hardware();
        hardware.calls.push(Call::Answers);
        let asleep = hardware.engaged || hardware.d3hot;
        hardware.forbid(asleep, "a sleeping device was asked whether it answers");
        !hardware.script.silent
    }

    fn reset_hardware(&self) -> bool {
        self.delay();
        let mut hardware = self.hardware();
        hardware.calls.push(Call::Reset);
        let wrong = hardware.engaged || !hardware.gate_closed;
        hardware.forbid(wrong, "reset in low power or under an open gate");
        hardware.d3hot = false;
        hardware.script.resets.pop_front().unwrap_or(true)
    }

    fn latch_pme(&self) -> bool {
        let mut hardware = self.hardware();
        hardware.calls.push(Call::LatchPme);
        hardware.pme_status = true;
        self.pme_enabled.load(Ordering::SeqCst)
    }

    fn lost(&self) {
        let mut hardware = self.hardware();
        hardware.calls.push(Call::Lost);
        hardware.lost = true;
    }
}

fn signal() -> Option<Arc<EventFd>> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).ok().map(Arc::new)
}

/// A root port that counts PMEs; refuses them when told to.
#[derive(Debug, Default)]
pub struct FakePmeSink {
    from: Mutex<Vec<DevFn>>,
    refuses: AtomicBool,
}

impl FakePmeSink {
    /// Where PMEs have come from.
    pub fn raised(&self) -> Vec<DevFn> {
        self.from.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the guest has PME interrupts disabled.
    pub fn refuse(&self, refuses: bool) {
        self.refuses.store(refuses, Ordering::SeqCst);
    }
}

impl PmeSink for FakePmeSink {
    fn pme(&self, from: DevFn) -> bool {
        let taken = !self.refuses.load(Ordering::SeqCst);
        if taken {
            self.from.lock().unwrap_or_else(PoisonError::into_inner).push(from);
        }
        taken
    }
}

/// An event device that counts.
#[derive(Debug, Default)]
pub struct FakeWakeSink(AtomicUsize);

impl FakeWakeSink {
    /// How often the guest was interrupted.
    pub fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl WakeSink for FakeWakeSink {
    fn notify(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Keeps all news.
#[derive(Debug, Default)]
pub struct FakeNewsSink(Mutex<Vec<PowerNews>>);

impl FakeNewsSink {
    /// What there was so far.
    pub fn told(&self) -> Vec<PowerNews> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether there was such news.
    pub fn has(&self, like: impl Fn(&News) -> bool) -> bool {
        self.told().iter().any(|told| like(&told.news))
    }
}

impl NewsSink for FakeNewsSink {
    fn tell(&self, news: &PowerNews) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(news.clone());
    }
}

/// A domain of fake functions, with times short enough for tests.
#[derive(Debug)]
pub struct Slot {
    /// The domain.
    pub domain: Arc<PowerDomain>,
    /// Its functions, by number.
    pub functions: Vec<Arc<FakeFunction>>,
    /// Its root port.
    pub pme: Arc<FakePmeSink>,
    /// Its event device.
    pub wake: Arc<FakeWakeSink>,
    /// What was told.
    pub news: Arc<FakeNewsSink>,
}

impl Slot {
    /// The root port's power resource.
    pub const PORT: ResourceIndex = ResourceIndex(30);

    /// A slot with so many functions (8 at most), hold-off 5 ms.
    pub fn new(functions: u8) -> Self {
        Self::with(functions, |_| {})
    }

    /// The same with the specification changed by `change`.
    ///
    /// # Panics
    /// When the system has no descriptors or threads left.
    pub fn with(functions: u8, change: impl FnOnce(&mut DomainSpec)) -> Self {
        let functions: Vec<_> =
            (0..functions).map(|function| Arc::new(FakeFunction::new(function))).collect();
        let pme = Arc::new(FakePmeSink::default());
        let wake = Arc::new(FakeWakeSink::default());
        let news = Arc::new(FakeNewsSink::default());
        let policy = Policy { hold_off: Duration::from_millis(5), ..Policy::default() };
        let members = functions.iter().zip(0..).map(|(function, number)| MemberSpec {
            resource: Some(Self::index(number)),
            devfn: function.bdf.devfn,
            low_power: Arc::<FakeFunction>::clone(function),
            gate: Arc::<FakeFunction>::clone(function),
            signals: function.signals.clone(),
            policy,
        });
        let mut spec = DomainSpec {
            port_resource: Some(Self::PORT),
            members: members.collect(),
            pme: Arc::<FakePmeSink>::clone(&pme),
            wake: Arc::<FakeWakeSink>::clone(&wake),
            news: Some(Arc::<FakeNewsSink>::clone(&news)),
            latched_by: None,
            timing: Timing {
                park: Duration::from_millis(10),
                park_without_resource: Duration::from_millis(2),
                unpark_wait: Duration::from_millis(200),
                confirm: Duration::from_millis(30),
                reentry_first: Duration::from_millis(10),
                reentry_max: Duration::from_millis(40),
                reentry_quiet: Duration::from_secs(60),
                storm_first: Duration::from_millis(40),
                storm_max: Duration::from_millis(150),
                retries: [40, 40].map(Duration::from_millis).into(),
            },
        };
        change(&mut spec);
        match PowerDomain::new(spec) {
            Ok(domain) => Self { domain, functions, pme, wake, news },
            Err(error) => panic!("no power domain: {error}"),
        }
    }

    fn index(function: u8) -> ResourceIndex {
        ResourceIndex(function.saturating_add(31))
    }

    /// The power resource of a function.
    pub fn resource(&self, function: u8) -> ResourceIndex {
        Self::index(function)
    }

    /// `_OFF` of a function, and the wait for low power.
    pub fn off_and_entered(&self, function: u8) {
        self.domain.request(self.resource(function), false);
        self.functions[usize::from(function)].wait_engaged();
        eventually("the domain knows", || {
            self.domain.report()[usize::from(function)].phase == crate::state::Phase::Off
        });
    }

    /// Panics with what would have gone wrong on hardware.
    pub fn assert_sound(&self) {
        for function in &self.functions {
            assert!(function.violations().is_empty(), "{}: {:?}", function.bdf, function.violations());
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.domain.shutdown();
        if !std::thread::panicking() {
            self.assert_sound();
        }
    }
}

/// Waits up to five seconds for `done`; panics with `what` otherwise.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !done() {
        assert!(Instant::now() < deadline, "not in five seconds: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
