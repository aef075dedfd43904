//! The Linux boot protocol, 64-bit entry: header, placement and zero page.
//!
//! Follows `Documentation/arch/x86/boot.rst` and `zero-page.rst`; the version that matters is 2.12, the
//! first with `xloadflags`.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend};

use super::super::layout::{self, AddressRange, MemoryMap};
use super::{EntryPoint, ImageFile, LoadError, LoadedKernel, Protocol, write_guest};

/// Where the setup header starts in the file and in the zero page.
const HEADER_OFFSET: u64 = 0x1f1;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// The first protocol with `xloadflags`.
const PROTOCOL_2_12: u16 = 0x020c;
/// The first protocol with `kernel_info_offset`.
const PROTOCOL_2_15: u16 = 0x020f;
/// `loadflags`: the protected-mode code is loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1 << 0;
/// `xloadflags`: there is a 64-bit entry point at offset 0x200.
const XLF_KERNEL_64: u16 = 1 << 0;
/// `xloadflags`: kernel, zero page, command line and initramfs can be above 4 GiB.
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;
/// Offset of the 64-bit entry point from the load address.
const ENTRY_64_OFFSET: u64 = 0x200;
/// `type_of_loader` of a loader with no number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const SECTOR: u64 = 512;

/// The setup header of a bzImage.
pub(super) struct Header(setup_header);

impl Header {
    /// Reads the header, or `None` if the file has none.
    pub(super) fn read(image: &ImageFile) -> Result<Option<Self>, LoadError> {
        let mut header = setup_header::default();
        let bytes = header.as_mut_slice();
        if image.len() < HEADER_OFFSET + bytes.len() as u64 {
            return Ok(None);
        }
        image.read_at(bytes, HEADER_OFFSET)?;
        Ok((header.header == HEADER_MAGIC).then_some(Self(header)))
    }

    /// Length of the real-mode part, which is not loaded.
    fn setup_len(&self) -> u64 {
        // Zero sectors means four, for kernels from before the field existed.
        let sectors = if self.0.setup_sects == 0 { 4 } else { u64::from(self.0.setup_sects) };
        (sectors + 1) * SECTOR
    }
}

/// Checks and loads the protected-mode part of a bzImage.
pub(super) fn load_bzimage<M: GuestMemoryBackend>(
    memory: &M,
    map: &MemoryMap,
    image: &ImageFile,
    mut header: Header,
) -> Result<LoadedKernel, LoadError> {
    let hdr = &mut header.0;
    let unsupported = |reason| LoadError::Unsupported { role: image.role, path: image.path.clone(), reason };
    if hdr.version < PROTOCOL_2_12 || hdr.loadflags & LOADED_HIGH == 0 {
        return Err(unsupported("its boot protocol is older than 2.12; use Linux 3.8 or later"));
    }
    let xloadflags = hdr.xloadflags;
    if xloadflags & XLF_KERNEL_64 == 0 {
        return Err(unsupported("it has no 64-bit entry point; use a kernel built for x86_64"));
    }
    // What lies behind the header's own length is code, not header.
    if hdr.version < PROTOCOL_2_15 {
        hdr.kernel_info_offset = 0;
    }
    let load_address = if hdr.relocatable_kernel != 0 { hdr.pref_address } else { hdr.code32_start.into() };
    let init_size = u64::from(hdr.init_size);
    let syssize = hdr.syssize;
    let initrd_addr_max = hdr.initrd_addr_max;
    let command_line_max = hdr.cmdline_size.into();

    let offset = header.setup_len();
    let needed = offset + u64::from(syssize) * 16;
    if image.len() < needed || image.len() <= offset {
        let path = image.path.clone();
        return Err(LoadError::Truncated {
            role: image.role,
            path,
            len: image.len(),
            needed: needed.max(offset + 1),
        });
    }
    let len = needed - offset;
    // The kernel moves and unpacks itself inside this range before it looks at the memory map.
    let end = load_address.saturating_add(len.max(init_size));
    let limit = map.low_ram_end().0;
    if load_address < layout::HIGH_MEMORY.0 || end > limit {
        let path = image.path.clone();
        return Err(LoadError::KernelTooLarge { role: image.role, path, start: load_address, end, limit });
    }
    let code32_start =
        u32::try_from(load_address).map_err(|_| LoadError::Memory { address: load_address })?;
    image.read_into(memory, offset, GuestAddress(load_address), len)?;

    header.0.code32_start = code32_start;
    let initramfs_limit = if xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0 {
        u64::MAX
    } else {
        u64::from(initrd_addr_max).saturating_add(1)
    };
    Ok(LoadedKernel { protocol: Protocol::Linux64(Box::new(header)), end, initramfs_limit, command_line_max })
}

/// Writes the zero page, and says where the kernel is entered.
pub(super) fn write_zero_page<M: GuestMemoryBackend>(
    memory: &M,
    map: &MemoryMap,
    header: Header,
    initramfs: Option<AddressRange>,
    rsdp: GuestAddress,
) -> Result<EntryPoint, LoadError> {
    let mut params = boot_params { hdr: header.0, acpi_rsdp_addr: rsdp.0, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    (params.hdr.cmd_line_ptr, params.ext_cmd_line_ptr) = halves(layout::COMMAND_LINE.0);
    if let Some(initramfs) = initramfs {
        (params.hdr.ramdisk_image, params.ext_ramdisk_image) = halves(initramfs.start.0);
        (params.hdr.ramdisk_size, params.ext_ramdisk_size) = halves(initramfs.len);
    }
    for (slot, entry) in params.e820_table.iter_mut().zip(map.entries()) {
        *slot =
            boot_e820_entry { addr: entry.range.start.0, size: entry.range.len, r#type: entry.kind as u32 };
        params.e820_entries += 1;
    }
    write_guest(memory, params.as_slice(), layout::ZERO_PAGE)?;
    let load_address = u64::from(params.hdr.code32_start);
    Ok(EntryPoint::Linux64 { address: GuestAddress(load_address + ENTRY_64_OFFSET) })
}

/// The low and the high 32 bits.
fn halves(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}
