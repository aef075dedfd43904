//! What the processors say about themselves: the hypervisor's list of supported CPUID leaves, changed to the
//! machine's topology, address width and options.
//!
//! Follows the Intel SDM volume 2 (`CPUID`), the AMD APM volume 3 appendix E, and the KVM documentation of
//! its own leaves. A leaf that nothing here names is passed on as the hypervisor gave it: it is what the host
//! has and the hypervisor can virtualise.

use std::mem;

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::hyperv;
use super::topology::Topology;

#[cfg(test)]
mod tests;

// Leaf 1.
const ECX_VMX: u32 = 1 << 5;
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
// Leaf 0x8000_0001.
const ECX_CMP_LEGACY: u32 = 1 << 1;
const ECX_SVM: u32 = 1 << 2;
const ECX_TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
// Levels of leaves 0xb and 0x1f.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;
const LEVEL_DIE: u32 = 5;

const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_0026;
const LEAF_AMD_UNIT: u32 = 0x8000_001e;
const LEAF_HYPERVISOR: u32 = 0x4000_0000;
const LEAF_KVM_FEATURES: u32 = 0x4000_0001;
const LEAF_TIMING: u32 = 0x4000_0010;
/// Bit of [`LEAF_KVM_FEATURES`]: messages, and IOAPIC pins, can name APIC IDs of 15 bits.
const KVM_FEATURE_MSI_EXT_DEST_ID: u32 = 1 << 15;
/// Frequency of KVM's emulated APIC bus, in kHz.
const APIC_BUS_KHZ: u32 = 1_000_000;
/// Physical address bits of a processor that does not say.
const DEFAULT_PHYS_BITS: u8 = 36;

/// What the machine asks of its processors.
#[derive(Clone, Copy, Debug)]
pub struct CpuidOptions {
    /// How they are grouped.
    pub topology: Topology,
    /// Most physical address bits to offer.
    pub max_phys_bits: u8,
    /// Whether the hypervisor emulates the APIC timer's TSC deadline mode.
    pub tsc_deadline: bool,
    /// Frequency of the guest's time-stamp counter in kHz, if it is known and stable.
    pub tsc_khz: Option<u32>,
    /// Whether the guest may run guests of its own.
    pub nested: bool,
    /// Whether the guest may use the advanced matrix extensions.
    pub amx: bool,
    /// Whether the guest finds a Hyper-V hypervisor.
    pub hyperv: bool,
}

/// The leaves that all vCPUs share, ready to be filled in for each.
#[derive(Clone, Debug)]
pub struct CpuidTemplate {
    entries: Vec<kvm_cpuid_entry2>,
    topology: Topology,
}

impl CpuidTemplate {
    /// Changes `supported`, the hypervisor's list, to what the machine asks for.
    pub fn new(supported: &[kvm_cpuid_entry2], options: &CpuidOptions) -> Self {
        let topology = options.topology;
        let amd = is_amd(supported);
        // Leaves that describe how the host's processors are grouped are made anew; one that is left out
        // reads zero, which means that there is no such description.
        let remade = |function| matches!(function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 | LEAF_AMD_TOPOLOGY);
        let mut entries: Vec<_> = supported.iter().filter(|e| !remade(e.function)).copied().collect();
        let last_basic = max_leaf(&entries, 0);
        for entry in &mut entries {
            apply(entry, options, amd);
        }
        if last_basic >= LEAF_TOPOLOGY {
            push_levels(&mut entries, LEAF_TOPOLOGY, &[thread_level(topology), package_level(topology)]);
        }
        if last_basic >= LEAF_TOPOLOGY_V2 {
            let core = (LEVEL_CORE, topology.die_shift(), topology.threads_per_die());
            let die = (LEVEL_DIE, topology.package_shift(), topology.threads_per_package());
            if topology.dies_per_package() > 1 {
                push_levels(&mut entries, LEAF_TOPOLOGY_V2, &[thread_level(topology), core, die]);
            } else {
                push_levels(&mut entries, LEAF_TOPOLOGY_V2, &[thread_level(topology), core]);
            }
        }
        if amd && topology.threads_per_core() > 1 {
            insert_amd_unit(&mut entries);
        }
        if !options.amx {
            amx::hide(&mut entries);
        }
        if options.hyperv {
            // It says the frequencies in its own way.
            hyperv::insert(&mut entries, topology.vcpus());
        } else if let Some(tsc_khz) = options.tsc_khz {
            push_timing(&mut entries, tsc_khz);
        }
        Self { entries, topology }
    }

    /// The leaves that a guest was given elsewhere, for processors that are grouped as its are.
    pub fn of_guest(entries: Vec<kvm_cpuid_entry2>, topology: Topology) -> Self {
        Self { entries, topology }
    }

