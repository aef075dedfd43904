//! vCPU threads: they run the guest and carry its port and memory accesses to the buses.
//!
//! Follows Linux `Documentation/virt/kvm/api.rst`, section 5 (the `kvm_run` structure). A fault that the guest
//! can cause never ends the machine: accesses that nobody serves read all ones, and a vCPU that finds guest
//! memory gone (a BAR whose device the host took away) closes those BARs and goes on.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use log::{debug, error, warn};
use vm_device::bus::{MmioAddress, PioAddress};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::control::{Control, StopReason};
use crate::processors::placement::{Placement, PlacementError};
use crate::snapshot::SnapshotError;
use crate::snapshot::vcpu::{VcpuReader, VcpuState};

/// Stack of a vCPU's thread. The customary 2 MiB would be one huge page, and all of it resident at the first touch.
const STACK_BYTES: usize = 512 << 10;

/// `KVM_SYSTEM_EVENT_SHUTDOWN`, `KVM_SYSTEM_EVENT_RESET`, `KVM_SYSTEM_EVENT_CRASH`.
const SYSTEM_EVENTS: [StopReason; 3] = [StopReason::PowerOff, StopReason::Reset, StopReason::Reset];

/// So many faults in a row on one vCPU, with nothing run in between, are more than closing BARs can cure.
const MAX_FAULTS_IN_A_ROW: u32 = 16;

/// What a vCPU does when `KVM_RUN` finds no memory behind a guest address (`EFAULT`): closes every direct
/// mapping of assigned devices, so that the access is trapped when it is tried again, and puts memory in the place of what a file has lost.
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
    parked: Mutex<Parked>,
    changed: Condvar,
}

/// Threads that have stopped for a pause.
#[derive(Debug, Default)]
struct Parked {
    count: usize,
    /// Those whose vCPU's state is wanted, or there.
    readings: BTreeMap<u16, Reading>,
}

/// The state of a vCPU, which its thread reads.
#[derive(Debug)]
enum Reading {
    Wanted(Arc<VcpuReader>),
    Done(Box<Result<VcpuState, SnapshotError>>),
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

