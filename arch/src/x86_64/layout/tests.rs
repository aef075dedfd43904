//! Tests of the guest memory map.

use super::*;

const GIB: u64 = 1 << 30;

fn map(size: u64) -> MemoryMap {
    MemoryMap::new(size, 46).unwrap()
}

fn ram_in_entries(map: &MemoryMap) -> u64 {
    map.entries().iter().filter(|e| e.kind == RangeKind::Ram).map(|e| e.range.len).sum()
}

/// What the guest cannot use of its first MiB: from the EBDA to 1 MiB.
const LOST_BELOW_1_MIB: u64 = 0x10_0000 - 0x9_fc00;

#[test]
fn a_small_guest_has_one_ram_range_up_to_its_size() {
    for size in [64 * MIB, 256 * MIB, 3 * GIB] {
        let map = map(size);
        assert_eq!(map.ram(), [AddressRange::new(GuestAddress(0), size)]);
        assert_eq!(map.low_ram_end(), GuestAddress(size));
        assert_eq!(ram_in_entries(&map), size - LOST_BELOW_1_MIB);
    }
}

#[test]
fn ram_beyond_3_gib_goes_on_at_4_gib() {
    let map = map(6 * GIB);
    assert_eq!(
        map.ram(),
        [AddressRange::new(GuestAddress(0), 3 * GIB), AddressRange::new(GuestAddress(4 * GIB), 3 * GIB)]
    );
    assert_eq!(ram_in_entries(&map), 6 * GIB - LOST_BELOW_1_MIB);
}

#[test]
fn entries_ascend_without_overlap_at_every_size() {
    for size in [64 * MIB, 256 * MIB, 3 * GIB, 6 * GIB] {
        let mut map = map(size);
        for tables in [0x1000, MIB] {
            map.place_tables(tables).unwrap();
            let entries = map.entries();
            for pair in entries.windows(2) {
                assert!(pair[0].range.end() <= pair[1].range.start, "{pair:?} overlap at {size}");
            }
            assert!(entries.iter().all(|e| !e.range.is_empty()));
        }
    }
}

#[test]
fn devices_overlap_neither_each_other_nor_ram() {
    for (size, bits) in [(64 * MIB, 36), (6 * GIB, 36), (6 * GIB, 40), (6 * GIB, 46), (2048 * GIB, 46)] {
        let map = MemoryMap::new(size, bits).unwrap();
        let mut all = vec![
            map.mmio32(),
            map.mmio64(),
            PCI_ECAM,
            IOAPIC,
            POWER_NOTIFICATION,
            EVENT_DEVICE,
            PROCESSORS,
            RESET_REGISTER,
            MEMORY_SLOTS,
            LOCAL_APIC,
            KVM_PRIVATE,
            HYPERTRANSPORT,
        ];
        if bits == 36 {
            // HyperTransport lies outside this guest's address space.
            all.pop();
        }
        all.extend(map.ram());
        for (i, a) in all.iter().enumerate() {
            for b in &all[i + 1..] {
                assert!(!a.overlaps(b), "{a:x?} overlaps {b:x?} with {bits} bits");
            }
        }
    }
}

#[test]
fn the_64_bit_window_is_the_upper_half_of_the_address_space() {
    assert_eq!(map(GIB).mmio64(), AddressRange::new(GuestAddress(1 << 45), 1 << 45));
    let window = MemoryMap::new(GIB, 40).unwrap().mmio64();
    assert_eq!((window.start.0, window.end().0), (1 << 39, 0xfd_0000_0000));
}

#[test]
fn ram_steps_over_hypertransport() {
    let map = map(2048 * GIB);
    assert_eq!(map.ram().len(), 3);
    assert_eq!(map.ram()[1].end(), HYPERTRANSPORT.start);
    assert_eq!(map.ram()[2].start, HYPERTRANSPORT.end());
    assert_eq!(map.ram().iter().map(|r| r.len).sum::<u64>(), 2048 * GIB);
}

#[test]
fn ram_that_reaches_the_64_bit_window_is_refused_with_the_most_that_fits() {
    let most = 31 * GIB;
    assert!(MemoryMap::new(most, 36).is_ok());
    assert_eq!(
        MemoryMap::new(most + PAGE, 36),
        Err(LayoutError::TooLarge { size: most + PAGE, phys_bits: 36, max: most })
    );
}

#[test]
fn too_little_or_odd_sized_ram_is_refused() {
    assert_eq!(MemoryMap::new(MIN_RAM - PAGE, 46), Err(LayoutError::TooSmall { size: MIN_RAM - PAGE }));
    assert_eq!(MemoryMap::new(MIN_RAM + 1, 46), Err(LayoutError::NotPages { size: MIN_RAM + 1 }));
    assert_eq!(MemoryMap::new(MIN_RAM, 64), Err(LayoutError::PhysBits { phys_bits: 64 }));
}

