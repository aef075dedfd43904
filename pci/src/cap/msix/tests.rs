//! Tests of the MSI-X model.

use super::*;
use crate::cap::vectors::fake::FakeAllocator;

const LAYOUT: MsixLayout =
    MsixLayout { vectors: 3, table_bar: 1, table_offset: 0x2000, pba_bar: 1, pba_offset: 0x3000 };

const ENABLED: [u8; 1] = [0x80];
const ENABLED_MASKED: [u8; 1] = [0xc0];

fn msix() -> MsixCapability {
    MsixCapability::new(LAYOUT).unwrap()
}

fn message(vector: u64) -> MsiMessage {
    MsiMessage { address: 0xfee0_0000 + vector * 0x1000, data: 0x40 }
}

/// Programs a vector's message and mask bit as Linux does.
fn program(msix: &mut MsixCapability, vector: u64, masked: bool) -> Changes {
    let base = vector * ENTRY_LEN;
    assert!(msix.table_write(base, &message(vector).address.to_le_bytes()).is_empty());
    assert!(msix.table_write(base + 8, &message(vector).data.to_le_bytes()).is_empty());
    msix.table_write(base + 12, &u32::from(masked).to_le_bytes())
}

#[test]
fn a_layout_survives_the_way_through_the_capability() {
    let mut bytes = [0; 12];
    msix().read(0, &mut bytes);
    assert_eq!(bytes, [0, 0, 2, 0, 1, 0x20, 0, 0, 1, 0x30, 0, 0]);
    assert_eq!(MsixLayout::parse(&bytes), Ok(LAYOUT));
    assert_eq!(LAYOUT.table(), 0x2000..0x2030);
    assert_eq!(LAYOUT.pba(), 0x3000..0x3008);
    assert_eq!(LAYOUT.region(1, 0x202f), Some(MsixRegion::Table(0x2f)));
    assert_eq!(LAYOUT.region(1, 0x3007), Some(MsixRegion::Pba(7)));
    for (bar, offset) in [(1, 0x1fff), (1, 0x2030), (1, 0x3008), (0, 0x2000), (1, u64::MAX)] {
        assert_eq!(LAYOUT.region(bar, offset), None);
    }
}

#[test]
fn impossible_layouts_are_refused() {
    for (layout, error) in [
        (MsixLayout { vectors: 0, ..LAYOUT }, MsixLayoutError::Vectors(0)),
        (MsixLayout { vectors: 2049, ..LAYOUT }, MsixLayoutError::Vectors(2049)),
        (MsixLayout { pba_bar: 6, ..LAYOUT }, MsixLayoutError::Bar(6)),
        (MsixLayout { table_offset: 4, ..LAYOUT }, MsixLayoutError::Offset(4)),
    ] {
        assert_eq!(MsixCapability::new(layout).unwrap_err(), error);
    }
    assert_eq!(MsixLayout::parse(&[0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]), Err(MsixLayoutError::Bar(7)));
}

#[test]
fn a_vector_is_delivered_only_while_enabled_and_neither_function_nor_vector_is_masked() {
    let mut msix = msix();
    assert!(program(&mut msix, 1, false).is_empty(), "MSI-X is not enabled yet");
    assert_eq!(msix.write(3, &ENABLED_MASKED), Changes { enabled: Some(true), vectors: vec![] });
    let delivered = vec![VectorChange { vector: 1, message: Some(message(1)) }];
    assert_eq!(msix.write(3, &ENABLED), Changes { enabled: None, vectors: delivered });
    assert_eq!(msix.message(1), Some(message(1)));
    let held = vec![VectorChange { vector: 1, message: None }];
    assert_eq!(msix.table_write(28, &[1]).vectors, held);
    assert_eq!(msix.table_write(28, &[1]).vectors, []);
    assert_eq!(msix.table_write(28, &[0]).vectors[0].message, Some(message(1)));
    assert_eq!(msix.write(3, &ENABLED_MASKED), Changes { enabled: None, vectors: held.clone() });
    assert_eq!(msix.write(3, &ENABLED).vectors.len(), 1);
    assert_eq!(msix.write(2, &[0, 0]), Changes { enabled: Some(false), vectors: held });
}

#[test]
fn a_message_changed_while_unmasked_is_reported() {
    let mut msix = msix();
    let _ = msix.write(3, &ENABLED);
    let _ = program(&mut msix, 0, false);
    let changes = msix.table_write(8, &[0x99]);
    assert_eq!(changes.vectors[0].message, Some(MsiMessage { data: 0x99, ..message(0) }));
}

