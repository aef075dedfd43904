//! Tests of the CPUID leaves, on a made-up host.

use super::*;

fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

fn host(vendor: &[u8; 12], last_basic: u32) -> Vec<kvm_cpuid_entry2> {
    let word = |i: usize| u32::from_le_bytes(vendor[i..i + 4].try_into().unwrap());
    vec![
        leaf(0, 0, [last_basic, word(0), word(8), word(4)]),
        leaf(1, 0, [0x806f8, 0x0510_0800, 1 << 24 | ECX_VMX, EDX_HTT]),
        leaf(4, 0, [0xfc00_4121, 0, 0, 0]),
        leaf(4, 3, [0xfc1f_c163, 0, 0, 0]),
        leaf(0xb, 0, [1, 2, 0x100, 77]),
        leaf(0x4000_0000, 0, [0x4000_0001, 0, 0, 0]),
        leaf(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, ECX_SVM, 0]),
        leaf(0x8000_0008, 0, [0x0030_3934, 0, 0x1234, 0]),
        leaf(0x8000_001e, 0, [99, 99, 99, 0]),
        leaf(0x8000_0026, 0, [1, 2, 0x100, 77]),
    ]
}

fn options(topology: Topology) -> CpuidOptions {
    CpuidOptions {
        topology,
        max_phys_bits: 46,
        tsc_deadline: true,
        tsc_khz: None,
        nested: true,
        amx: false,
        hyperv: false,
    }
}

fn intel(topology: Topology, vcpu: u16) -> Vec<kvm_cpuid_entry2> {
    CpuidTemplate::new(&host(b"GenuineIntel", 0x20), &options(topology)).entries(vcpu)
}

fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
    *entries.iter().find(|e| e.function == function && e.index == index).unwrap()
}

#[test]
fn leaf_1_names_the_vcpu_and_counts_its_package() {
    let entries = intel(Topology::new(2, 3, 1, 2, 12).unwrap(), 7);
    let one = find(&entries, 1, 0);
    assert_eq!(one.ebx, 0x0908_0800);
    assert_eq!(one.ecx & (ECX_HYPERVISOR | ECX_X2APIC | ECX_TSC_DEADLINE | ECX_VMX), one.ecx);
    assert_ne!(one.ecx & ECX_HYPERVISOR, 0);
    assert_ne!(one.edx & EDX_HTT, 0);
}

#[test]
fn a_single_vcpu_has_no_siblings() {
    let entries = intel(Topology::flat(1).unwrap(), 0);
    let one = find(&entries, 1, 0);
    assert_eq!((one.ebx, one.edx & EDX_HTT), (0x0001_0800, 0));
    assert_eq!(find(&entries, 4, 3).eax >> 14, 0);
}

#[test]
fn topology_leaves_describe_the_machine_and_not_the_host() {
    let entries = intel(Topology::new(2, 2, 2, 2, 16).unwrap(), 15);
    let level = |function, index| {
        let e = find(&entries, function, index);
        (e.eax, e.ebx, e.ecx, e.edx)
    };
    assert_eq!(level(0xb, 0), (1, 2, 0x100, 15));
    assert_eq!(level(0xb, 1), (3, 8, 0x201, 15));
    assert_eq!(level(0xb, 2), (0, 0, 2, 15));
    assert_eq!(level(0x1f, 1), (2, 4, 0x201, 15));
    assert_eq!(level(0x1f, 2), (3, 8, 0x502, 15));
    assert_eq!(level(0x1f, 3), (0, 0, 3, 15));
    assert_eq!(entries.iter().filter(|e| e.function == 0xb).count(), 3);
    assert!(!entries.iter().any(|e| e.function == 0x8000_0026));
}

#[test]
fn an_older_processor_gets_no_newer_topology_leaf() {
    let supported = host(b"GenuineIntel", 0xd);
    let entries = CpuidTemplate::new(&supported, &options(Topology::flat(4).unwrap())).entries(0);
    assert!(!entries.iter().any(|e| e.function == 0x1f));
    assert!(entries.iter().any(|e| e.function == 0xb));
}

#[test]
fn caches_are_shared_by_core_and_by_die() {
    let entries = intel(Topology::new(2, 4, 1, 1, 8).unwrap(), 0);
    let (first, last) = (find(&entries, 4, 0).eax, find(&entries, 4, 3).eax);
    assert_eq!((first >> 14 & 0xfff, last >> 14 & 0xfff), (1, 7));
    assert_eq!((first >> 26, first & 0x3fff), (3, 0x121));
}

#[test]
fn amd_leaves_count_threads_and_name_the_core() {
    let supported = host(b"AuthenticAMD", 0x10);
    let topology = Topology::new(2, 4, 1, 2, 16).unwrap();
    let entries = CpuidTemplate::new(&supported, &options(topology)).entries(13);
    assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 3 << 12 | 7);
    assert_ne!(find(&entries, 0x8000_0001, 0).ecx & ECX_CMP_LEGACY, 0);
    let node = find(&entries, 0x8000_001e, 0);
    assert_eq!((node.eax, node.ebx, node.ecx), (13, 1 << 8 | 2, 1));
}