#[test]
fn tables_that_do_not_fit_below_1_mib_go_to_the_top_of_low_ram() {
    let mut map = map(256 * MIB);
    assert_eq!(map.place_tables(LOW_TABLES_SIZE), Ok(RSDP));
    let start = map.place_tables(LOW_TABLES_SIZE + 1).unwrap();
    assert_eq!(start, GuestAddress(256 * MIB - LOW_TABLES_SIZE - PAGE));
    assert_eq!(map.low_ram_end(), start);
    let tables = map.entries().into_iter().find(|e| e.kind == RangeKind::AcpiData).unwrap();
    assert_eq!(tables.range, AddressRange::between(start, GuestAddress(256 * MIB)));
    assert_eq!(map.place_tables(65 * MIB), Err(LayoutError::Tables { size: 65 * MIB }));
}

#[test]
fn a_lowered_window_starts_behind_ram_and_reaches_neither_it_nor_hypertransport() {
    for (size, bits) in [(64 * MIB, 36), (6 * GIB, 36), (6 * GIB, 40), (6 * GIB, 46), (2048 * GIB, 46)] {
        let mut map = MemoryMap::new(size, bits).unwrap();
        let upper_half = map.mmio64();
        map.lower_mmio64();
        let window = map.mmio64();
        let ram_end = map.ram().last().unwrap().end().max(HIGH_RAM);
        assert!((0..GIB).contains(&(window.start.0 - ram_end.0)), "{size} bytes, {bits} bits: {window:?}");
        assert!(!window.overlaps(&HYPERTRANSPORT) && window.len >= upper_half.len.min(512 * GIB));
    }
    // The last address below HyperTransport is RAM: the window is behind what that takes.
    let mut map = MemoryMap::new(HYPERTRANSPORT.start.0 - GIB, 46).unwrap();
    map.lower_mmio64();
    assert_eq!(map.mmio64().start, HYPERTRANSPORT.end());
}

#[test]
fn persistent_memory_lies_above_all_ram_and_beside_the_windows() {
    for (size, bits) in [(64 * MIB, 36), (6 * GIB, 36), (6 * GIB, 46), (2048 * GIB, 46)] {
        for lowered in [false, true] {
            let mut map = MemoryMap::new(size, bits).unwrap();
            let added = map.reserve_hotplug(2 * GIB, 0).unwrap();
            if lowered {
                map.lower_mmio64();
            }
            let range = map.persistent();
            assert!(range.len >= 8 * GIB && range.start.0.is_multiple_of(GIB), "{range:?}");
            assert!(range.start >= added.end() && range.end().0 <= 1 << bits, "{range:?}");
            assert!(!range.overlaps(&map.mmio64()) && !range.overlaps(&HYPERTRANSPORT), "{range:?}");
            // As far as Linux reaches (RANDOMIZE_MEMORY_PHYSICAL_PADDING).
            assert!(range.start.0 < added.end().0 + (10 << 40), "{range:?}");
        }
    }
}

#[test]
fn memory_to_be_added_lies_above_all_ram_in_whole_aligned_blocks() {
    let mut small = map(GIB);
    let first = small.reserve_hotplug(GIB, 4096).unwrap();
    assert_eq!(first, AddressRange::new(HIGH_RAM, GIB));
    // The next one of another zone, of an odd size and with pages of 1 GiB.
    let second = small.reserve_hotplug(5 * MIB, GIB).unwrap();
    assert_eq!(second, AddressRange::new(GuestAddress(5 * GIB), HOTPLUG_ALIGN));
    assert!(!small.entries().iter().any(|e| e.range.overlaps(&first) || e.range.overlaps(&second)));

    let mut odd = map(4 * GIB + 4096);
    let range = odd.reserve_hotplug(GIB, 4096).unwrap();
    assert_eq!(range.start.0, 5 * GIB + HOTPLUG_ALIGN);
}

#[test]
fn memory_to_be_added_steps_over_hypertransport_and_stops_at_the_64_bit_window() {
    let mut wide = map(GIB);
    let range = wide.reserve_hotplug(2048 * GIB, 4096).unwrap();
    assert_eq!(range.start, HYPERTRANSPORT.end());

    let mut narrow = MemoryMap::new(GIB, 36).unwrap();
    assert!(narrow.reserve_hotplug(28 * GIB, 4096).is_ok());
    let refused = LayoutError::NoRoomToGrow { size: MIB, limit: 32 * GIB };
    assert_eq!(narrow.reserve_hotplug(MIB, 4096), Err(refused));
    assert!(narrow.reserve_hotplug(u64::MAX, 4096).is_err());
}
