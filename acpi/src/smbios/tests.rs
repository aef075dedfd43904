//! Reads the generated tables back as a guest would.

use super::*;

/// The structures as (type, formatted part after the header, strings).
fn parse(bytes: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
    assert_eq!(&bytes[..5], b"_SM3_");
    let entry_point = &bytes[..usize::from(bytes[6])];
    assert_eq!(entry_point.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0, "checksum");
    let length = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    let address = u64::from_le_bytes(bytes[16..24].try_into().unwrap());
    assert_eq!(address, 0xf_0000 + STRUCTURES_OFFSET);
    let mut rest = &bytes[usize::try_from(STRUCTURES_OFFSET).unwrap()..];
    assert_eq!(rest.len(), length);

    let mut structures = Vec::new();
    while !rest.is_empty() {
        let (kind, length) = (rest[0], usize::from(rest[1]));
        assert_eq!(usize::from(u16::from_le_bytes([rest[2], rest[3]])), structures.len(), "handle");
        let formatted = rest[4..length].to_vec();
        rest = &rest[length..];
        let mut strings = Vec::new();
        loop {
            let end = rest.iter().position(|byte| *byte == 0).unwrap();
            let string = String::from_utf8(rest[..end].to_vec()).unwrap();
            rest = &rest[end + 1..];
            if string.is_empty() {
                break;
            }
            strings.push(string);
        }
        if strings.is_empty() {
            assert_eq!(rest[0], 0, "two NULs end a structure without strings");
            rest = &rest[1..];
        }
        structures.push((kind, formatted, strings));
    }
    structures
}

#[test]
fn the_bios_is_young_enough_for_root_ports_to_suspend_and_says_it_is_a_vm() {
    let structures = parse(&build(&SystemIdentity::default(), 0xf_0000).unwrap());
    let kinds: Vec<u8> = structures.iter().map(|(kind, _, _)| *kind).collect();
    assert_eq!(kinds, [0, 1, 3, 127]);
    let (_, bios, strings) = &structures[0];
    let date = &strings[usize::from(bios[4]) - 1];
    assert!(date.rsplit('/').next().unwrap().parse::<u32>().unwrap() >= 2015, "{date}");
    assert_eq!(bios[0x13 - 4] & 0x10, 0x10, "byte 0x13, bit 4: virtual machine");
    assert_eq!(structures[2].1[1], 1, "chassis type: other, no notebook");
}

#[test]
fn what_the_operator_says_is_what_the_guest_reads() {
    let text = |s: &str| Some(s.to_owned());
    let identity = SystemIdentity {
        manufacturer: text("ACME"),
        product_name: text("Toaster"),
        version: text("2"),
        serial_number: text("S1"),
        uuid: Some(*b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff"),
        sku_number: text("K"),
        family: text("F"),
        chassis_asset_tag: text("A7"),
        chassis_type: Some(10),
        oem_strings: vec!["one".to_owned(), String::new(), "three".to_owned()],
    };
    let structures = parse(&build(&identity, 0xf_0000).unwrap());
    let (_, system, strings) = &structures[1];
    assert_eq!(strings, &["ACME", "Toaster", "2", "S1", "K", "F"]);
    assert_eq!(system[..4], [1, 2, 3, 4]);
    assert_eq!(&system[4..20], b"\x33\x22\x11\x00\x55\x44\x77\x66\x88\x99\xaa\xbb\xcc\xdd\xee\xff");
    assert_eq!((structures[2].1[1], &structures[2].2[..]), (10, &["ACME".to_owned(), "A7".to_owned()][..]));
    let (kind, formatted, strings) = &structures[3];
    assert_eq!((*kind, formatted.as_slice(), strings.len()), (11, &[3_u8][..], 3));
    assert_eq!(strings[2], "three");
}

#[test]
fn strings_and_addresses_that_cannot_work_are_refused() {
    let nul = SystemIdentity { family: Some("a\0b".to_owned()), ..SystemIdentity::default() };
    assert_eq!(build(&nul, 0xf_0000), Err(SmbiosError::NulInString("a\0b".to_owned())));
    let many = SystemIdentity { oem_strings: vec!["x".to_owned(); 256], ..SystemIdentity::default() };
    assert_eq!(build(&many, 0xf_0000), Err(SmbiosError::TooManyStrings(256)));
    for address in [0xe_fff0, 0xf_0008, 0x10_0000] {
        assert_eq!(build(&SystemIdentity::default(), address), Err(SmbiosError::Address(address)));
    }
}
