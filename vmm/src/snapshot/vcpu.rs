//! The state of one vCPU as KVM hands it out and takes it (Linux `Documentation/virt/kvm/api.rst`).
//!
//! The order of the calls matters in both directions: reading the multiprocessing state lets KVM finish what it has begun with INIT and
//! SIPI; the local APIC's timer needs the APIC base before and the deadline after it; nested state needs EFER, and the feature control
//! register under VMX.

use std::fmt;
use std::io;
use std::mem::size_of;

use kvm_bindings::{
    KVM_MAX_MSR_ENTRIES, Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, KvmNestedStateBuffer, VcpuFd, VmFd};
use log::{debug, warn};
use serde::{Deserialize, Serialize};

use crate::hypervisor::{HypervisorError, ioctl};

/// IA32_TSC.
const TSC: u32 = 0x10;
/// IA32_FEATURE_CONTROL.
const FEATURE_CONTROL: u32 = 0x3a;
/// IA32_TSC_DEADLINE.
const TSC_DEADLINE: u32 = 0x6e0;

/// One vCPU.
#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    /// Its number.
    pub number: u16,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    xsave: Vec<u32>,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    debugregs: kvm_debugregs,
    tsc_khz: Option<u32>,
    nested: Option<KvmNestedStateBuffer>,
}

impl fmt::Debug for VcpuState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuState").field("number", &self.number).finish_non_exhaustive()
    }
}

/// What is to be known of the host to read a vCPU.
#[derive(Clone, Debug)]
pub struct VcpuReader {
    /// Words of the extended state beyond the first page of it.
    xsave_more: usize,
    msrs: Vec<u32>,
    nested: bool,
    tsc_khz: bool,
}

impl VcpuReader {
    /// For the vCPUs of a VM.
    pub fn new(kvm: &Kvm, vm: &VmFd) -> Result<Self, HypervisorError> {
        let msrs = kvm.get_msr_index_list().map_err(ioctl("listing model-specific registers"))?;
        Ok(Self {
            xsave_more: xsave_more(vm),
            msrs: msrs.as_slice().to_vec(),
            nested: kvm.check_extension(Cap::NestedState),
            tsc_khz: kvm.check_extension(Cap::GetTscKhz),
        })
    }

    /// Reads a vCPU that is not in the guest.
    pub fn read(&self, number: u16, fd: &VcpuFd) -> Result<VcpuState, HypervisorError> {
        let mp_state = fd.get_mp_state().map_err(ioctl("reading the multiprocessing state"))?;
        let regs = fd.get_regs().map_err(ioctl("reading registers"))?;
        let sregs = fd.get_sregs().map_err(ioctl("reading special registers"))?;
        let nested = self.nested.then(|| read_nested(fd)).transpose()?;
        let xcrs = fd.get_xcrs().map_err(ioctl("reading extended control registers"))?;
        let xsave = read_xsave(fd, self.xsave_more)?;
        let debugregs = fd.get_debug_regs().map_err(ioctl("reading debug registers"))?;
        let lapic = fd.get_lapic().map_err(ioctl("reading the local APIC"))?;
        let tsc_khz = self.tsc_khz.then(|| fd.get_tsc_khz()).and_then(Result::ok);
        let msrs = read_msrs(fd, &self.msrs)?;
        let events = fd.get_vcpu_events().map_err(ioctl("reading pending events"))?;
        Ok(VcpuState {
            number,
            mp_state,
            regs,
            sregs,
            xcrs,
            xsave,
            lapic,
            msrs,
            events,
            debugregs,
            tsc_khz,
            nested,
        })
    }
}

impl VcpuState {
    /// Puts a new vCPU of `vm`, which has its CPUID, into this state.
    pub fn apply(&self, vm: &VmFd, fd: &VcpuFd) -> Result<(), HypervisorError> {
        self.set_tsc_khz(fd);
        let first = |msr: &&kvm_msr_entry| msr.index == FEATURE_CONTROL;
        write_msrs(fd, self.number, self.msrs.iter().filter(first))?;
        fd.set_sregs(&self.sregs).map_err(ioctl("setting special registers"))?;
        if let Some(nested) = &self.nested {
            fd.set_nested_state(nested).map_err(ioctl("setting the state of nested guests"))?;
        }
        fd.set_regs(&self.regs).map_err(ioctl("setting registers"))?;
        write_xsave(fd, &self.xsave, xsave_more(vm))?;
        fd.set_xcrs(&self.xcrs).map_err(ioctl("setting extended control registers"))?;
        fd.set_debug_regs(&self.debugregs).map_err(ioctl("setting debug registers"))?;
        fd.set_lapic(&self.lapic).map_err(ioctl("setting the local APIC"))?;
        let last = |msr: &&kvm_msr_entry| msr.index == TSC_DEADLINE;
        write_msrs(fd, self.number, self.msrs.iter().filter(|msr| !first(msr) && !last(msr)))?;
        write_msrs(fd, self.number, self.deadline().iter())?;
        fd.set_vcpu_events(&self.events).map_err(ioctl("setting pending events"))?;
        fd.set_mp_state(self.mp_state).map_err(ioctl("setting the multiprocessing state"))
    }

