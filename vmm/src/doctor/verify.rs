//! `--verify`: the device is really put to sleep, watched, and brought back, and then is as it was found.
//!
//! Binding, opening, low power: each is undone by dropping it, in the opposite order, whatever happens in between. SIGINT and SIGTERM end
//! the attempt early and do not skip that. (VFIO: `include/uapi/linux/vfio.h`, see the head of the crate `vfio_pm`.)

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use devices::vfio::bind::{BindError, Binder, Kernel};
use devices::vfio::host::HostFunction;
use devices::vfio::open::{ContextKind, IommuContext, OpenError};
use pci::Bdf;
use serde::Serialize;
use vfio_pm::{EnterError, ExitError, LowPower, ProbeError, VfioLowPower};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::checks::Patient;
use super::finding::{Check, Finding, Reading, Severity};
use super::host::Host;
use super::pm;
use super::usage;

/// Bytes of configuration space that every function has.
const CONFIG_BYTES: usize = 256;
/// A register that VFIO passes through from hardware: revision and class code.
const CLASS_REGISTER: usize = 0x08;

/// How long is waited for what.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For D3cold.
    pub reach: Duration,
    /// In D3cold, for something that wakes the device.
    pub hold: Duration,
    /// Between two looks.
    pub pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { reach: Duration::from_secs(5), hold: Duration::from_secs(1), pause: Duration::from_millis(1) }
    }
}

/// The attempt could not be made, or not to its end.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// It would do harm, or cannot work.
    #[error("{bdf} is not tried: {reason}")]
    Refused {
        /// The device.
        bdf: Bdf,
        /// Why, with the remedy.
        reason: String,
    },
    /// It could not be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// It could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The features could not be asked for.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// There are no features.
    #[error(
        "the host's VFIO driver has no low-power features for {0}; it needs Linux 6.1 or newer and a driver built on vfio-pci-core"
    )]
    Unsupported(Bdf),
    /// Low power was refused.
    #[error(transparent)]
    Enter(#[from] EnterError),
    /// Low power could not be ended.
    #[error(transparent)]
    Exit(#[from] ExitError),
    /// Stopped by a signal.
    #[error("{0}: the attempt was interrupted; the device is as it was")]
    Interrupted(Bdf),
}

impl VerifyError {
    /// The failure as a finding, so that the rest of the report is not lost.
    pub fn finding(&self, bdf: Bdf) -> Finding {
        let severity =
            if matches!(self, Self::Refused { .. }) { Severity::Warning } else { Severity::Blocker };
        let mut meaning = self.to_string();
        if let Some(source) = std::error::Error::source(self) {
            meaning = format!("{meaning}: {source}");
        }
        Finding::device(bdf, Check::Verify, severity, format!("The attempt failed: {meaning}."))
    }
}

/// One change of state while the device was allowed to sleep.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Step {
    /// Since low power was entered.
    pub after_ms: f64,
    /// `power_state`.
    pub power_state: String,
    /// `power/runtime_status`.
    pub runtime_status: String,
}

/// What an attempt has shown.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measurement {
    /// It was bound to vfio-pci for the attempt only.
    pub bound_for_this: bool,
    /// Time that the kernel took to allow low power.
    pub entry_ms: f64,
    /// The states that it went through.
    pub steps: Vec<Step>,
    /// The deepest of them.
    pub deepest: String,
    /// When something on the host, or the device itself, woke it; none when nothing did.
    pub woken_after_ms: Option<f64>,
    /// Time until the device was back.
    pub exit_ms: f64,
    /// Whether it answers again.
    pub answers: bool,
}

