//! The state in which a vCPU starts: registers, descriptor and page tables, model-specific registers.
//!
//! Follows Linux' `Documentation/arch/x86/boot.rst` ("64-bit boot protocol"), Xen's `docs/misc/pvh.pandoc`,
//! and the Intel SDM volume 3 chapters 3 (descriptors), 4 (paging) and 12 (MTRRs).
//!
//! Only the first vCPU is entered here; the others wait for the guest to start them.

use kvm_bindings::{kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::layout;
use super::loader::EntryPoint;

#[cfg(test)]
mod tests;

// Selectors are those of Linux: `__BOOT_CS`, `__BOOT_DS`, `__BOOT_TSS`.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;
const GDT_ENTRIES: usize = 5;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of the flags register is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

const PAGE_PRESENT: u64 = 1 << 0;
const PAGE_WRITABLE: u64 = 1 << 1;
const PAGE_LARGE: u64 = 1 << 7;
const TABLE_ENTRIES: u64 = 512;
const LARGE_PAGE: u64 = 2 << 20;
/// Page directories, of 1 GiB each, that the identity map has.
const DIRECTORIES: u64 = 4;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1 << 0;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// General registers of the first vCPU.
pub fn registers(entry: &EntryPoint) -> kvm_regs {
    match *entry {
        EntryPoint::Linux64 { address } => kvm_regs {
            rip: address.0,
            rsp: layout::BOOT_STACK.0,
            rsi: layout::ZERO_PAGE.0,
            rflags: RFLAGS_RESERVED,
            ..Default::default()
        },
        EntryPoint::Pvh { address } => kvm_regs {
            rip: address.0,
            rbx: layout::PVH_START_INFO.0,
            rflags: RFLAGS_RESERVED,
            ..Default::default()
        },
    }
}

/// Changes the special registers of the first vCPU, as read from the hypervisor after its creation, to what
/// `entry` wants. What the hypervisor decides (the APIC base) stays.
pub fn set_special_registers(entry: &EntryPoint, sregs: &mut kvm_sregs) {
    let long_mode = matches!(entry, EntryPoint::Linux64 { .. });
    sregs.cs = code_segment(long_mode);
    let data = data_segment();
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task_segment();
    sregs.gdt.base = layout::BOOT_GDT.0;
    sregs.gdt.limit = u16::try_from(GDT_ENTRIES * 8 - 1).unwrap_or(u16::MAX);
    sregs.idt.base = layout::BOOT_IDT.0;
    sregs.idt.limit = 7;
    // Caching is on: with CR0.CD set, and a device assigned, every access of the guest would be uncached.
    if long_mode {
        sregs.cr0 = CR0_PG | CR0_ET | CR0_PE;
        sregs.cr3 = layout::BOOT_PAGE_TABLES.0;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LMA | EFER_LME;
    } else {
        sregs.cr0 = CR0_ET | CR0_PE;
        sregs.cr3 = 0;
        sregs.cr4 = 0;
        sregs.efer = 0;
    }
}

/// Writes the descriptor tables and, for a 64-bit entry, the identity page tables that the special registers
/// point at.
///
/// # Errors
/// Guest memory does not reach that far.
pub fn write_tables<M: GuestMemoryBackend>(entry: &EntryPoint, memory: &M) -> Result<(), GuestMemoryError> {
    let long_mode = matches!(entry, EntryPoint::Linux64 { .. });
    let gdt: [u64; GDT_ENTRIES] = [
        0,
        0,
        descriptor(&code_segment(long_mode)),
        descriptor(&data_segment()),
        descriptor(&task_segment()),
    ];
    memory.write_slice(&to_bytes(gdt), layout::BOOT_GDT)?;
    memory.write_obj(0u64, layout::BOOT_IDT)?;
    if long_mode {
        write_page_tables(memory)?;
    }
    Ok(())
}

/// Floating-point state as after `FNINIT`, with SSE exceptions masked.
pub fn fpu() -> kvm_fpu {
    kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }
}

/// Model-specific registers that every vCPU needs before its first instruction: memory is write-back unless
/// the page tables say otherwise, and string instructions are fast.
pub fn boot_msrs() -> Vec<kvm_msr_entry> {
    vec![
        msr(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        msr(MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
    ]
}

fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

/// Flat code segment: execute and read, accessed.
fn code_segment(long_mode: bool) -> kvm_segment {
    let (l, db) = if long_mode { (1, 0) } else { (0, 1) };
    kvm_segment { selector: CODE_SELECTOR, type_: 0xb, l, db, ..flat_segment() }
}

/// Flat data segment: read and write, accessed.
fn data_segment() -> kvm_segment {
    kvm_segment { selector: DATA_SELECTOR, type_: 0x3, db: 1, ..flat_segment() }
}

/// Busy task state segment at 0, which nothing switches to.
fn task_segment() -> kvm_segment {
    kvm_segment { selector: TSS_SELECTOR, type_: 0xb, limit: 0x67, present: 1, ..Default::default() }
}

fn flat_segment() -> kvm_segment {
    kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() }
}

/// A segment as a descriptor (Intel SDM 3A 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let bit = |value: u8, at: u32| u64::from(value & 1) << at;
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let base = segment.base;
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | u64::from(segment.type_ & 0xf) << 40
        | bit(segment.s, 44)
        | u64::from(segment.dpl & 3) << 45
        | bit(segment.present, 47)
        | (limit >> 16 & 0xf) << 48
        | bit(segment.avl, 52)
        | bit(segment.l, 53)
        | bit(segment.db, 54)
        | bit(segment.g, 55)
        | (base >> 24 & 0xff) << 56
}

/// Maps the first 4 GiB to themselves with 2 MiB pages, which every x86_64 processor has.
fn write_page_tables<M: GuestMemoryBackend>(memory: &M) -> Result<(), GuestMemoryError> {
    const TABLE: u64 = 4096;
    let pml4 = layout::BOOT_PAGE_TABLES.0;
    let pdpt = pml4 + TABLE;
    let directories = pdpt + TABLE;
    let table = PAGE_PRESENT | PAGE_WRITABLE;

    memory.write_obj(pdpt | table, GuestAddress(pml4))?;
    for i in 0..DIRECTORIES {
        memory.write_obj((directories + i * TABLE) | table, GuestAddress(pdpt + i * 8))?;
    }
    let pages: Vec<u8> = (0..DIRECTORIES * TABLE_ENTRIES)
        .flat_map(|i| ((i * LARGE_PAGE) | table | PAGE_LARGE).to_le_bytes())
        .collect();
    memory.write_slice(&pages, GuestAddress(directories))
}

fn to_bytes<const N: usize>(words: [u64; N]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