    /// The deadline of the local APIC's timer. One that reads zero may have passed without its interrupt having been seen, which is then not in
    /// what was saved: now is as good, and a timer interrupt too many does no harm.
    fn deadline(&self) -> Option<kvm_msr_entry> {
        let find = |index| self.msrs.iter().find(|msr| msr.index == index).copied();
        let deadline = find(TSC_DEADLINE)?;
        let now = find(TSC).map_or(0, |msr| msr.data);
        Some(if deadline.data == 0 { kvm_msr_entry { data: now, ..deadline } } else { deadline })
    }

    /// Has the guest's time stamp counter run as fast as it did, where the host can.
    fn set_tsc_khz(&self, fd: &VcpuFd) {
        let Some(then) = self.tsc_khz else { return };
        let now = fd.get_tsc_khz().unwrap_or(then);
        if now != then
            && let Err(e) = fd.set_tsc_khz(then)
            && self.number == 0
        {
            warn!(
                "the guest's time stamp counter ran at {then} kHz and runs at {now} kHz here: the guest's clock may be wrong ({e})"
            );
        }
    }
}

/// Words of the extended state of a VM's vCPUs beyond what KVM has always had room for.
fn xsave_more(vm: &VmFd) -> usize {
    let bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    bytes.saturating_sub(size_of::<kvm_xsave>()).div_ceil(size_of::<u32>())
}

fn no_memory() -> HypervisorError {
    ioctl("making room for the extended state")(kvm_ioctls::Error::new(libc::ENOMEM))
}

#[allow(unsafe_code)] // KVM writes as many bytes as it has said.
fn read_xsave(fd: &VcpuFd, more: usize) -> Result<Vec<u32>, HypervisorError> {
    if more == 0 {
        let xsave = fd.get_xsave().map_err(ioctl("reading the extended state"))?;
        return Ok(xsave.region.to_vec());
    }
    let mut xsave = Xsave::new(more).map_err(|_| no_memory())?;
    // SAFETY: there is room for all that KVM says it has, of this VM; nothing switches more on once there are vCPUs.
    unsafe { fd.get_xsave2(&mut xsave) }.map_err(ioctl("reading the extended state"))?;
    let first = xsave.as_fam_struct_ref().xsave.region;
    Ok([&first[..], xsave.as_slice()].concat())
}

#[allow(unsafe_code)] // KVM reads as many bytes as it has said.
fn write_xsave(fd: &VcpuFd, words: &[u32], more: usize) -> Result<(), HypervisorError> {
    let mut xsave = Xsave::new(more).map_err(|_| no_memory())?;
    // A host that has less refuses what it does not have by the header that says what is there.
    let (first, rest) = words.split_at(words.len().min(kvm_xsave::default().region.len()));
    for (place, word) in xsave.as_mut_slice().iter_mut().zip(rest) {
        *place = *word;
    }
    // SAFETY: only the words of the fixed part are changed, not the length of what follows.
    let fixed = unsafe { xsave.as_mut_fam_struct() };
    for (place, word) in fixed.xsave.region.iter_mut().zip(first) {
        *place = *word;
    }
    // SAFETY: it has room for all that KVM says it reads, of this VM.
    unsafe { fd.set_xsave2(&xsave) }.map_err(ioctl("setting the extended state"))
}

fn read_nested(fd: &VcpuFd) -> Result<KvmNestedStateBuffer, HypervisorError> {
    let mut buffer = KvmNestedStateBuffer::empty();
    // Whether there is more than a header is for the one who takes it to see.
    let _ = fd.nested_state(&mut buffer).map_err(ioctl("reading the state of nested guests"))?;
    Ok(buffer)
}