#[test]
fn threads_of_an_amd_core_are_told_where_the_hosts_cores_have_one() {
    let mut supported = host(b"AuthenticAMD", 0x10);
    supported.retain(|leaf| leaf.function != LEAF_AMD_UNIT);
    supported.push(leaf(0x8000_0000, 0, [0x8000_001a, 0, 0, 0]));
    let entries = |threads, vcpu| {
        let topology = Topology::new(threads, 2, 1, 1, 2 * threads).unwrap();
        CpuidTemplate::new(&supported, &options(topology)).entries(vcpu)
    };
    let two = entries(2, 3);
    assert_eq!(find(&two, LEAF_AMD_UNIT, 0).ebx, 1 << 8 | 1);
    assert_eq!(find(&two, 0x8000_0000, 0).eax, LEAF_AMD_UNIT);
    assert_ne!(find(&two, 0x8000_0001, 0).ecx & ECX_TOPOLOGY_EXTENSIONS, 0);
    let one = entries(1, 1);
    assert!(!one.iter().any(|leaf| leaf.function == LEAF_AMD_UNIT));
    assert_eq!(find(&one, 0x8000_0001, 0).ecx & ECX_TOPOLOGY_EXTENSIONS, 0);
}

#[test]
fn address_bits_are_what_guests_can_address_and_the_limit_allows() {
    let supported = host(b"GenuineIntel", 0x20); // 52 bits, of which guests can address 48
    let bits = |max_phys_bits| {
        let options = CpuidOptions { max_phys_bits, ..options(Topology::flat(1).unwrap()) };
        CpuidTemplate::new(&supported, &options).phys_bits()
    };
    assert_eq!((bits(46), bits(52), bits(40)), (46, 48, 40));
    assert_eq!(phys_bits(&[]), 36);
}

#[test]
fn wide_message_destinations_are_not_offered() {
    let mut supported = host(b"GenuineIntel", 0x20);
    for leaf in supported.iter_mut().filter(|leaf| leaf.function == LEAF_KVM_FEATURES) {
        leaf.eax |= KVM_FEATURE_MSI_EXT_DEST_ID;
    }
    let entries = CpuidTemplate::new(&supported, &options(Topology::flat(255).unwrap())).entries(254);
    assert_eq!(find(&entries, LEAF_KVM_FEATURES, 0).eax & KVM_FEATURE_MSI_EXT_DEST_ID, 0);
}

#[test]
fn options_take_away_virtualisation_and_add_frequencies() {
    let options = CpuidOptions {
        nested: false,
        tsc_khz: Some(2_400_000),
        tsc_deadline: false,
        ..options(Topology::flat(1).unwrap())
    };
    let entries = CpuidTemplate::new(&host(b"GenuineIntel", 0x20), &options).entries(0);
    assert_eq!(find(&entries, 1, 0).ecx & (ECX_VMX | ECX_TSC_DEADLINE), 0);
    assert_eq!(find(&entries, 0x8000_0001, 0).ecx & ECX_SVM, 0);
    assert_eq!(find(&entries, LEAF_HYPERVISOR, 0).eax, LEAF_TIMING);
    let timing = find(&entries, LEAF_TIMING, 0);
    assert_eq!((timing.eax, timing.ebx), (2_400_000, 1_000_000));
}

#[test]
fn matrix_extensions_are_there_only_for_who_asks() {
    let mut supported = host(b"GenuineIntel", 0x20);
    supported.extend([
        leaf(7, 0, [1, 0, 0, 1 << 22 | 1 << 24 | 1 << 25 | 1]),
        leaf(7, 1, [1 << 21 | 1, 0, 0, 1 << 8 | 1]),
        leaf(0xd, 0, [6 << 16 | 7, 0, 0, 0]),
        leaf(0xd, 18, [8192, 0, 0, 0]),
        leaf(0x1d, 1, [1, 1, 1, 1]),
    ]);
    assert!(has_amx(&supported) && !has_amx(&host(b"GenuineIntel", 0x20)));
    let topology = Topology::flat(1).unwrap();
    let without = CpuidTemplate::new(&supported, &options(topology)).entries(0);
    assert!(!has_amx(&without) && !without.iter().any(|e| e.function == 0x1d || e.index == 18));
    assert_eq!((find(&without, 7, 0).edx, find(&without, 0xd, 0).eax), (1, 7));
    assert_eq!((find(&without, 7, 1).eax, find(&without, 7, 1).edx), (1, 1));
    let with = CpuidTemplate::new(&supported, &CpuidOptions { amx: true, ..options(topology) }).entries(0);
    assert!(has_amx(&with) && with.iter().any(|e| e.function == 0x1d));
    assert_eq!(find(&with, 0xd, 0).eax, 6 << 16 | 7);
}

#[test]
fn a_hyper_v_guest_finds_its_leaves_first() {
    let hyperv = CpuidOptions { hyperv: true, tsc_khz: Some(1), ..options(Topology::flat(2).unwrap()) };
    let entries = CpuidTemplate::new(&host(b"GenuineIntel", 0x20), &hyperv).entries(1);
    assert_eq!(find(&entries, LEAF_HYPERVISOR + 1, 0).eax, u32::from_le_bytes(*b"Hv#1"));
    assert!(!entries.iter().any(|entry| entry.function == LEAF_TIMING));
    // KVM still keeps its messages narrow.
    assert_eq!(find(&entries, LEAF_KVM_FEATURES + 0x100, 0).eax & KVM_FEATURE_MSI_EXT_DEST_ID, 0);
}