/// Tries one device.
///
/// # Errors
/// See [`VerifyError`]. The device is as it was found all the same.
pub fn verify<K: Kernel>(
    host: &Host,
    binder: &Binder<K>,
    patient: &Patient,
    stop: &AtomicBool,
) -> Result<(Measurement, Vec<Finding>), VerifyError> {
    let bdf = patient.bdf();
    refuse(host, patient)?;
    let loan = binder.lend(bdf)?;
    let bound_for_this = loan.is_needed();
    let attempted = open_and_attempt(host, patient, stop);
    drop(loan);
    let (mut measurement, capability) = attempted?;
    measurement.bound_for_this = bound_for_this;
    let mut findings = vec![judge(host, bdf, &measurement)];
    if !capability {
        let meaning =
            format!("{bdf} has no PCI power management capability; this was seen while it was open.");
        findings.push(
            Finding::device(bdf, Check::PmCapability, Severity::Blocker, meaning)
                .remedy("Nothing: the device is made so."),
        );
    }
    findings.extend(not_given_back(host, patient));
    Ok((measurement, findings))
}

/// Why the attempt must not be made.
fn refuse(host: &Host, patient: &Patient) -> Result<(), VerifyError> {
    let bdf = patient.bdf();
    let refused = |reason: String| Err(VerifyError::Refused { bdf, reason });
    if patient.function.is_bridge() {
        return refused("it is a bridge; name a device behind it".to_owned());
    }
    if patient.power.is_virtual_function {
        return refused("a virtual function has no power of its own; name its physical function".to_owned());
    }
    if let Some(owner) = &patient.owner {
        return refused(format!("process {} ({}) has it; stop that VM first", owner.pid, owner.name));
    }
    let Some(group) = &patient.group else {
        return refused("it is in no IOMMU group; switch the IOMMU on (intel_iommu=on on Intel)".to_owned());
    };
    for member in group.members.iter().filter(|member| member.obstructs_group()) {
        if let Some((usage, _)) = usage::by_host(host, member).into_iter().next() {
            return refused(format!(
                "it would be taken from the host, which uses {}: {usage}; stop that use, or bind the device yourself",
                member.bdf
            ));
        }
    }
    Ok(())
}

/// Opens the device, tries it and closes it. Says also whether it has a power management capability.
fn open_and_attempt(
    host: &Host,
    patient: &Patient,
    stop: &AtomicBool,
) -> Result<(Measurement, bool), VerifyError> {
    let bdf = patient.bdf();
    let by_group = host.dev.join("vfio/vfio").exists();
    let context =
        IommuContext::new(if by_group { ContextKind::Container } else { ContextKind::Iommufd }, None)?;
    let handle = context.open(bdf, &patient.function.dir, None)?;
    let mut config = [0xff; CONFIG_BYTES];
    let capability = handle.config_read(0, &mut config).is_err() || pm::capability(&config).is_some();
    let low_power = VfioLowPower::new(Arc::clone(&handle));
    let answers = || {
        let mut register = [0xff; 4];
        handle.config_read(CLASS_REGISTER as u64, &mut register).is_ok() && register != [0xff; 4]
    };
    let measurement = attempt(&low_power, host, bdf, &answers, stop, Patience::default())?;
    Ok((measurement, capability))
}

/// Puts an open device to sleep, watches it, and brings it back.
pub fn attempt(
    low_power: &dyn LowPower,
    host: &Host,
    bdf: Bdf,
    answers: &dyn Fn() -> bool,
    stop: &AtomicBool,
    patience: Patience,
) -> Result<Measurement, VerifyError> {
    if !low_power.probe()?.is_full() {
        return Err(VerifyError::Unsupported(bdf));
    }
    let wake = EventFd::new(EFD_NONBLOCK).map_err(EnterError::EventFd)?;
    let begin = Instant::now();
    low_power.enter(Some(&wake))?;
    let entered = begin.elapsed();
    let (steps, woken) = watch(host, bdf, begin, &wake, stop, patience);
    let before_exit = Instant::now();
    low_power.exit()?;
    let exited = before_exit.elapsed();
    let answers = answers();
    if stop.load(Ordering::Relaxed) {
        return Err(VerifyError::Interrupted(bdf));
    }
    let depth = |state: &str| ["D0", "D1", "D2", "D3hot", "D3cold"].iter().position(|name| *name == state);
    let deepest = steps.iter().map(|step| step.power_state.as_str()).max_by_key(|state| depth(state));
    Ok(Measurement {
        bound_for_this: false,
        entry_ms: milliseconds(entered),
        deepest: deepest.unwrap_or("unknown").to_owned(),
        steps,
        woken_after_ms: woken.map(milliseconds),
        exit_ms: milliseconds(exited),
        answers,
    })
}

