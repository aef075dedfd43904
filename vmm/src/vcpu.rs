//! vCPU threads: they run the guest and carry its port and memory accesses to the buses.
//!
//! Follows Linux `Documentation/virt/kvm/api.rst`, section 5 (the `kvm_run` structure). A fault that the guest
//! can cause never ends the machine: accesses that nobody serves read all ones, and a vCPU that finds guest
//! memory gone (a BAR whose device the host took away) closes those BARs and goes on.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

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

/// The running vCPU threads.
pub struct Vcpus {
    threads: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

extern "C" fn kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Vcpus {
    /// Starts one thread for each of `vcpus`.
    pub fn start(vcpus: Vec<VcpuFd>, context: &VcpuContext) -> io::Result<Self> {
        // The signal's only work is to end KVM_RUN.
        register_signal_handler(SIGRTMIN(), kick).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        let mut started = Self { threads: Vec::with_capacity(vcpus.len()), stop: Arc::default() };
        // The first vCPU starts the others, so it goes last: then they are all there.
        for (number, fd) in vcpus.into_iter().enumerate().rev() {
            let vcpu = Vcpu { number, fd, context: context.clone(), stop: Arc::clone(&started.stop) };
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

    /// Takes all vCPUs out of the guest and waits for their threads.
    pub fn stop(self) {
        self.stop.store(true, Ordering::SeqCst);
        // A signal that arrives just before KVM_RUN would be lost; so it is sent until every thread is done.
        while self.threads.iter().any(|thread| !thread.is_finished()) {
            for thread in self.threads.iter().filter(|thread| !thread.is_finished()) {
                if let Err(e) = thread.kill(SIGRTMIN()) {
                    debug!("a vCPU thread takes no signal any more: {e}");
                }
            }
            thread::park_timeout(std::time::Duration::from_millis(1));
        }
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
    stop: Arc<AtomicBool>,
}

/// What to do after an exit.
enum Next {
    Run,
    Stop(StopReason),
}

impl Vcpu {
    fn run(mut self) {
        let mut faults = 0;
        while !self.stop.load(Ordering::SeqCst) {
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