    /// The leaves of one vCPU.
    pub fn entries(&self, vcpu: u16) -> Vec<kvm_cpuid_entry2> {
        let apic_id = self.topology.apic_id(vcpu);
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            match entry.function {
                1 => entry.ebx = entry.ebx & 0x00ff_ffff | (apic_id & 0xff) << 24,
                LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => entry.edx = apic_id,
                LEAF_AMD_UNIT => {
                    let core = apic_id & low_bits(self.topology.package_shift());
                    entry.eax = apic_id;
                    entry.ebx = (core >> self.topology.core_shift()) & 0xff
                        | (self.topology.threads_per_core() - 1) << 8;
                    // One node in each package.
                    entry.ecx = (apic_id >> self.topology.package_shift()) & 0xff;
                }
                _ => {}
            }
        }
        entries
    }

    /// The physical address bits that the guest sees.
    pub fn phys_bits(&self) -> u8 {
        phys_bits(&self.entries)
    }
}

/// Whether the list has the advanced matrix extensions.
pub fn has_amx(entries: &[kvm_cpuid_entry2]) -> bool {
    entries.iter().any(|entry| (entry.function, entry.index) == (7, 0) && entry.edx & amx::EDX_TILE != 0)
}

/// The advanced matrix extensions (Intel SDM volume 1, chapter 18).
mod amx {
    use kvm_bindings::kvm_cpuid_entry2;

    /// Leaf 7, EDX: tiles.
    pub(super) const EDX_TILE: u32 = 1 << 24;
    /// Leaf 7, EDX: what calculates with them (BF16, INT8).
    const EDX_ARITHMETIC: u32 = 1 << 22 | 1 << 25;
    /// Leaf 7, sub-leaf 1: more of that (FP16 in EAX, complex numbers in EDX).
    const EAX_FP16: u32 = 1 << 21;
    const EDX_COMPLEX: u32 = 1 << 8;
    /// State components of tiles, as bits of leaf 0xd and as its sub-leaves.
    const COMPONENTS: std::ops::RangeInclusive<u32> = 17..=18;
    /// The leaves that describe tiles.
    const LEAVES: std::ops::RangeInclusive<u32> = 0x1d..=0x1e;

    /// Takes all of it out.
    pub(super) fn hide(entries: &mut Vec<kvm_cpuid_entry2>) {
        entries.retain(|entry| {
            let component = entry.function == 0xd && COMPONENTS.contains(&entry.index);
            !component && !LEAVES.contains(&entry.function)
        });
        for entry in entries {
            match (entry.function, entry.index) {
                (7, 0) => entry.edx &= !(EDX_TILE | EDX_ARITHMETIC),
                (7, 1) => {
                    entry.eax &= !EAX_FP16;
                    entry.edx &= !EDX_COMPLEX;
                }
                (0xd, 0) => entry.eax &= !COMPONENTS.fold(0, |bits, component| bits | 1 << component),
                _ => {}
            }
        }
    }
}

/// Physical address bits in a list of leaves.
pub fn phys_bits(entries: &[kvm_cpuid_entry2]) -> u8 {
    let leaf = entries.iter().find(|entry| entry.function == 0x8000_0008);
    leaf.map_or(DEFAULT_PHYS_BITS, |leaf| leaf.eax.to_le_bytes()[0])
}

/// The changes to one leaf that are the same for every vCPU.
fn apply(entry: &mut kvm_cpuid_entry2, options: &CpuidOptions, amd: bool) {
    let topology = options.topology;
    let threads = topology.threads_per_package();
    match entry.function {
        1 => {
            // APIC IDs that the package takes up, which is what the field counts.
            let ids = (1 << topology.package_shift()).min(0xff);
            entry.ebx = entry.ebx & 0xff00_ffff | ids << 16;
            entry.ecx |= ECX_HYPERVISOR | ECX_X2APIC;
            set(&mut entry.ecx, ECX_TSC_DEADLINE, options.tsc_deadline);
            set(&mut entry.edx, EDX_HTT, threads > 1);
            if !options.nested {
                entry.ecx &= !ECX_VMX;
            }
        }
        // Deterministic cache parameters: who shares a cache, and cores in the package.
        4 if entry.eax & 0x1f != 0 => {
            let cores = 1u32 << (topology.package_shift() - topology.core_shift());
            entry.eax = entry.eax & 0x3fff | (cache_sharing(entry.eax, topology) - 1).min(0xfff) << 14;
            entry.eax |= (cores - 1).min(0x3f) << 26;
        }
        0x8000_001d if entry.eax & 0x1f != 0 => {
            entry.eax = entry.eax & 0x3fff | (cache_sharing(entry.eax, topology) - 1).min(0xfff) << 14;
        }
        0x8000_0001 => {
            if !options.nested {
                entry.ecx &= !ECX_SVM;
            }
            if amd {
                set(&mut entry.ecx, ECX_CMP_LEGACY, threads > 1);
            }
        }
        0x8000_0008 => {
            let [phys, virt, guest_phys, _] = entry.eax.to_le_bytes();
            // The third field, when it is there, is what guests can address, which may be less.
            let addressable = if guest_phys == 0 { phys } else { phys.min(guest_phys) };
            let phys = addressable.min(options.max_phys_bits);
            entry.eax = u32::from_le_bytes([phys, virt, 0, 0]);
            if amd {
                entry.ecx =
                    entry.ecx & 0xffff_0000 | topology.package_shift() << 12 | (threads - 1).min(0xff);
            }
        }
        // The IOAPIC in the kernel does not know them, so the topology has none.
        LEAF_KVM_FEATURES => entry.eax &= !KVM_FEATURE_MSI_EXT_DEST_ID,
        _ => {}
    }
}