/// Writes down every change of state, until D3cold has lasted for a while, something wakes the device, or the time is up.
fn watch(
    host: &Host,
    bdf: Bdf,
    begin: Instant,
    wake: &EventFd,
    stop: &AtomicBool,
    patience: Patience,
) -> (Vec<Step>, Option<Duration>) {
    let mut steps: Vec<Step> = Vec::new();
    let mut end = begin + patience.reach;
    let mut cold = false;
    loop {
        let value = |name| host.device(bdf, name).value.unwrap_or_else(|| "unknown".to_owned());
        let (power_state, runtime_status) = (value("power_state"), value("power/runtime_status"));
        let now = Instant::now();
        let known = steps.last();
        if known.is_none_or(|last| last.power_state != power_state || last.runtime_status != runtime_status) {
            steps.push(Step {
                after_ms: milliseconds(now - begin),
                power_state: power_state.clone(),
                runtime_status,
            });
        }
        if wake.read().is_ok() {
            return (steps, Some(now - begin));
        }
        if power_state == "D3cold" && !cold {
            (cold, end) = (true, now + patience.hold);
        }
        if now >= end || stop.load(Ordering::Relaxed) {
            return (steps, None);
        }
        thread::sleep(patience.pause);
    }
}

/// What the measurement means.
fn judge(host: &Host, bdf: Bdf, measured: &Measurement) -> Finding {
    let finding = |severity, meaning: String| {
        let reading = Reading::new(host.attribute(bdf, "power_state"), Some(measured.deepest.as_str()));
        Finding::device(bdf, Check::Verify, severity, meaning).read(reading)
    };
    let forbid = format!("echo 0 >{}", host.attribute(bdf, "d3cold_allowed").display());
    if !measured.answers {
        return finding(
            Severity::Blocker,
            format!("{bdf} went to {} and did not come back: its registers read all ones.", measured.deepest),
        )
        .remedy(format!(
            "Look in the host's kernel log. Remove and rescan the device, or reboot. To keep it from D3cold for good: {forbid}"
        ));
    }
    let back = format!("back after {:.1} ms", measured.exit_ms);
    let cold = measured.steps.iter().find(|step| step.power_state == "D3cold");
    match (cold, measured.woken_after_ms) {
        (Some(step), None) => {
            finding(Severity::Ok, format!("{bdf} really loses its power: D3cold after {:.1} ms, {back}.", step.after_ms))
        }
        (_, Some(woken)) => finding(
            Severity::Warning,
            format!("{bdf} reached {} and was woken again after {woken:.1} ms; {back}.", measured.deepest),
        )
        .remedy("Look for what reads the device on the host (lspci, monitoring), or for an event of the device itself."),
        (None, None) => finding(
            Severity::Blocker,
            format!("{bdf} reached {} and no more; {back}.", measured.deepest),
        )
        .remedy(
            "The other findings say why. If there is none: firmware (_S0W), driver or a quirk of the kernel; look in the host's kernel log.",
        ),
    }
}

/// A finding for each function that has not got back what it had.
fn not_given_back(host: &Host, patient: &Patient) -> Vec<Finding> {
    let sysfs = host.functions();
    let members = patient.group.iter().flat_map(|group| &group.members);
    members
        .filter_map(|before| {
            let now = HostFunction::read(&sysfs, before.bdf).ok()?;
            if now.driver == before.driver {
                return None;
            }
            let meaning =
                format!("{} had {} and has {} now.", before.bdf, before.driver_name(), now.driver_name());
            Some(
                Finding::device(before.bdf, Check::Verify, Severity::Blocker, meaning)
                    .remedy(format!("Run: dormouse unbind {}; look in the host's kernel log.", before.bdf)),
            )
        })
        .collect()
}

fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e4).round() / 10.0
}

/// Registers the signals that end an attempt early.
///
/// # Errors
/// The kernel does not let them be handled.
pub fn stop_on_signals() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}
