//! The PVH boot protocol: an ELF file whose note names a 32-bit entry point, and the start info it is given.
//!
//! Follows Xen's `docs/misc/pvh.pandoc` and `xen/include/public/arch-x86/hvm/start_info.h` (version 1), and
//! the System V gABI chapters "Object Files" and "Program Loading" for the 64-bit little-endian ELF format.

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::super::layout::{self, AddressRange, MemoryMap, RangeKind};
use super::{EntryPoint, ImageFile, LoadError, LoadedKernel, Protocol, Role, zero_guest};

/// First bytes of every ELF file.
pub(super) const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
const ELF_HEADER_LEN: usize = 64;
const PROGRAM_HEADER_LEN: usize = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
/// CLOUDHV.fd calls itself so: it is entered in 32-bit mode, in a 64-bit file.
const MACHINE_386: u16 = 3;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Type of the note that holds the entry point; its name is "Xen".
const PHYS32_ENTRY: u32 = 18;
/// Notes of a kernel are a few hundred bytes; a longer segment holds something else.
const NOTES_MAX: u64 = 1 << 20;
/// `hvm_start_info.magic`.
const START_INFO_MAGIC: u32 = 0x336e_c578;
/// `hvm_start_info.version`: the first with a memory map.
const START_INFO_VERSION: u32 = 1;
/// Linux' own limit, which it cuts longer lines to without a word.
const COMMAND_LINE_MAX: u64 = 2047;
/// No segment can be loaded below this address: the loader's own structures lie there.
const LOAD_MIN: u64 = layout::COMMAND_LINE.0 + layout::COMMAND_LINE_MAX;

/// The fields of a program header that matter.
struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_len: u64,
    memory_len: u64,
}

/// Checks and loads an ELF file.
pub(super) fn load_elf<M: GuestMemoryBackend>(
    memory: &M,
    map: &MemoryMap,
    image: &ImageFile,
) -> Result<LoadedKernel, LoadError> {
    let segments = read_segments(image)?;
    let entry = find_entry(image, &segments)?;
    let mut end = layout::HIGH_MEMORY.0;
    for segment in segments.iter().filter(|s| s.kind == PT_LOAD && s.memory_len > 0) {
        let range = placement(map, image, segment)?;
        let start = range.start;
        image.read_into(memory, segment.offset, start, segment.file_len)?;
        zero_guest(memory, AddressRange::between(GuestAddress(start.0 + segment.file_len), range.end()))?;
        end = end.max(range.end().0);
    }
    let protocol = Protocol::Pvh { entry: GuestAddress(entry.into()) };
    Ok(LoadedKernel { protocol, end, initramfs_limit: u64::MAX, command_line_max: COMMAND_LINE_MAX })
}

/// Reads the program headers and checks that all they refer to is in the file.
fn read_segments(image: &ImageFile) -> Result<Vec<Segment>, LoadError> {
    let truncated = |needed| {
        let path = image.path.clone();
        Err(LoadError::Truncated { role: image.role, path, len: image.len(), needed })
    };
    let unsupported =
        |reason| Err(LoadError::Unsupported { role: image.role, path: image.path.clone(), reason });

    let mut header = [0; ELF_HEADER_LEN];
    if image.len() < ELF_HEADER_LEN as u64 {
        return truncated(ELF_HEADER_LEN as u64);
    }
    image.read_at(&mut header, 0)?;
    if header[4] != CLASS_64 || header[5] != LITTLE_ENDIAN {
        return unsupported("it is not a 64-bit little-endian ELF file; use one built for x86_64");
    }
    if ![MACHINE_X86_64, MACHINE_386].contains(&read_u16(&header, 18)) {
        return unsupported("it was built for another architecture; use one built for x86_64");
    }
    let table = read_u64(&header, 32);
    let count = usize::from(read_u16(&header, 56));
    if usize::from(read_u16(&header, 54)) != PROGRAM_HEADER_LEN || count == 0 {
        return unsupported("it has no program headers; use the linked image, not an object file");
    }
    let table_end = table.saturating_add((count * PROGRAM_HEADER_LEN) as u64);
    if image.len() < table_end {
        return truncated(table_end);
    }
    let mut bytes = vec![0; count * PROGRAM_HEADER_LEN];
    image.read_at(&mut bytes, table)?;

    let mut segments = Vec::with_capacity(count);
    for header in bytes.chunks_exact(PROGRAM_HEADER_LEN) {
        let segment = Segment {
            kind: read_u32(header, 0),
            offset: read_u64(header, 8),
            address: read_u64(header, 24),
            file_len: read_u64(header, 32),
            memory_len: read_u64(header, 40),
        };
        if segment.kind == PT_LOAD || segment.kind == PT_NOTE {
            let end = segment.offset.saturating_add(segment.file_len);
            if image.len() < end {
                return truncated(end);
            }
            segments.push(segment);
        }
    }
    Ok(segments)
}

