//! vCPU threads: they run the guest and carry its port and memory accesses to the buses.
//!
//! Follows Linux `Documentation/virt/kvm/api.rst`, section 5 (the `kvm_run` structure). A fault that the guest
//! can cause never ends the machine: accesses that nobody serves read all ones, and a vCPU that finds guest
//! memory gone (a BAR whose device the host took away) closes those BARs and goes on.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use log::{debug, error, warn};
use vm_device::bus::{MmioAddress, PioAddress};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::control::{Control, StopReason};

/// Stack of a vCPU's thread. The customary 2 MiB would be one huge page, and all of it resident at the first touch.
const STACK_BYTES: usize = 512 << 10;

/// `KVM_SYSTEM_EVENT_SHUTDOWN`, `KVM_SYSTEM_EVENT_RESET`, `KVM_SYSTEM_EVENT_CRASH`.
const SYSTEM_EVENTS: [StopReason; 3] = [StopReason::PowerOff, StopReason::Reset, StopReason::Reset];

/// So many faults in a row on one vCPU, with nothing run in between, are more than closing BARs can cure.
const MAX_FAULTS_IN_A_ROW: u32 = 16;

/// What a vCPU does when `KVM_RUN` finds no memory behind a guest address (`EFAULT`): closes every direct
/// mapping of assigned devices, so that the access is trapped when it is tried again.
pub trait FaultCure: Send + Sync {
    /// `again`: the last cure did not help. Returns whether there was anything to close.
    fn close_direct_mappings(&self, again: bool) -> bool;
}

/// What all vCPUs share.
#[derive(Clone)]
pub struct VcpuContext {
    /// The buses, frozen.
    pub io: Arc<IoManager>,
    /// Where stop requests go.
    pub control: Arc<Control>,
    /// See [`FaultCure`].
    pub faults: Arc<dyn FaultCure>,
}

/// What all vCPU threads are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Mode {
    Run,
    /// Stay out of the guest until told otherwise.
    Pause,
    /// End.
    Stop,
}

/// Tells the vCPU threads what to do, and counts those that have stopped for a pause.
#[derive(Debug, Default)]
struct Turnstile {
    mode: AtomicU8,
    parked: Mutex<usize>,
    changed: Condvar,
}

impl Turnstile {
    fn set(&self, mode: Mode) {
        // Under the lock, so that a thread on its way into `park` does not miss it.
        let _parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        self.mode.store(mode as u8, Ordering::SeqCst);
        self.changed.notify_all();
    }

    fn is(&self, mode: Mode) -> bool {
        self.mode.load(Ordering::SeqCst) == mode as u8
    }

    /// Waits for the end of a pause.
    fn park(&self) {
        let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        *parked += 1;
        self.changed.notify_all();
        parked =
            self.changed.wait_while(parked, |_| self.is(Mode::Pause)).unwrap_or_else(PoisonError::into_inner);
        *parked -= 1;
        self.changed.notify_all();
    }

