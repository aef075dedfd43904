//! The smallest guests: one writes a byte to the serial port and halts, one looks at the machine as a firmware does. They run on every KVM, at once.

/// Where the guest's code is loaded and entered.
const ENTRY: u32 = 0x10_0000;
/// 32-bit code: `mov dx, 0x3f8; mov al, '!'; out dx, al; hlt; jmp` back to the `hlt`.
const CODE: [u8; 10] = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'!', 0xee, 0xf4, 0xeb, 0xfd];

/// What [`firmware`] writes to the serial port and to the debug console when everything is as a firmware for Cloud Hypervisor expects it.
#[allow(dead_code, reason = "this file is part of two programs")]
pub const FIRMWARE_SAYS: &str = "MCRXFDPT\n";

/// 32-bit code: checks one thing after the other, writes a letter for each to ports 0x3f8 and 0xe9, and switches the machine off at the
/// end. At the first thing that is wrong it halts.
#[allow(dead_code, reason = "this file is part of two programs")]
#[rustfmt::skip]
const FIRMWARE: [u8; 185] = [
    0x66, 0xba, 0xf8, 0x03,                   // mov dx, 0x3f8
    0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33,       // cmp dword [ebx], 0x336ec578        start info: magic
    0x0f, 0x85, 0xa6, 0x00, 0x00, 0x00,       // jne halt
    0xb0, b'M', 0xee, 0xe6, 0xe9,             // mov al, 'M'; out dx, al; out 0xe9, al
    0x83, 0x7b, 0x0c, 0x00,                   // cmp dword [ebx + 12], 0             no modules
    0x0f, 0x85, 0x97, 0x00, 0x00, 0x00,       // jne halt
    0x8b, 0x73, 0x18,                         // mov esi, [ebx + 24]                 command line
    0x80, 0x3e, 0x00,                         // cmp byte [esi], 0                   empty
    0x0f, 0x85, 0x8b, 0x00, 0x00, 0x00,       // jne halt
    0xb0, b'C', 0xee, 0xe6, 0xe9,
    0x8b, 0x73, 0x20,                         // mov esi, [ebx + 32]                 RSDP
    0x81, 0x3e, b'R', b'S', b'D', b' ',       // cmp dword [esi], 'RSD '
    0x75, 0x7b,                               // jne halt
    0xb0, b'R', 0xee, 0xe6, 0xe9,
    0x8b, 0x76, 0x18,                         // mov esi, [esi + 24]                 XsdtAddress
    0x81, 0x3e, b'X', b'S', b'D', b'T',       // cmp dword [esi], 'XSDT'
    0x75, 0x6b,                               // jne halt
    0xb0, b'X', 0xee, 0xe6, 0xe9,
    0x8b, 0x76, 0x24,                         // mov esi, [esi + 36]                 its first entry
    0x81, 0x3e, b'F', b'A', b'C', b'P',       // cmp dword [esi], 'FACP'
    0x75, 0x5b,                               // jne halt
    0xb0, b'F', 0xee, 0xe6, 0xe9,
    0x8b, 0xb6, 0x8c, 0x00, 0x00, 0x00,       // mov esi, [esi + 140]                X_DSDT
    0x81, 0x3e, b'D', b'S', b'D', b'T',       // cmp dword [esi], 'DSDT'
    0x75, 0x48,                               // jne halt
    0xb0, b'D', 0xee, 0xe6, 0xe9,
    0xb8, 0x00, 0x00, 0x00, 0x80,             // mov eax, 0x80000000                 function 00:00.0
    0x66, 0xba, 0xf8, 0x0c, 0xef,             // mov dx, 0xcf8; out dx, eax
    0x66, 0xba, 0xfc, 0x0c, 0xed,             // mov dx, 0xcfc; in eax, dx
    0x66, 0xba, 0xf8, 0x03,                   // mov dx, 0x3f8
    0x3d, 0x86, 0x80, 0x57, 0x0d,             // cmp eax, 0x0d578086                 Cloud Hypervisor's host bridge
    0x75, 0x29,                               // jne halt
    0xb0, b'P', 0xee, 0xe6, 0xe9,
    0x66, 0xba, 0x08, 0x06, 0xed,             // mov dx, 0x608; in eax, dx           power management timer
    0x89, 0xc1,                               // mov ecx, eax
    0xed, 0x39, 0xc8, 0x74, 0xfb,             // in eax, dx; cmp eax, ecx; je (in)   until it has counted
    0x66, 0xba, 0xf8, 0x03,                   // mov dx, 0x3f8
    0xb0, b'T', 0xee, 0xe6, 0xe9,
    0xb0, b'\n', 0xee, 0xe6, 0xe9,
    0x66, 0xba, 0x04, 0x06,                   // mov dx, 0x604                       PM1 control
    0x66, 0xb8, 0x00, 0x34, 0x66, 0xef,       // mov ax, 0x3400; out dx, ax          soft-off
    0xf4, 0xeb, 0xfd,                         // halt: hlt; jmp halt
];

/// The guest that looks at the machine as a firmware does, as an ELF file.
#[allow(dead_code, reason = "this file is part of two programs")]
pub fn firmware() -> Vec<u8> {
    elf_of(&FIRMWARE)
}

/// The smallest guest, as an ELF file.
pub fn elf() -> Vec<u8> {
    elf_of(&CODE)
}

/// A 64-bit ELF of one segment and one note, the PVH entry (`XEN_ELFNOTE_PHYS32_ENTRY`).
fn elf_of(content: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    const NOTE: u64 = 20;
    let code = HEADERS + NOTE;
    let length = content.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let mut put = |bytes: &[u8]| elf.extend_from_slice(bytes);
    for half in [2_u16, 62] {
        put(&half.to_le_bytes()); // ET_EXEC, EM_X86_64
    }
    put(&1_u32.to_le_bytes());
    for word in [u64::from(ENTRY), 64, 0] {
        put(&word.to_le_bytes()); // entry, program headers, section headers
    }
    put(&0_u32.to_le_bytes());
    for half in [64_u16, 56, 2, 0, 0, 0] {
        put(&half.to_le_bytes());
    }
    let entry = u64::from(ENTRY);
    for (kind, flags, fields) in
        [(1_u32, 5_u32, [code, entry, entry, length, length, 1]), (4, 4, [HEADERS, 0, 0, NOTE, NOTE, 4])]
    {
        put(&kind.to_le_bytes());
        put(&flags.to_le_bytes());
        for field in fields {
            put(&field.to_le_bytes());
        }
    }
    for word in [4_u32, 4, 18] {
        put(&word.to_le_bytes()); // lengths of name and value, type
    }
    put(b"Xen\0");
    put(&ENTRY.to_le_bytes());
    put(content);
    elf
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_holds_its_code_where_the_segment_says() {
        let elf = elf();
        assert_eq!(elf.len(), 64 + 2 * 56 + 20 + CODE.len());
        let offset = usize::try_from(u64::from_le_bytes(elf[72..80].try_into().unwrap())).unwrap();
        assert_eq!(elf[offset..], CODE);
    }
}