    /// Has those that wait look whether they are to leave.
    fn wake(&self) {
        let _parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Parked> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the end of a pause, or until this one is to leave. Reads the vCPU's state meanwhile, if somebody wants it.
    fn park(
        &self,
        number: u16,
        leaves: &AtomicBool,
        mut read: impl FnMut(&VcpuReader) -> Result<VcpuState, SnapshotError>,
    ) {
        let mut parked = self.lock();
        parked.count += 1;
        self.changed.notify_all();
        loop {
            if let Some(Reading::Wanted(reader)) = parked.readings.get(&number) {
                let reader = Arc::clone(reader);
                drop(parked);
                let result = read(&reader);
                parked = self.lock();
                parked.readings.insert(number, Reading::Done(Box::new(result)));
                self.changed.notify_all();
            } else if self.is(Mode::Pause) && !leaves.load(Ordering::SeqCst) {
                parked = self.changed.wait(parked).unwrap_or_else(PoisonError::into_inner);
            } else {
                break;
            }
        }
        parked.count -= 1;
        self.changed.notify_all();
    }

    fn parked(&self) -> usize {
        self.lock().count
    }
}

/// A vCPU's thread, which gives its vCPU back when it ends.
struct Thread {
    number: u16,
    handle: JoinHandle<Option<VcpuFd>>,
    /// Set when this one is to end by itself.
    leaves: Arc<AtomicBool>,
}

/// The running vCPU threads.
pub struct Vcpus {
    threads: Vec<Thread>,
    turnstile: Arc<Turnstile>,
    nmi: Arc<AtomicBool>,
    context: VcpuContext,
    placement: Placement,
}

/// How often a vCPU whose state is wanted is looked at, for whether it has ended.
const READING_INTERVAL: Duration = Duration::from_millis(100);

/// How often a vCPU that is still in the guest is called out of it.
const KICK_INTERVAL: Duration = Duration::from_millis(1);

extern "C" fn kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Vcpus {
    /// Starts one thread for each of `vcpus`, which have their numbers. `paused`: they are not to enter the guest before [`Self::resume`].
    ///
    /// # Errors
    /// There is no thread to be had, or it cannot run where it is to.
    pub fn start(
        vcpus: Vec<(u16, VcpuFd)>,
        context: &VcpuContext,
        placement: Placement,
        paused: bool,
    ) -> Result<Self, PlacementError> {
        // The signal's only work is to end KVM_RUN.
        register_signal_handler(SIGRTMIN(), kick)
            .map_err(|e| PlacementError::thread(io::Error::from_raw_os_error(e.errno())))?;
        let mut started = Self {
            threads: Vec::with_capacity(vcpus.len()),
            turnstile: Arc::default(),
            nmi: Arc::default(),
            context: context.clone(),
            placement,
        };
        if paused {
            started.turnstile.set(Mode::Pause);
        }
        // The first vCPU starts the others, so it goes last: then they are all there.
        for (number, fd) in vcpus.into_iter().rev() {
            if let Err((e, _)) = started.add(number, fd) {
                started.stop();
                return Err(e);
            }
        }
        Ok(started)
    }

    /// Starts one more.
    ///
    /// # Errors
    /// As [`Self::start`], with the vCPU, which KVM makes once only.
    pub fn add(&mut self, number: u16, fd: VcpuFd) -> Result<(), (PlacementError, VcpuFd)> {
        let turnstile = Arc::clone(&self.turnstile);
        let nmi = (number == 0).then(|| Arc::clone(&self.nmi));
        let leaves = Arc::new(AtomicBool::new(false));
        let context = self.context.clone();
        let cores = self.placement.cores();
        let (sender, receiver) = sync_channel(1);
        let leaving = Arc::clone(&leaves);
        let body = move || {
            cores.enter(number);
            let fd = receiver.recv().ok()?;
            Some(Vcpu { number, fd, context, turnstile, leaves: leaving, nmi }.run())
        };
        let spawn =
            || thread::Builder::new().name(format!("vcpu{number}")).stack_size(STACK_BYTES).spawn(body);
        let handle = match self.placement.spawn(number, spawn) {
            Ok(handle) => handle,
            Err(e) => return Err((e, fd)),
        };
        match sender.send(fd) {
            Ok(()) => self.threads.push(Thread { number, handle, leaves }),
            Err(e) => return Err((PlacementError::thread(io::ErrorKind::BrokenPipe.into()), e.0)),
        }
        Ok(())
    }

    /// Ends the thread of a vCPU and gives the vCPU back; `None` if there is none, or if it has ended badly.
    pub fn remove(&mut self, number: u16) -> Option<VcpuFd> {
        let place = self.threads.iter().position(|thread| thread.number == number)?;
        let thread = self.threads.swap_remove(place);
        thread.leaves.store(true, Ordering::SeqCst);
        self.turnstile.wake();
        let leaver = [thread];
        kick_until(&leaver, |threads| threads.iter().all(Thread::has_ended));
        let [thread] = leaver;
        thread.join()
    }

    /// Takes all vCPUs out of the guest, and returns once they are. One that is in the middle of an access ends that first.
    pub fn pause(&self) {
        self.turnstile.set(Mode::Pause);
        kick_until(&self.threads, |threads| {
            let ended = threads.iter().filter(|thread| thread.has_ended()).count();
            self.turnstile.parked() + ended >= threads.len()
        });
    }

    /// Reads the states of all vCPUs, which are paused.
    ///
    /// # Errors
    /// One cannot be read, or has stopped.
    pub fn read(&self, reader: VcpuReader) -> Result<Vec<VcpuState>, SnapshotError> {
        let reader = Arc::new(reader);
        let numbers: Vec<u16> = self.threads.iter().map(|thread| thread.number).collect();
        let mut parked = self.turnstile.lock();
        let wanted = numbers.iter().map(|number| (*number, Reading::Wanted(Arc::clone(&reader))));
        parked.readings = wanted.collect();
        self.turnstile.changed.notify_all();
        let is_wanted = |reading: &Reading| matches!(reading, Reading::Wanted(_));
        while parked.readings.values().any(is_wanted) {
            // One that has ended answers nothing.
            let ended = |number: &u16| {
                self.threads.iter().any(|thread| thread.number == *number && thread.has_ended())
            };
            if let Some(number) = numbers.iter().find(|number| ended(number)) {
                parked.readings.clear();
                return Err(SnapshotError::Vcpu(*number));
            }
            let waited = self.turnstile.changed.wait_timeout(parked, READING_INTERVAL);
            parked = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let readings = std::mem::take(&mut parked.readings);
        drop(parked);
        let states = readings.into_values().filter_map(|reading| match reading {
            Reading::Done(result) => Some(*result),
            Reading::Wanted(_) => None,
        });
        states.collect()
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
        kick_until(&self.threads, |threads| {
            !self.nmi.load(Ordering::SeqCst) || threads.iter().all(Thread::has_ended)
        });
    }

    /// Takes all vCPUs out of the guest and waits for their threads.
    pub fn stop(self) {
        self.turnstile.set(Mode::Stop);
        kick_until(&self.threads, |threads| threads.iter().all(Thread::has_ended));
        for thread in self.threads {
            drop(thread.join());
        }
    }
}

impl Thread {
    fn has_ended(&self) -> bool {
        self.handle.is_finished()
    }

    fn join(self) -> Option<VcpuFd> {
        self.handle.join().unwrap_or_else(|_| {
            error!("the thread of vCPU {} panicked", self.number);
            None
        })
    }
}

/// Sends the signal until `done`: one that arrives just before `KVM_RUN` would be lost.
fn kick_until(threads: &[Thread], done: impl Fn(&[Thread]) -> bool) {
    while !done(threads) {
        for thread in threads.iter().filter(|thread| !thread.has_ended()) {
            if let Err(e) = thread.handle.kill(SIGRTMIN()) {
                debug!("a vCPU thread takes no signal any more: {e}");
            }
        }
        thread::park_timeout(KICK_INTERVAL);
    }
}

struct Vcpu {
    number: u16,
    fd: VcpuFd,
    context: VcpuContext,
    turnstile: Arc<Turnstile>,
    /// Set when this one is to end.
    leaves: Arc<AtomicBool>,
    /// Set when a non-maskable interrupt is wanted; the first vCPU has it.
    nmi: Option<Arc<AtomicBool>>,
}

/// What to do after an exit.
enum Next {
    Run,
    Stop(StopReason),
}

impl Vcpu {
    fn run(mut self) -> VcpuFd {
        let mut faults = 0;
        loop {
            if self.turnstile.is(Mode::Stop) || self.leaves.load(Ordering::SeqCst) {
                return self.fd;
            }
            if self.turnstile.is(Mode::Pause) {
                // So that the guest's watchdogs do not take the pause for a hang. A guest without a KVM clock has none to tell.
                let _unused_clock = self.fd.kvmclock_ctrl();
                let (turnstile, leaves) = (Arc::clone(&self.turnstile), Arc::clone(&self.leaves));
                turnstile.park(self.number, &leaves, |reader| self.read(reader));
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
                            "vCPU {}: no memory behind a guest address; what can lose it {}",
                            self.number,
                            if closed {
                                "was looked after, the access is tried again"
                            } else {
                                "was looked after already"
                            }
                        );
                        Next::Run
                    }
                    _ => Next::Stop(StopReason::Fault(format!("vCPU {} cannot run: {e}", self.number))),
                },
            };
            if let Next::Stop(reason) = next {
                self.context.control.stop(reason);
                return self.fd;
            }
        }
    }

    /// Reads the state, after what the guest was in the middle of: the rest of an access that has left the guest is done when KVM runs the vCPU
    /// again, and is no part of the state.
    fn read(&mut self, reader: &VcpuReader) -> Result<VcpuState, SnapshotError> {
        self.fd.set_kvm_immediate_exit(1);
        let ended = loop {
            match self.step() {
                Ok(Next::Run) => {}
                Ok(Next::Stop(reason)) => {
                    self.context.control.stop(reason);
                    break Err(SnapshotError::Vcpu(self.number));
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                    break Ok(());
                }
                Err(_) => break Err(SnapshotError::Vcpu(self.number)),
            }
        };
        self.fd.set_kvm_immediate_exit(0);
        ended?;
        Ok(reader.read(self.number, &self.fd)?)
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
            VcpuExit::Hyperv => {
                run.refuse_hypercall();
                Next::Run
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
struct RunStructure(*mut kvm_bindings::kvm_run);

#[allow(unsafe_code)] // The exit's details are a C union.
impl RunStructure {
    fn of(fd: &mut VcpuFd) -> Self {
        Self(std::ptr::from_mut(fd.get_kvm_run()))
    }

    /// After an internal error: whether KVM could not emulate an instruction (`KVM_INTERNAL_ERROR_EMULATION`).
    fn emulation_failed(self) -> bool {
        // SAFETY: see the type; the exit was an internal error, so `internal` is the active field.
        unsafe { (*self.0).__bindgen_anon_1.internal.suberror == kvm_bindings::KVM_INTERNAL_ERROR_EMULATION }
    }

    /// After a Hyper-V exit: a hypercall that KVM leaves to the VMM has no one behind it. The other exits of this kind tell of registers,
    /// and want nothing.
    fn refuse_hypercall(self) {
        /// `HV_STATUS_INVALID_HYPERCALL_CODE` (Hyper-V TLFS 6.0b, appendix B).
        const INVALID_HYPERCALL_CODE: u64 = 2;
        // SAFETY: see the type; the exit was one of Hyper-V's, so `hyperv` is the active field, and `hcall` within it where its type says so.
        unsafe {
            let exit = &mut (*self.0).__bindgen_anon_1.hyperv;
            if exit.type_ == kvm_bindings::KVM_EXIT_HYPERV_HCALL {
                exit.u.hcall.result = INVALID_HYPERCALL_CODE;
            }
        }
    }

    /// After a port exit: how wide the elements are. A string instruction (`rep outsb`) is one exit with many.
    fn port_width(self) -> usize {
        // SAFETY: see the type; the exit was a port access, so `io` is the active field.
        usize::from(unsafe { (*self.0).__bindgen_anon_1.io.size }).max(1)
    }
}
