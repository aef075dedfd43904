//! Tests of the MSI model.

use super::*;
use crate::cap::vectors::fake::FakeAllocator;

fn msi(vectors: u8, address_64: bool, per_vector_mask: bool) -> MsiCapability {
    MsiCapability::new(MsiLayout { vectors, address_64, per_vector_mask }).unwrap()
}

/// Programs address 0xfee0_1000, data `0x40`, and enables `1 << exponent` vectors.
fn program(msi: &mut MsiCapability, exponent: u8) -> Changes {
    let data = if msi.layout().address_64 { 12 } else { 8 };
    assert!(msi.write(4, &0xfee0_1000u32.to_le_bytes()).is_empty());
    assert!(msi.write(data, &[0x40, 0]).is_empty());
    msi.write(2, &[1 | exponent << 4, 0])
}

#[test]
fn a_layout_survives_the_way_through_message_control() {
    for vectors in [1, 2, 4, 8, 16, 32] {
        for (address_64, per_vector_mask) in [(false, false), (false, true), (true, false), (true, true)] {
            let layout = MsiLayout { vectors, address_64, per_vector_mask };
            let mut control = [0; 2];
            MsiCapability::new(layout).unwrap().read(2, &mut control);
            assert_eq!(MsiLayout::parse(u16::from_le_bytes(control)), Ok(layout));
        }
    }
}

#[test]
fn impossible_numbers_of_vectors_are_refused() {
    for vectors in [0, 3, 64] {
        let layout = MsiLayout { vectors, address_64: false, per_vector_mask: false };
        assert_eq!(MsiCapability::new(layout).unwrap_err(), MsiLayoutError(vectors));
    }
    assert_eq!(MsiLayout::parse(6 << 1), Err(MsiLayoutError(64)));
    assert_eq!(MsiLayout::parse(7 << 1), Err(MsiLayoutError(128)));
}

#[test]
fn enabling_reports_every_allowed_vector_with_its_own_data() {
    let mut msi = msi(4, true, false);
    let changes = program(&mut msi, 1);
    let message = |data| Some(MsiMessage { address: 0xfee0_1000, data });
    assert_eq!(changes.enabled, Some(true));
    assert_eq!(
        changes.vectors,
        [
            VectorChange { vector: 0, message: message(0x40) },
            VectorChange { vector: 1, message: message(0x41) }
        ]
    );
    let changes = msi.write(2, &[0, 0]);
    assert_eq!(changes.enabled, Some(false));
    assert!(changes.vectors.iter().all(|change| change.message.is_none()));
    assert_eq!(changes.vectors.len(), 2);
}

#[test]
fn more_vectors_than_asked_for_are_never_used() {
    for exponent in 3..8 {
        let mut msi = msi(4, false, false);
        assert_eq!(program(&mut msi, exponent).vectors.len(), 4);
        assert_eq!(msi.enabled_vectors(), 4);
        assert_eq!(msi.message(4), None);
        assert_eq!(msi.message(u16::MAX), None);
    }
}

#[test]
fn a_masked_vector_is_held_back_and_shows_as_pending() {
    let allocator = FakeAllocator::new();
    let mut msi = MsiVectors::new(msi(32, true, true), allocator.clone());
    let _ = msi.write(16, &u32::MAX.to_le_bytes());
    let _ = msi.write(4, &0xfee0_1000u32.to_le_bytes());
    assert_eq!(msi.write(2, &[0x51, 0]), Applied { enabled: Some(true), allocated: vec![] });
    msi.signal(31);
    let mut pending = [0; 4];
    msi.read(20, &mut pending);
    assert_eq!(u32::from_le_bytes(pending), 1 << 31);
    assert_eq!(msi.write(16, &0x7fff_ffffu32.to_le_bytes()).allocated, [31]);
    assert_eq!(allocator.vector(0).signals(), 1);
    msi.read(20, &mut pending);
    assert_eq!(pending, [0; 4]);
    let _ = msi.write(20, &[0xff; 4]);
    msi.read(20, &mut pending);
    assert_eq!(pending, [0; 4], "pending bits are read-only");
}

#[test]
fn the_upper_address_counts_only_where_it_exists() {
    let mut long = msi(1, true, false);
    let _ = long.write(8, &[1, 0, 0, 0]);
    let _ = program(&mut long, 0);
    assert_eq!(long.message(0).unwrap().address, 0x1_fee0_1000);
    let mut short = msi(1, false, false);
    let _ = program(&mut short, 0);
    let _ = short.write(12, &[0xff; 4]);
    assert_eq!(short.message(0), Some(MsiMessage { address: 0xfee0_1000, data: 0x40 }));
}

#[test]
fn writes_that_span_fields_or_miss_the_capability_do_no_harm() {
    let mut msi = msi(1, true, false);
    let changes = msi.write(0, &[0xff; 40]);
    assert_eq!(
        changes.vectors[0].message,
        Some(MsiMessage { address: 0xffff_ffff_ffff_fffc, data: 0xfffe | 1 })
    );
    let mut all = [0xaa; 40];
    msi.read(0, &mut all);
    assert_eq!(all[..2], [0xaa; 2], "the header belongs to the list");
    assert_eq!(all[2..4], [0xf1, 0], "capabilities are read-only");
    assert_eq!(all[14..], [0xaa; 26]);
    for offset in [14, 100, u16::MAX] {
        assert!(msi.write(offset, &[0; 8]).is_empty());
    }
    assert!(msi.write(2, &[]).is_empty());
    assert!(msi.write(0, &[0]).is_empty());
}

#[test]
fn a_reset_masks_and_gives_the_vectors_back() {
    let allocator = FakeAllocator::new();
    let mut msi = MsiVectors::new(msi(1, true, false), allocator.clone());
    msi.signal(0);
    assert_eq!(msi.write(2, &[1]), Applied { enabled: Some(true), allocated: vec![0] });
    assert_eq!(allocator.vector(0).signals(), 0, "a signal before MSI was enabled is lost");
    msi.signal(7);
    assert_eq!(allocator.vector(0).signals(), 1);
    assert_eq!(msi.reset().enabled, Some(false));
    assert_eq!(allocator.live(), 0);
    assert!(!msi.capability().is_enabled());
}