/// Makes sure that there is AMD's leaf of a processor's place: without it, Linux before 6.9 takes each thread for a core, whatever leaf 0xb says. Hosts
/// whose cores have one thread need not have it.
fn insert_amd_unit(entries: &mut Vec<kvm_cpuid_entry2>) {
    if !entries.iter().any(|entry| entry.function == LEAF_AMD_UNIT) {
        entries.push(kvm_cpuid_entry2 { function: LEAF_AMD_UNIT, ..Default::default() });
    }
    for entry in entries {
        match entry.function {
            0x8000_0000 => entry.eax = entry.eax.max(LEAF_AMD_UNIT),
            0x8000_0001 => entry.ecx |= ECX_TOPOLOGY_EXTENSIONS,
            _ => {}
        }
    }
}

/// How many APIC IDs share the cache that a leaf describes: the first two levels belong to a core, the
/// others to a die.
fn cache_sharing(eax: u32, topology: Topology) -> u32 {
    let level = eax >> 5 & 7;
    1 << if level <= 2 { topology.core_shift() } else { topology.die_shift() }
}

fn thread_level(topology: Topology) -> (u32, u32, u32) {
    (LEVEL_THREAD, topology.core_shift(), topology.threads_per_core())
}

/// Leaf 0xb knows no dies: its core level spans the package.
fn package_level(topology: Topology) -> (u32, u32, u32) {
    (LEVEL_CORE, topology.package_shift(), topology.threads_per_package())
}

/// Appends the sub-leaves of a topology leaf: (type, shift to the next level, threads) each, and the
/// terminator.
fn push_levels(entries: &mut Vec<kvm_cpuid_entry2>, function: u32, levels: &[(u32, u32, u32)]) {
    for (index, &(kind, shift, threads)) in (0..).zip(levels.iter().chain(&[(0, 0, 0)])) {
        entries.push(kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: threads & 0xffff,
            ecx: kind << 8 | index,
            ..Default::default()
        });
    }
}

/// Says the frequencies outright, in the leaf that hypervisors share, so that guests need not measure.
fn push_timing(entries: &mut Vec<kvm_cpuid_entry2>, tsc_khz: u32) {
    let Some(first) = entries.iter_mut().find(|entry| entry.function == LEAF_HYPERVISOR) else {
        return;
    };
    first.eax = first.eax.max(LEAF_TIMING);
    entries.retain(|entry| entry.function != LEAF_TIMING);
    entries.push(kvm_cpuid_entry2 {
        function: LEAF_TIMING,
        eax: tsc_khz,
        ebx: APIC_BUS_KHZ,
        ..Default::default()
    });
}

/// The last leaf of the range that starts with `first`.
fn max_leaf(entries: &[kvm_cpuid_entry2], first: u32) -> u32 {
    entries.iter().find(|entry| entry.function == first).map_or(0, |entry| entry.eax)
}

/// Whether the processor follows AMD's leaves.
fn is_amd(entries: &[kvm_cpuid_entry2]) -> bool {
    let Some(leaf) = entries.iter().find(|entry| entry.function == 0) else {
        return false;
    };
    let mut vendor = [0; 12];
    for (bytes, register) in vendor.chunks_exact_mut(4).zip([leaf.ebx, leaf.edx, leaf.ecx]) {
        bytes.copy_from_slice(&register.to_le_bytes());
    }
    matches!(&vendor, b"AuthenticAMD" | b"HygonGenuine")
}

fn set(register: &mut u32, bit: u32, on: bool) {
    let old = mem::take(register);
    *register = if on { old | bit } else { old & !bit };
}

fn low_bits(count: u32) -> u32 {
    (1u32 << count) - 1
}
