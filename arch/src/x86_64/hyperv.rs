//! The CPUID leaves of a Hyper-V hypervisor, which Windows guests look for (Hypervisor Top Level Functional Specification 6.0b,
//! sections 2.4 and 4.2, and appendix B). KVM's own leaves move behind them, where Linux guests find them too.

use kvm_bindings::kvm_cpuid_entry2;

/// The first leaf of a hypervisor (section 2.4).
pub(super) const LEAF_FIRST: u32 = 0x4000_0000;
/// The last leaf that the interface asks for.
const LEAF_LAST: u32 = 0x4000_000a;
/// Where KVM's own leaves go: guests look for hypervisors at multiples of this.
const LEAF_DISTANCE: u32 = 0x100;

/// The vendor: operating systems know it, and Windows does not care.
const VENDOR: &[u8; 12] = b"Microsoft Hv";
/// The interface, which is what Windows checks.
const INTERFACE: &[u8; 4] = b"Hv#1";
/// Build and version that are claimed, of Windows Server 2016.
const BUILD: u32 = 14393;
const VERSION: u32 = 10 << 16;

/// Registers that the guest may use (section 4.2.2, `HV_PARTITION_PRIVILEGE_MASK`), all of which KVM has.
mod access {
    pub(super) const VP_RUNTIME: u32 = 1 << 0;
    pub(super) const REFERENCE_COUNTER: u32 = 1 << 1;
    pub(super) const SYNIC: u32 = 1 << 2;
    pub(super) const SYNTHETIC_TIMERS: u32 = 1 << 3;
    pub(super) const HYPERCALL: u32 = 1 << 5;
    pub(super) const VP_INDEX: u32 = 1 << 6;
    pub(super) const RESET: u32 = 1 << 7;
    pub(super) const REFERENCE_TSC: u32 = 1 << 9;
    pub(super) const FREQUENCIES: u32 = 1 << 11;
}
const ACCESS: u32 = access::VP_RUNTIME
    | access::REFERENCE_COUNTER
    | access::SYNIC
    | access::SYNTHETIC_TIMERS
    | access::HYPERCALL
    | access::VP_INDEX
    | access::RESET
    | access::REFERENCE_TSC
    | access::FREQUENCIES;

/// Features (section 4.2.2): processors come and go, and the frequencies can be read.
const FEATURES: u32 = 1 << 3 | 1 << 8;
/// Recommendations (section 4.2.3): a vCPU may be away for long, which is no reason to suspect a hang.
const RELAXED_TIMING: u32 = 1 << 5;
/// How often a spin lock is tried before the hypervisor is told: it is not to be told.
const NEVER_NOTIFY: u32 = u32::MAX;

/// Puts the leaves in front of KVM's own. `vcpus` is how many processors there can be.
pub(super) fn insert(entries: &mut Vec<kvm_cpuid_entry2>, vcpus: u32) {
    for entry in &mut *entries {
        if (LEAF_FIRST..LEAF_FIRST + LEAF_DISTANCE).contains(&entry.function) {
            entry.function += LEAF_DISTANCE;
            // The first one says which is the last.
            if entry.function == LEAF_FIRST + LEAF_DISTANCE {
                entry.eax = entry.eax.saturating_add(LEAF_DISTANCE);
            }
        }
    }
    let word = |text: &[u8], at: usize| {
        text.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
    };
    let leaf = |number: u32, [eax, ebx, ecx, edx]: [u32; 4]| kvm_cpuid_entry2 {
        function: LEAF_FIRST + number,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    entries.extend([
        leaf(0, [LEAF_LAST, word(VENDOR, 0), word(VENDOR, 4), word(VENDOR, 8)]),
        leaf(1, [word(INTERFACE, 0), 0, 0, 0]),
        leaf(2, [BUILD, VERSION, 0, 0]),
        leaf(3, [ACCESS, 0, 0, FEATURES]),
        leaf(4, [RELAXED_TIMING, NEVER_NOTIFY, 0, 0]),
        leaf(5, [vcpus, 0, 0, 0]),
    ]);
    // Hardware features and what is for guests that have guests of their own: nothing.
    entries.extend((6..=LEAF_LAST - LEAF_FIRST).map(|number| leaf(number, [0; 4])));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Vec<kvm_cpuid_entry2> {
        let leaf = |function, eax| kvm_cpuid_entry2 { function, eax, ..Default::default() };
        vec![leaf(1, 7), leaf(0x4000_0000, 0x4000_0001), leaf(0x4000_0001, 0x0100_7efb), leaf(0x8000_0000, 8)]
    }

    #[test]
    fn the_interface_is_hyper_vs_and_kvms_own_leaves_are_behind_it() {
        let mut entries = host();
        insert(&mut entries, 4);
        let find = |function| {
            let found: Vec<_> = entries.iter().filter(|e| e.function == function).collect();
            assert_eq!(found.len(), 1, "{function:#x}");
            *found[0]
        };
        let first = find(0x4000_0000);
        let vendor = [first.ebx, first.ecx, first.edx].map(u32::to_le_bytes).concat();
        assert_eq!((first.eax, vendor.as_slice()), (0x4000_000a, b"Microsoft Hv".as_slice()));
        assert_eq!(find(0x4000_0001).eax.to_le_bytes(), *b"Hv#1");
        for leaf in 0x4000_0002..=0x4000_000a {
            find(leaf);
        }
        assert_eq!((find(0x4000_0100).eax, find(0x4000_0101).eax), (0x4000_0101, 0x0100_7efb));
        assert_eq!((find(1).eax, find(0x8000_0000).eax, find(0x4000_0005).eax), (7, 8, 4));
    }

    #[test]
    fn what_linux_and_windows_need_of_the_interface_is_offered() {
        let mut entries = host();
        insert(&mut entries, 1);
        let features = entries.iter().find(|e| e.function == 0x4000_0003).unwrap();
        // The two that are mandatory (hypercall page, VP index), and those of timers.
        assert_eq!(features.eax & 0x6e, 0x6e, "{:#x}", features.eax);
    }
}
