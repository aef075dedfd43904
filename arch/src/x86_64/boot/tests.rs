//! Tests of the entry state.

use vm_memory::GuestMemoryMmap;

use super::*;

const LINUX: EntryPoint = EntryPoint::Linux64 { address: GuestAddress(0x100_0200) };
const PVH: EntryPoint = EntryPoint::Pvh { address: GuestAddress(0x10_0000) };

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap()
}

fn word(memory: &GuestMemoryMmap, address: u64) -> u64 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn linux_starts_in_long_mode_with_the_zero_page_in_rsi() {
    let mut sregs = kvm_sregs { cr0: 0x6000_0010, ..Default::default() };
    set_special_registers(&LINUX, &mut sregs);
    let regs = registers(&LINUX);
    assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x100_0200, 0x7000, 2));
    assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x8000_0011, 0x20, 0x500));
    assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.selector), (1, 0, 0x10));
}

#[test]
fn pvh_starts_in_protected_mode_with_the_start_info_in_rbx() {
    let mut sregs = kvm_sregs::default();
    set_special_registers(&PVH, &mut sregs);
    assert_eq!(registers(&PVH).rbx, 0x6000);
    assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
    assert_eq!((sregs.cs.l, sregs.cs.db), (0, 1));
}

#[test]
fn descriptors_are_those_of_flat_segments() {
    let memory = memory();
    write_tables(&LINUX, &memory).unwrap();
    let gdt: Vec<_> = (0..5).map(|i| word(&memory, 0x500 + i * 8)).collect();
    assert_eq!(gdt, [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067]);
    write_tables(&PVH, &memory).unwrap();
    assert_eq!(word(&memory, 0x510), 0x00cf_9b00_0000_ffff);
}

/// Walks the tables as the processor does.
fn translate(memory: &GuestMemoryMmap, address: u64) -> u64 {
    let next = |table: u64, shift: u64| {
        let entry = word(memory, (table & !0xfff) + (address >> shift & 0x1ff) * 8);
        assert_eq!(entry & 3, 3, "not mapped: {address:#x}");
        entry
    };
    let pde = next(next(next(0x9000, 39), 30), 21);
    assert_ne!(pde & PAGE_LARGE, 0);
    (pde & !(LARGE_PAGE - 1)) + (address & (LARGE_PAGE - 1))
}

#[test]
fn the_first_4_gib_are_mapped_to_themselves() {
    let memory = memory();
    write_tables(&LINUX, &memory).unwrap();
    for address in [0, 0x7000, 0x10_0000, 0x100_0200, 0x3fff_ffff, 0x4000_0000, 0xffff_ffff] {
        assert_eq!(translate(&memory, address), address);
    }
}

#[test]
fn memory_is_write_back_by_default() {
    assert!(boot_msrs().iter().any(|msr| msr.index == 0x2ff && msr.data == 0x806));
}