/// All that can be read of those that KVM knows.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, HypervisorError> {
    let wanted: Vec<_> =
        indices.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
    let mut read = Vec::with_capacity(wanted.len());
    let mut rest = wanted.as_slice();
    while !rest.is_empty() {
        let (piece, _) = rest.split_at(rest.len().min(KVM_MAX_MSR_ENTRIES));
        let mut msrs = entries(piece)?;
        let count = fd.get_msrs(&mut msrs).map_err(ioctl("reading model-specific registers"))?;
        read.extend(msrs.as_slice().iter().take(count));
        if let Some(refused) = piece.get(count) {
            debug!("model-specific register {:#x} cannot be read", refused.index);
        }
        // KVM stops at the first one that it does not have after all.
        rest = rest.get(count + usize::from(count < piece.len())..).unwrap_or_default();
    }
    Ok(read)
}

fn write_msrs<'a>(
    fd: &VcpuFd,
    vcpu: u16,
    wanted: impl Iterator<Item = &'a kvm_msr_entry>,
) -> Result<(), HypervisorError> {
    let wanted: Vec<_> = wanted.copied().collect();
    let mut rest = wanted.as_slice();
    while !rest.is_empty() {
        let (piece, _) = rest.split_at(rest.len().min(KVM_MAX_MSR_ENTRIES));
        let set = fd.set_msrs(&entries(piece)?).map_err(ioctl("setting model-specific registers"))?;
        if let Some(refused) = piece.get(set) {
            let (index, value) = (refused.index, refused.data);
            // What nobody has used and this host does not have is none of the guest's.
            if value == 0 {
                debug!("vCPU {vcpu}: model-specific register {index:#x} cannot be set");
            } else {
                warn!(
                    "vCPU {vcpu}: model-specific register {index:#x} cannot be set to {value:#x} on this host"
                );
            }
        }
        rest = rest.get(set + usize::from(set < piece.len())..).unwrap_or_default();
    }
    Ok(())
}

fn entries(msrs: &[kvm_msr_entry]) -> Result<Msrs, HypervisorError> {
    Msrs::from_entries(msrs).map_err(|_| HypervisorError::TooMany("model-specific registers"))
}

/// Why a processor of this host cannot go on with what the guest was told of its own.
///
/// # Errors
/// Features that are missing here.
pub fn check_cpuid(then: &[kvm_cpuid_entry2], here: &[kvm_cpuid_entry2]) -> io::Result<()> {
    /// Registers that are sets of features: leaf, index, register.
    const FEATURES: [(u32, u32, &str); 8] = [
        (1, 0, "ecx"),
        (1, 0, "edx"),
        (7, 0, "ebx"),
        (7, 0, "ecx"),
        (7, 0, "edx"),
        (7, 1, "eax"),
        (0x8000_0001, 0, "ecx"),
        (0x8000_0001, 0, "edx"),
    ];
    /// Bits that are the operating system's or change with it: OSXSAVE and the hypervisor bit in leaf 1, OSPKE in leaf 7.
    const OWN: [(u32, u32, &str, u32); 2] = [(1, 0, "ecx", 1 << 27 | 1 << 31), (7, 0, "ecx", 1 << 4)];
    let find = |entries: &[kvm_cpuid_entry2], (leaf, index, register): (u32, u32, &str)| {
        let entry = entries.iter().find(|entry| (entry.function, entry.index) == (leaf, index));
        entry.map_or(0, |entry| match register {
            "eax" => entry.eax,
            "ebx" => entry.ebx,
            "ecx" => entry.ecx,
            _ => entry.edx,
        })
    };
    for place in FEATURES {
        let own = OWN.iter().find(|(leaf, index, register, _)| (*leaf, *index, *register) == place);
        let missing = find(then, place) & !find(here, place) & !own.map_or(0, |own| own.3);
        if missing != 0 {
            let (leaf, index, register) = place;
            return Err(io::Error::other(format!(
                "the guest uses a processor with features that this host's does not have (CPUID leaf {leaf:#x}, index {index}, \
                 {register}: {missing:#x}); restore it on a host with such a processor"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_goes_on_where_the_processor_has_all_that_it_was_told_of() {
        let leaf = |function, ecx| kvm_cpuid_entry2 { function, ecx, ..Default::default() };
        let then = [leaf(1, 1 << 27 | 1 << 5), leaf(7, 1 << 4)];
        assert!(
            check_cpuid(&then, &[leaf(1, 1 << 5 | 1)]).is_ok(),
            "more is enough, and bits of the system do not count"
        );
        let error = check_cpuid(&then, &[leaf(1, 1 << 27)]).unwrap_err().to_string();
        assert!(error.contains("leaf 0x1") && error.contains("ecx: 0x20"), "{error}");
    }
}