#[test]
fn the_table_takes_every_naturally_aligned_size_and_nothing_else() {
    let mut msix = msix();
    let _ = msix.table_write(0, &[0xff; 8]);
    let _ = msix.table_write(8, &[0xff; 8]);
    let mut entry = [0; 8];
    msix.table_read(0, &mut entry);
    assert_eq!(entry, [0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    msix.table_read(8, &mut entry);
    assert_eq!(entry, [0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0], "reserved bits of Vector Control read zero");
    let _ = msix.table_write(9, &[0x12]);
    let _ = msix.table_write(10, &[0x34, 0x56]);
    let mut data = [0; 4];
    msix.table_read(8, &mut data);
    assert_eq!(data, [0xff, 0x12, 0x34, 0x56]);
    for (offset, len) in [(9, 2), (4, 8), (0, 3), (0, 16), (0, 0), (2, 4)] {
        let before = msix.table.clone();
        assert!(msix.table_write(offset, &vec![0; len]).is_empty());
        assert_eq!(msix.table, before, "offset {offset} length {len}");
        let mut data = vec![0; len];
        msix.table_read(offset, &mut data);
        assert!(data.iter().all(|&byte| byte == 0xff));
    }
}

#[test]
fn accesses_past_the_end_of_table_and_pending_bits_read_all_ones() {
    let mut msix = msix();
    for offset in [48, 0x1000, u64::MAX - 7, !0xf] {
        let mut data = [0; 8];
        msix.table_read(offset, &mut data);
        assert_eq!(data, [0xff; 8]);
        assert!(msix.table_write(offset, &data).is_empty());
        data.fill(0);
        msix.pba_read(offset, &mut data);
        assert_eq!(data, [0xff; 8]);
    }
}

#[test]
fn pending_bits_read_by_any_aligned_size() {
    let mut msix = MsixCapability::new(MsixLayout { vectors: 70, ..LAYOUT }).unwrap();
    msix.set_pending(9, true);
    msix.set_pending(69, true);
    msix.set_pending(70, true);
    msix.set_pending(u16::MAX, true);
    let mut data = [0; 8];
    msix.pba_read(0, &mut data);
    assert_eq!(u64::from_le_bytes(data), 1 << 9);
    msix.pba_read(8, &mut data);
    assert_eq!(u64::from_le_bytes(data), 1 << 5);
    let mut byte = [0; 1];
    msix.pba_read(1, &mut byte);
    assert_eq!(byte, [2]);
    let mut odd = [0; 4];
    msix.pba_read(2, &mut odd);
    assert_eq!(odd, [0xff; 4]);
    msix.set_pending(9, false);
    msix.pba_read(0, &mut data);
    assert_eq!(data, [0; 8]);
}

#[test]
fn pending_bits_behind_the_end_of_everything_read_all_ones() {
    let mut msix = MsixVectors::new(msix(), FakeAllocator::new());
    for offset in [u64::MAX - 7, 1 << 61, 0x2000_0000_0000_0000 + 8] {
        let mut data = [0; 8];
        msix.pba_read(offset, &mut data);
        assert_eq!(data, [0xff; 8], "{offset:#x}");
    }
}

#[test]
fn capability_writes_that_span_fields_touch_only_enable_and_function_mask() {
    let mut msix = msix();
    assert_eq!(msix.write(0, &[0xff; 12]).enabled, Some(true));
    assert!(msix.is_function_masked());
    let mut bytes = [0xaa; 16];
    msix.read(0, &mut bytes);
    assert_eq!(bytes[..8], [0xaa, 0xaa, 2, 0xc0, 1, 0x20, 0, 0]);
    assert_eq!(bytes[12..], [0xaa; 4]);
    for (offset, len) in [(0, 3), (4, 8), (u16::MAX, 4), (3, 0)] {
        assert!(msix.write(offset, &vec![0; len]).is_empty());
    }
    assert!(msix.is_enabled());
}

#[test]
fn vectors_follow_the_registers_and_masked_signals_wait() {
    let allocator = FakeAllocator::new();
    let mut msix = MsixVectors::new(msix(), allocator.clone());
    let _ = msix.table_write(0, &message(0).address.to_le_bytes());
    let _ = msix.write(3, &ENABLED);
    assert_eq!(allocator.allocated(), 0, "nothing is unmasked yet");
    msix.signal(0);
    msix.signal(3);
    let mut pending = [0; 8];
    msix.pba_read(0, &mut pending);
    assert_eq!(u64::from_le_bytes(pending), 1);
    assert_eq!(msix.table_write(12, &[0]).allocated, [0]);
    assert_eq!(allocator.vector(0).signals(), 1);
    msix.pba_read(0, &mut pending);
    assert_eq!(pending, [0; 8]);
    let _ = msix.table_write(12, &[1]);
    msix.signal(0);
    msix.pba_read(0, &mut pending);
    assert_eq!(u64::from_le_bytes(pending), 1);
    assert_eq!(msix.reset().enabled, Some(false));
    assert_eq!(allocator.live(), 0);
    assert_eq!(msix.vectors().iter().count(), 0);
}