/// Finds the entry point in the file's notes.
fn find_entry(image: &ImageFile, segments: &[Segment]) -> Result<u32, LoadError> {
    for segment in segments.iter().filter(|s| s.kind == PT_NOTE && s.file_len <= NOTES_MAX) {
        let mut notes = vec![0; usize::try_from(segment.file_len).unwrap_or(0)];
        image.read_at(&mut notes, segment.offset)?;
        if let Some(entry) = entry_in_notes(&notes) {
            return Ok(entry);
        }
    }
    let reason = match image.role {
        Role::Firmware => {
            "it is an ELF file without a PVH entry point; give one that has it, such as CLOUDHV.fd or hypervisor-fw"
        }
        _ => "it is an ELF file without a PVH entry point; build it with CONFIG_PVH=y, or use its bzImage",
    };
    Err(LoadError::Unsupported { role: image.role, path: image.path.clone(), reason })
}

/// Walks notes: three words (name length, descriptor length, type), then name and descriptor, each padded
/// to four bytes.
fn entry_in_notes(mut notes: &[u8]) -> Option<u32> {
    while let Some((head, rest)) = notes.split_at_checked(12) {
        let padded = |len: u32| usize::try_from(len.checked_next_multiple_of(4)?).ok();
        let (name_len, descriptor_len) = (read_u32(head, 0), read_u32(head, 4));
        let (name, rest) = rest.split_at_checked(padded(name_len)?)?;
        // The padding of the last descriptor may be missing.
        let (descriptor, rest) = rest.split_at_checked(padded(descriptor_len)?).unwrap_or((rest, &[]));
        if read_u32(head, 8) == PHYS32_ENTRY && name_len == 4 && name == b"Xen\0" && descriptor.len() >= 4 {
            return Some(read_u32(descriptor, 0));
        }
        notes = rest;
    }
    None
}

/// Checks that a segment lies in RAM that is the guest's own.
fn placement(map: &MemoryMap, image: &ImageFile, segment: &Segment) -> Result<AddressRange, LoadError> {
    let address = segment.address;
    let end = address.saturating_add(segment.memory_len);
    let ram = map.entries().into_iter().find(|entry| {
        entry.kind == RangeKind::Ram && entry.range.contains(GuestAddress(address)) && address >= LOAD_MIN
    });
    let too_large = |limit| {
        let path = image.path.clone();
        Err(LoadError::KernelTooLarge { role: image.role, path, start: address, end, limit })
    };
    match ram {
        Some(ram) if end <= ram.range.end().0 && segment.file_len <= segment.memory_len => {
            Ok(AddressRange::new(GuestAddress(address), segment.memory_len))
        }
        Some(ram) => too_large(ram.range.end().0),
        None if address >= map.low_ram_end().0 => too_large(map.low_ram_end().0),
        None => Err(LoadError::Placement { role: image.role, path: image.path.clone(), address }),
    }
}

/// Writes the start info with its memory map and module list, and says where the kernel is entered.
pub(super) fn write_start_info<M: GuestMemoryBackend>(
    memory: &M,
    map: &MemoryMap,
    entry: GuestAddress,
    initramfs: Option<AddressRange>,
    rsdp: GuestAddress,
) -> Result<EntryPoint, LoadError> {
    let memory_map: Vec<_> = map
        .entries()
        .iter()
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.range.start.0,
            size: entry.range.len,
            type_: entry.kind as u32,
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = initramfs
        .iter()
        .map(|range| hvm_modlist_entry { paddr: range.start.0, size: range.len, ..Default::default() })
        .collect();
    let no_memory = |_| LoadError::Memory { address: layout::PVH_START_INFO.0 };
    let start_info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: START_INFO_VERSION,
        nr_modules: u32::from(initramfs.is_some()),
        modlist_paddr: if initramfs.is_some() { layout::PVH_MODULES.0 } else { 0 },
        cmdline_paddr: layout::COMMAND_LINE.0,
        rsdp_paddr: rsdp.0,
        memmap_paddr: layout::PVH_MEMORY_MAP.0,
        memmap_entries: u32::try_from(memory_map.len()).unwrap_or(0),
        ..Default::default()
    };
    let mut params = BootParams::new(&start_info, layout::PVH_START_INFO);
    params.set_sections(&memory_map, layout::PVH_MEMORY_MAP);
    if !modules.is_empty() {
        params.set_modules(&modules, layout::PVH_MODULES);
    }
    PvhBootConfigurator::write_bootparams(&params, memory).map_err(no_memory)?;
    Ok(EntryPoint::Pvh { address: entry })
}

/// Little-endian fields at fixed offsets of buffers whose length the caller has fixed.
fn read_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn read_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from(read_u16(bytes, at)) | u32::from(read_u16(bytes, at + 2)) << 16
}

fn read_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from(read_u32(bytes, at)) | u64::from(read_u32(bytes, at + 4)) << 32
}
