//! The smallest guest: it writes one byte to the serial port and halts. Runs on every KVM, at once.

/// Where the guest's code is loaded and entered.
const ENTRY: u32 = 0x10_0000;
/// 32-bit code: `mov dx, 0x3f8; mov al, '!'; out dx, al; hlt; jmp` back to the `hlt`.
const CODE: [u8; 10] = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'!', 0xee, 0xf4, 0xeb, 0xfd];

/// A 64-bit ELF of one segment and one note, the PVH entry (`XEN_ELFNOTE_PHYS32_ENTRY`).
pub fn elf() -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    const NOTE: u64 = 20;
    let code = HEADERS + NOTE;
    let length = CODE.len() as u64;
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
    put(&CODE);
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
