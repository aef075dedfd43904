//! Tests of the loader, on images made by hand.

use std::io::Write;

use linux_loader::loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::*;

const MIB: u64 = 1 << 20;
const RSDP: GuestAddress = layout::RSDP;
/// Where the hand-made kernels go.
const LOAD_AT: u64 = 16 * MIB;

fn guest(size: u64) -> (GuestMemoryMmap, MemoryMap) {
    let map = MemoryMap::new(size, 46).unwrap();
    let ranges: Vec<_> = map.ram().iter().map(|r| (r.start, usize::try_from(r.len).unwrap())).collect();
    (GuestMemoryMmap::from_ranges(&ranges).unwrap(), map)
}

/// A file of these bytes, which no name leads to.
fn image(role: Role, bytes: &[u8]) -> Result<ImageFile, LoadError> {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("dormouse-loader-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(name);
    let mut file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    file.write_all(bytes).unwrap();
    ImageFile::from_file(role, file, Path::new("test.img"))
}

fn images(kernel: &[u8], initramfs: Option<&[u8]>, command_line: &str) -> BootImages {
    BootImages {
        kernel: image(Role::Kernel, kernel).unwrap(),
        initramfs: initramfs.map(|bytes| image(Role::Initramfs, bytes).unwrap()),
        command_line: command_line.into(),
    }
}

fn bytes_at(memory: &GuestMemoryMmap, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

/// An ELF file with a PVH note and one segment of 50 bytes at `address`, 100 bytes in memory.
fn elf(address: u64) -> Vec<u8> {
    let mut file = vec![0; 64 + 2 * 56];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[18..20].copy_from_slice(&62u16.to_le_bytes());
    file[32..40].copy_from_slice(&64u64.to_le_bytes());
    file[54..56].copy_from_slice(&56u16.to_le_bytes());
    file[56..58].copy_from_slice(&2u16.to_le_bytes());
    let mut header = |at: usize, kind: u32, offset: u64, file_len: u64, memory_len: u64| {
        file[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        for (field, value) in [(8, offset), (24, address), (32, file_len), (40, memory_len)] {
            file[at + field..at + field + 8].copy_from_slice(&value.to_le_bytes());
        }
    };
    header(64, 1, 200, 50, 100);
    header(120, 4, 176, 20, 20);
    for word in [4u32, 4, 18] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend_from_slice(b"Xen\0");
    file.extend_from_slice(&u32::try_from(address + 7).unwrap().to_le_bytes());
    file.resize(200, 0);
    file.extend_from_slice(&[0xf4; 50]);
    file
}

/// A bzImage with one setup sector and `payload` bytes of protected-mode code.
fn bzimage(payload: u32, init_size: u32) -> Vec<u8> {
    let header = setup_header {
        setup_sects: 1,
        syssize: payload / 16,
        header: 0x5372_6448,
        version: 0x20f,
        loadflags: 1,
        xloadflags: 1,
        relocatable_kernel: 1,
        code32_start: 0x10_0000,
        pref_address: LOAD_AT,
        init_size,
        initrd_addr_max: 0x7fff_ffff,
        cmdline_size: 2047,
        ..Default::default()
    };
    let mut file = vec![0; 1024];
    file[0x1f1..0x1f1 + 123].copy_from_slice(header.as_slice());
    file.resize(1024 + usize::try_from(payload).unwrap(), 0x90);
    file
}

#[test]
fn a_pvh_elf_with_a_50_byte_payload_loads() {
    let (memory, map) = guest(64 * MIB);
    memory.write_slice(&[0xff; 200], GuestAddress(0x10_0000)).unwrap();
    let entry = load(&memory, &map, &images(&elf(0x10_0000), None, "hello"), RSDP).unwrap();

    assert_eq!(entry, EntryPoint::Pvh { address: GuestAddress(0x10_0007) });
    assert_eq!(bytes_at(&memory, 0x10_0000, 50), [0xf4; 50]);
    assert_eq!(bytes_at(&memory, 0x10_0032, 50), [0; 50], "what the file lacks is cleared");
    assert_eq!(bytes_at(&memory, 0x10_0064, 1), [0xff], "what is behind the segment is left alone");

    let info: hvm_start_info = memory.read_obj(layout::PVH_START_INFO).unwrap();
    assert_eq!((info.magic, info.version, info.nr_modules), (0x336e_c578, 1, 0));
    assert_eq!(info.rsdp_paddr, 0xe_0000);
    assert_eq!(bytes_at(&memory, info.cmdline_paddr, 6), b"hello\0");
    assert_eq!(usize::try_from(info.memmap_entries).unwrap(), map.entries().len());
    let ram: hvm_memmap_table_entry = memory.read_obj(GuestAddress(info.memmap_paddr)).unwrap();
    assert_eq!((ram.addr, ram.size, ram.type_), (0, 0x9_fc00, 1));
}

#[test]
fn a_pvh_guest_finds_its_initramfs_in_the_module_list() {
    let (memory, map) = guest(64 * MIB);
    load(&memory, &map, &images(&elf(0x10_0000), Some(&[7; 5000]), ""), RSDP).unwrap();
    let info: hvm_start_info = memory.read_obj(layout::PVH_START_INFO).unwrap();
    let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!((info.nr_modules, module.size), (1, 5000));
    assert_eq!(module.paddr, 64 * MIB - 8192);
    assert_eq!(bytes_at(&memory, module.paddr, 5000), [7; 5000]);
}

#[test]
fn a_bzimage_loads_at_its_preferred_address() {
    let (memory, map) = guest(256 * MIB);
    let entry = load(&memory, &map, &images(&bzimage(4096, 1 << 20), Some(b"cpio"), "quiet"), RSDP).unwrap();

    assert_eq!(entry, EntryPoint::Linux64 { address: GuestAddress(LOAD_AT + 0x200) });
    assert_eq!(bytes_at(&memory, LOAD_AT, 4096), [0x90; 4096]);
    let params: boot_params = memory.read_obj(layout::ZERO_PAGE).unwrap();
    let hdr = params.hdr;
    assert_eq!((hdr.type_of_loader, { hdr.cmd_line_ptr }), (0xff, 0x2_0000));
    assert_eq!({ params.acpi_rsdp_addr }, 0xe_0000);
    assert_eq!(({ hdr.ramdisk_image }, { hdr.ramdisk_size }), (256 * 0x10_0000 - 4096, 4));
    assert_eq!(bytes_at(&memory, 0x2_0000, 6), b"quiet\0");

    let table = params.e820_table;
    let entries: Vec<_> =
        table[..usize::from(params.e820_entries)].iter().map(|e| (e.addr, e.size, e.r#type)).collect();
    let expected: Vec<_> =
        map.entries().iter().map(|e| (e.range.start.0, e.range.len, e.kind as u32)).collect();
    assert_eq!(entries, expected);
}

#[test]
fn the_initramfs_stays_below_what_the_kernel_can_reach() {
    let (memory, map) = guest(256 * MIB);
    let mut kernel = bzimage(4096, 1 << 20);
    kernel[0x22c..0x230].copy_from_slice(&0x07ff_ffff_u32.to_le_bytes());
    load(&memory, &map, &images(&kernel, Some(b"cpio"), ""), RSDP).unwrap();
    let params: boot_params = memory.read_obj(layout::ZERO_PAGE).unwrap();
    assert_eq!({ params.hdr.ramdisk_image }, 128 * 0x10_0000 - 4096);
}

#[test]
fn a_truncated_bzimage_is_refused() {
    let (memory, map) = guest(64 * MIB);
    let mut kernel = bzimage(4096, 1 << 20);
    kernel.truncate(1024 + 4095);
    let error = load(&memory, &map, &images(&kernel, None, ""), RSDP).unwrap_err();
    assert!(matches!(error, LoadError::Truncated { len: 5119, needed: 5120, .. }), "{error}");
    assert!(error.to_string().contains("test.img"));
}

#[test]
fn a_truncated_elf_is_refused_wherever_it_is_cut() {
    let (memory, map) = guest(64 * MIB);
    let whole = elf(0x10_0000);
    for len in 4..whole.len() {
        let error = load(&memory, &map, &images(&whole[..len], None, ""), RSDP).unwrap_err();
        assert!(matches!(error, LoadError::Truncated { .. }), "cut at {len}: {error}");
    }
}

#[test]
fn what_is_no_kernel_is_refused_by_name() {
    let (memory, map) = guest(64 * MIB);
    for bytes in [&b"#!/bin/sh\n"[..], &[0; 4096], b"x"] {
        let error = load(&memory, &map, &images(bytes, None, ""), RSDP).unwrap_err();
        assert!(matches!(error, LoadError::NotAKernel { .. }), "{error}");
    }
    assert!(matches!(image(Role::Kernel, b""), Err(LoadError::Empty { .. })));
    assert!(matches!(ImageFile::open(Role::Kernel, Path::new("/proc")), Err(LoadError::NotAFile { .. })));
    let missing = ImageFile::open(Role::Initramfs, Path::new("/nonexistent/initrd")).unwrap_err();
    assert_eq!(
        missing.to_string(),
        "cannot open the initramfs /nonexistent/initrd; check the path and its permissions"
    );
}

#[test]
fn an_elf_that_cannot_be_entered_is_refused() {
    let (memory, map) = guest(64 * MIB);
    let changed = |at: usize, value: u8| {
        let mut file = elf(0x10_0000);
        file[at] = value;
        load(&memory, &map, &images(&file, None, ""), RSDP).unwrap_err()
    };
    for error in [changed(4, 1), changed(18, 183), changed(56, 0), changed(184, 17)] {
        assert!(matches!(error, LoadError::Unsupported { .. }), "{error}");
    }
}

#[test]
fn hostile_note_lengths_end_the_search() {
    let (memory, map) = guest(64 * MIB);
    for at in [176, 180] {
        let mut file = elf(0x10_0000);
        file[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = load(&memory, &map, &images(&file, None, ""), RSDP).unwrap_err();
        assert!(matches!(error, LoadError::Unsupported { .. }), "{error}");
    }
}

#[test]
fn a_segment_outside_free_ram_is_refused() {
    let (memory, map) = guest(64 * MIB);
    for address in [0, 0x7000, 0xa_0000, 0xf_0000] {
        let error = load(&memory, &map, &images(&elf(address), None, ""), RSDP).unwrap_err();
        assert!(matches!(error, LoadError::Placement { .. }), "{error}");
    }
    for address in [64 * MIB - 99, 64 * MIB, 0xe000_0000] {
        let error = load(&memory, &map, &images(&elf(address), None, ""), RSDP).unwrap_err();
        assert!(matches!(error, LoadError::KernelTooLarge { .. }), "{error}");
    }
}

#[test]
fn a_kernel_that_needs_more_memory_than_there_is_is_refused_with_numbers() {
    let (memory, map) = guest(64 * MIB);
    let error = load(&memory, &map, &images(&bzimage(4096, 49 << 20), None, ""), RSDP).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("0x1000000 to 0x4100000") && message.contains("0x4000000"), "{message}");
}

#[test]
fn an_initramfs_that_does_not_fit_is_refused_with_numbers() {
    let (memory, map) = guest(64 * MIB);
    let kernel = bzimage(4096, 47 << 20);
    let room = usize::try_from(MIB).unwrap();
    load(&memory, &map, &images(&kernel, Some(&vec![1; room]), ""), RSDP).unwrap();
    let error = load(&memory, &map, &images(&kernel, Some(&vec![1; room + 1]), ""), RSDP).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("1048577 bytes") && message.contains("1048576 bytes"), "{message}");
}

#[test]
fn a_command_line_is_as_long_as_the_kernel_allows_and_no_longer() {
    let (memory, map) = guest(64 * MIB);
    let with_line = |line: &str| load(&memory, &map, &images(&bzimage(4096, 0), None, line), RSDP);
    assert!(with_line(&"x".repeat(2047)).is_ok());
    let error = with_line(&"x".repeat(2048)).unwrap_err();
    assert!(matches!(error, LoadError::CommandLineTooLong { len: 2048, max: 2047 }), "{error}");
    assert!(matches!(with_line("a\0b"), Err(LoadError::CommandLineNul)));
}

#[test]
fn old_and_32_bit_kernels_are_refused() {
    let (memory, map) = guest(64 * MIB);
    for (at, value) in [(0x206, 0x0b), (0x211, 0), (0x236, 0)] {
        let mut kernel = bzimage(4096, 0);
        kernel[at] = value;
        let error = load(&memory, &map, &images(&kernel, None, ""), RSDP).unwrap_err();
        assert!(matches!(error, LoadError::Unsupported { .. }), "{error}");
    }
}

fn firmware(bytes: &[u8]) -> BootImages {
    BootImages { kernel: image(Role::Firmware, bytes).unwrap(), initramfs: None, command_line: String::new() }
}

#[test]
fn a_firmware_that_calls_itself_a_386_program_is_entered_by_its_note() {
    let (memory, map) = guest(64 * MIB);
    let mut file = elf(0x10_0000);
    file[18] = 3;
    let entry = load(&memory, &map, &firmware(&file), RSDP).unwrap();
    assert_eq!(entry, EntryPoint::Pvh { address: GuestAddress(0x10_0007) });
    let info: hvm_start_info = memory.read_obj(layout::PVH_START_INFO).unwrap();
    assert_eq!((info.rsdp_paddr, info.nr_modules, info.modlist_paddr), (0xe_0000, 0, 0));
    assert_eq!(bytes_at(&memory, info.cmdline_paddr, 1), [0], "no command line");
}

#[test]
fn what_is_no_firmware_is_refused_and_called_by_its_name() {
    let (memory, map) = guest(64 * MIB);
    let mut flash = vec![0; 4096];
    flash[40..44].copy_from_slice(b"_FVH");
    for (bytes, words) in [
        (bzimage(4096, 1 << 20), "it is a Linux kernel; boot it with --kernel"),
        (flash, "it is a flash image for a PC"),
        (b"#!/bin/sh\n".to_vec(), "it is no ELF file"),
        (b"x".to_vec(), "it is no ELF file"),
    ] {
        let error = load(&memory, &map, &firmware(&bytes), RSDP).unwrap_err().to_string();
        assert!(error.starts_with("the firmware test.img") && error.contains(words), "{error}");
    }
    let error = load(&memory, &map, &firmware(&elf(0x10_0000)[..100]), RSDP).unwrap_err().to_string();
    assert!(error.starts_with("the firmware test.img is truncated"), "{error}");
    let mut without_entry = elf(0x10_0000);
    without_entry[184] = 17;
    let error = load(&memory, &map, &firmware(&without_entry), RSDP).unwrap_err().to_string();
    assert!(error.contains("without a PVH entry point") && error.contains("CLOUDHV.fd"), "{error}");
}