    fn parked(&self) -> usize {
        *self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The running vCPU threads.
pub struct Vcpus {
    threads: Vec<JoinHandle<()>>,
    turnstile: Arc<Turnstile>,
    nmi: Arc<AtomicBool>,
}

/// How often a vCPU that is still in the guest is called out of it.
const KICK_INTERVAL: Duration = Duration::from_millis(1);

extern "C" fn kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Vcpus {
    /// Starts one thread for each of `vcpus`.
    pub fn start(vcpus: Vec<VcpuFd>, context: &VcpuContext) -> io::Result<Self> {
        // The signal's only work is to end KVM_RUN.
        register_signal_handler(SIGRTMIN(), kick).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        let mut started =
            Self { threads: Vec::with_capacity(vcpus.len()), turnstile: Arc::default(), nmi: Arc::default() };
        // The first vCPU starts the others, so it goes last: then they are all there.
        for (number, fd) in vcpus.into_iter().enumerate().rev() {
            let turnstile = Arc::clone(&started.turnstile);
            let nmi = (number == 0).then(|| Arc::clone(&started.nmi));
            let vcpu = Vcpu { number, fd, context: context.clone(), turnstile, nmi };
            match thread::Builder::new()
                .name(format!("vcpu{number}"))
                .stack_size(STACK_BYTES)
                .spawn(move || vcpu.run())
            {
                Ok(thread) => started.threads.push(thread),
                Err(e) => {
                    started.stop();
                    return Err(e);
                }
            }
        }
        Ok(started)
    }

    /// Takes all vCPUs out of the guest, and returns once they are. One that is in the middle of an access ends that first.
    pub fn pause(&self) {
        self.turnstile.set(Mode::Pause);
        self.kick_until(|_| {
            let ended = self.threads.iter().filter(|thread| thread.is_finished()).count();
            self.turnstile.parked() + ended >= self.threads.len()
        });
    }

    /// Lets paused vCPUs go on.
    pub fn resume(&self) {
        self.turnstile.set(Mode::Run);
    }

    /// Gives the first vCPU a non-maskable interrupt, as the button of a server does.
    pub fn nmi(&self) {
        self.nmi.store(true, Ordering::SeqCst);
        if self.turnstile.is(Mode::Pause) {
            // It comes with the end of the pause.
            return;
        }
        self.kick_until(|threads| {
            !self.nmi.load(Ordering::SeqCst) || threads.iter().all(JoinHandle::is_finished)
        });
    }

    /// Sends the signal until `done`: one that arrives just before `KVM_RUN` would be lost.
    fn kick_until(&self, done: impl Fn(&[JoinHandle<()>]) -> bool) {
        while !done(&self.threads) {
            for thread in self.threads.iter().filter(|thread| !thread.is_finished()) {
                if let Err(e) = thread.kill(SIGRTMIN()) {
                    debug!("a vCPU thread takes no signal any more: {e}");
                }
            }
            thread::park_timeout(KICK_INTERVAL);
        }
    }

    /// Takes all vCPUs out of the guest and waits for their threads.
    pub fn stop(self) {
        self.turnstile.set(Mode::Stop);
        self.kick_until(|threads| threads.iter().all(JoinHandle::is_finished));
        for thread in self.threads {
            if thread.join().is_err() {
                error!("a vCPU thread panicked");
            }
        }
    }
}

struct Vcpu {
    number: usize,
    fd: VcpuFd,
    context: VcpuContext,
    turnstile: Arc<Turnstile>,
    /// Set when a non-maskable interrupt is wanted; the first vCPU has it.
    nmi: Option<Arc<AtomicBool>>,
}

/// What to do after an exit.
enum Next {
    Run,
    Stop(StopReason),
}

impl Vcpu {
    fn run(mut self) {
        let mut faults = 0;
        loop {
            if self.turnstile.is(Mode::Stop) {
                return;
            }
            if self.turnstile.is(Mode::Pause) {
                // So that the guest's watchdogs do not take the pause for a hang. A guest without a KVM clock has none to tell.
                let _unused_clock = self.fd.kvmclock_ctrl();
                self.turnstile.park();
                continue;
            }
            if self.nmi.as_ref().is_some_and(|nmi| nmi.swap(false, Ordering::SeqCst))
                && let Err(e) = self.fd.nmi()
            {
                error!("vCPU {}: no non-maskable interrupt: {e}", self.number);
            }
            let next = match self.step() {
                Ok(next) => {
                    faults = 0;
                    next
                }
                Err(e) => match e.kind() {
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Next::Run,
                    _ if e.raw_os_error() == Some(libc::EFAULT) && faults < MAX_FAULTS_IN_A_ROW => {
                        faults += 1;
                        let closed = self.context.faults.close_direct_mappings(faults > 1);
                        warn!(
                            "vCPU {}: no memory behind a guest address; direct BAR mappings {}",
                            self.number,
                            if closed { "closed, the access is tried again" } else { "were closed already" }
                        );
                        Next::Run
                    }
                    _ => Next::Stop(StopReason::Fault(format!("vCPU {} cannot run: {e}", self.number))),
                },
            };
            if let Next::Stop(reason) = next {
                self.context.control.stop(reason);
                return;
            }
        }
    }

    fn step(&mut self) -> io::Result<Next> {
        let number = self.number;
        let run = RunStructure::of(&mut self.fd);
        let io = &self.context.io;
        let exit = self.fd.run().map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        Ok(match exit {
            VcpuExit::IoIn(port, data) => {
                for piece in data.chunks_mut(run.port_width()) {
                    if io.pio_read(PioAddress(port), piece).is_err() {
                        piece.fill(0xff);
                    }
                }
                Next::Run
            }
            VcpuExit::IoOut(port, data) => {
                for piece in data.chunks(run.port_width()) {
                    // A port that nobody serves swallows the write.
                    let _unserved = io.pio_write(PioAddress(port), piece);
                }
                Next::Run
            }
            VcpuExit::MmioRead(address, data) => {
                if io.mmio_read(MmioAddress(address), data).is_err() {
                    data.fill(0xff);
                }
                Next::Run
            }
            VcpuExit::MmioWrite(address, data) => {
                let _unserved = io.mmio_write(MmioAddress(address), data);
                Next::Run
            }
            VcpuExit::Shutdown => Next::Stop(StopReason::Reset),
            VcpuExit::SystemEvent(event, _) => {
                let reason =
                    usize::try_from(event).ok().and_then(|event| SYSTEM_EVENTS.get(event.wrapping_sub(1)));
                Next::Stop(reason.cloned().unwrap_or(StopReason::Reset))
            }
            VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen => Next::Run,
            VcpuExit::FailEntry(reason, cpu) => Next::Stop(StopReason::Fault(format!(
                "vCPU {number}: the processor refused to enter the guest (reason {reason:#x}, host CPU {cpu})"
            ))),
            // KVM has queued the guest's exception for an instruction that it cannot emulate on memory that is trapped;
            // what else arrives here is as far from a working guest as a triple fault is.
            VcpuExit::InternalError if run.emulation_failed() => {
                debug!("vCPU {number}: an instruction on trapped memory cannot be emulated");
                Next::Run
            }
            VcpuExit::InternalError => {
                error!("vCPU {number}: KVM cannot go on with the guest; it is reset");
                Next::Stop(StopReason::Reset)
            }
            VcpuExit::MemoryFault { .. } => return Err(io::Error::from_raw_os_error(libc::EFAULT)),
            other => Next::Stop(StopReason::Fault(format!("vCPU {number}: unexpected exit {other:?}"))),
        })
    }
}

/// The parts of the run structure that kvm-ioctls does not hand out.
///
/// It is mapped as long as the vCPU's descriptor lives, which outlives this value, and only this thread uses it.
#[derive(Clone, Copy)]
struct RunStructure(*const kvm_bindings::kvm_run);

#[allow(unsafe_code)] // The exit's details are a C union.
impl RunStructure {
    fn of(fd: &mut VcpuFd) -> Self {
        Self(std::ptr::from_ref(fd.get_kvm_run()))
    }

    /// After an internal error: whether KVM could not emulate an instruction (`KVM_INTERNAL_ERROR_EMULATION`).
    fn emulation_failed(self) -> bool {
        // SAFETY: see the type; the exit was an internal error, so `internal` is the active field.
        unsafe { (*self.0).__bindgen_anon_1.internal.suberror == kvm_bindings::KVM_INTERNAL_ERROR_EMULATION }
    }

    /// After a port exit: how wide the elements are. A string instruction (`rep outsb`) is one exit with many.
    fn port_width(self) -> usize {
        // SAFETY: see the type; the exit was a port access, so `io` is the active field.
        usize::from(unsafe { (*self.0).__bindgen_anon_1.io.size }).max(1)
    }
}
