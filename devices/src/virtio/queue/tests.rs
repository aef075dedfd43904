//! Both forms of ring, driven by a driver of the test's own.

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::super::testing::{DriverQueue, Interrupts, Part, forms, memory};
use super::*;

const BASE: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;

fn pair(size: u16, features: RingFeatures) -> (Memory, DriverQueue, ActiveQueue, Arc<Interrupts>) {
    let memory = memory();
    let interrupts = Arc::new(Interrupts::default());
    let driver = DriverQueue::new(&memory, BASE, size, features);
    let device = driver.device_side(0, Arc::clone(&interrupts) as _).unwrap();
    (memory, driver, device, interrupts)
}

/// Gives every chain back with its own number as the count of bytes written.
fn echo(device: &mut ActiveQueue) -> Result<Vec<u16>, RingError> {
    let mut seen = Vec::new();
    device.serve::<RingError>(|_, chain| {
        seen.push(chain.id());
        let id = u32::from(chain.id());
        Ok(Served::Done(chain, id))
    })?;
    Ok(seen)
}

#[test]
fn chains_come_in_order_and_go_back_many_times_around_the_ring() {
    for features in forms() {
        let (_, mut driver, mut device, interrupts) = pair(8, features);
        for round in 0..100 {
            let parts: Vec<Part> = (0..=round % 3).map(|n| (DATA + n * 16, 8, n == 2)).collect();
            let ids = [driver.add(&parts), driver.add(&parts[..1])];
            assert_eq!(echo(&mut device).unwrap(), ids, "{features:?} round {round}");
            for id in ids {
                assert_eq!(driver.used(), Some((id, id.into())), "{features:?} round {round}");
            }
            assert_eq!(driver.used(), None);
        }
        assert!(!interrupts.seen().queues.is_empty(), "{features:?}");
    }
}

#[test]
fn chains_can_go_back_in_another_order_than_they_came() {
    for features in forms() {
        let (memory, mut driver, mut device, _) = pair(16, features);
        for _ in 0..20 {
            let ids: Vec<u16> = (1..=4).map(|len| driver.add(&vec![(DATA, 4, true); len])).collect();
            let view = memory.memory();
            let mut chains: Vec<_> = ids.iter().map(|_| device.pop(&view).unwrap().unwrap()).collect();
            assert!(device.pop(&view).unwrap().is_none());
            while let Some(chain) = chains.pop() {
                device.push(&view, chain, 7).unwrap();
            }
            let back: Vec<u16> = ids.iter().filter_map(|_| driver.used()).map(|(id, _)| id).collect();
            assert_eq!(back, ids.into_iter().rev().collect::<Vec<_>>(), "{features:?}");
        }
    }
}

#[test]
fn a_chain_that_is_put_back_is_taken_again() {
    for features in forms() {
        let (memory, mut driver, mut device, _) = pair(4, features);
        for _ in 0..9 {
            let id = driver.add(&[(DATA, 4, true), (DATA, 4, true), (DATA, 4, true)]);
            let view = memory.memory();
            for _ in 0..2 {
                let chain = device.pop(&view).unwrap().unwrap();
                device.undo_pop(chain);
            }
            assert_eq!(echo(&mut device).unwrap(), [id], "{features:?}");
            assert!(driver.used().is_some());
        }
    }
}

#[test]
fn a_ring_goes_on_elsewhere_from_its_position() {
    for features in forms() {
        let (memory, mut driver, mut device, interrupts) = pair(8, features);
        for round in 0..30 {
            let id = driver.add(&[(DATA, 4, false), (DATA, 4, true), (DATA, 4, true)]);
            let position = device.shared_position().get();
            let ring = Ring::new(&driver.layout, features, position, &memory.memory()).unwrap();
            device = ActiveQueue::new(
                0,
                ring,
                driver.layout,
                memory.clone(),
                Arc::clone(&driver.kick),
                Arc::clone(&interrupts) as _,
                SharedPosition::new(position),
            );
            assert_eq!(echo(&mut device).unwrap(), [id], "{features:?} round {round}");
            assert_eq!(driver.used(), Some((id, id.into())), "{features:?} round {round}");
        }
    }
}

#[test]
fn indirect_tables_are_followed_once_and_only_if_negotiated() {
    for mut features in forms() {
        let (memory, mut driver, mut device, _) = pair(8, features);
        let view = memory.memory();
        let table = DATA + 0x1000;
        let entry = |at: u64, address: u64, len: u32, flags: u16, next: u16| {
            let bytes = [&address.to_le_bytes()[..], &len.to_le_bytes()].concat();
            view.write_slice(&bytes, GuestAddress(table + at * 16)).unwrap();
            // A packed table has the buffer's ID and then flags.
            let last = if features.packed { [0, flags & 2] } else { [flags, next] };
            view.write_obj(last, GuestAddress(table + at * 16 + 12)).unwrap();
        };
        entry(0, DATA, 5, 1, 1);
        entry(1, DATA + 64, 6, 3, 2);
        entry(2, DATA + 128, 7, 2, 0);
        let indirect = |driver: &mut DriverQueue, len| {
            let before = driver.add(&[(table, len, false)]);
            let at = driver.layout.descriptors + u64::from(place(driver, before)) * 16 + 12;
            let at = GuestAddress(if features.packed { at + 2 } else { at });
            let flags: u16 = view.read_obj(at).unwrap();
            view.write_obj(flags | 4, at).unwrap();
        };
        indirect(&mut driver, 48);
        let chain = device.pop(&view).unwrap().unwrap();
        assert_eq!((chain.readable_len(), chain.writable_len()), (5, 13), "{features:?}");
        device.push(&view, chain, 0).unwrap();
        for len in [0, 8, 47] {
            let (_, mut driver, mut device, _) = again(&memory, features);
            indirect(&mut driver, len);
            assert_eq!(device.pop(&view).unwrap_err(), RingError::Indirect(len), "{features:?}");
        }
        features.indirect = false;
        let (_, mut driver, mut device, _) = again(&memory, features);
        indirect(&mut driver, 48);
        assert_eq!(device.pop(&view).unwrap_err(), RingError::Indirect(48), "{features:?}");
    }
}

/// Where in the table the only chain of a fresh or once used queue has its first descriptor.
fn place(driver: &DriverQueue, id: u16) -> u16 {
    if driver.features.packed { 0 } else { id }
}

fn again(memory: &Memory, features: RingFeatures) -> (Memory, DriverQueue, ActiveQueue, Arc<Interrupts>) {
    memory.memory().write_slice(&[0; 0x8000], GuestAddress(BASE)).unwrap();
    let interrupts = Arc::new(Interrupts::default());
    let driver = DriverQueue::new(memory, BASE, 8, features);
    let device = driver.device_side(0, Arc::clone(&interrupts) as _).unwrap();
    (memory.clone(), driver, device, interrupts)
}

#[test]
fn what_a_driver_must_not_put_into_a_ring_is_told_by_name() {
    let split = RingFeatures { event_idx: true, indirect: true, packed: false };
    let descriptor = |memory: &Memory, place: u64, address: u64, flags: u16, next: u16| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8] = 4;
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        memory.memory().write_slice(&bytes, GuestAddress(BASE + place * 16)).unwrap();
    };
    let error = |act: &dyn Fn(&Memory, &mut DriverQueue)| {
        let (memory, mut driver, mut device, _) = pair(8, split);
        act(&memory, &mut driver);
        let mut held = Vec::new();
        loop {
            match device.pop(&memory.memory()) {
                Ok(Some(chain)) => held.push(chain),
                Ok(None) => panic!("nothing wrong was found"),
                Err(e) => break e,
            }
        }
    };
    assert_eq!(error(&|_, d| d.set_available_index(9)), RingError::Jump { from: 0, to: 9, size: 8 });
    assert_eq!(
        error(&|_, d| d.set_available_index(0xffff)),
        RingError::Jump { from: 0, to: 0xffff, size: 8 }
    );
    assert_eq!(error(&|_, d| d.make_available(8)), RingError::Index { index: 8, size: 8 });
    let loops = error(&|memory, d| {
        descriptor(memory, 0, DATA, 1, 1);
        descriptor(memory, 1, DATA, 1, 0);
        d.make_available(0);
    });
    assert_eq!(loops, RingError::TooLong(8));
    let beyond = error(&|memory, d| {
        descriptor(memory, 0, DATA, 1, 200);
        d.make_available(0);
    });
    assert_eq!(beyond, RingError::Index { index: 200, size: 8 });
    let twice = error(&|memory, d| {
        descriptor(memory, 3, DATA, 0, 0);
        d.make_available(3);
        d.make_available(3);
    });
    assert_eq!(twice, RingError::InUse(3));
    // The hole, the end of memory, the end of the address space.
    for address in [0x80_0000 - 2, 0x90_0000, 0x100_0000 - 1, u64::MAX - 1] {
        let outside = error(&|memory, d| {
            descriptor(memory, 0, address, 2, 0);
            d.make_available(0);
        });
        assert_eq!(outside, RingError::Outside { what: "buffer", address, len: 4 });
    }
}

#[test]
fn a_chain_that_is_available_twice_at_once_is_wrong_even_if_the_first_is_back_by_then() {
    let split = RingFeatures { event_idx: false, indirect: false, packed: false };
    let (_, mut driver, mut device, _) = pair(8, split);
    let first = driver.add(&[(DATA, 4, true)]);
    driver.make_available(first);
    assert_eq!(echo(&mut device).unwrap_err(), RingError::InUse(first));
    // One after the other is how every driver does it, and what was put back is no second time.
    let (memory, mut driver, mut device, _) = pair(8, split);
    for _ in 0..20 {
        let id = driver.add(&[(DATA, 4, true)]);
        let chain = device.pop(&memory.memory()).unwrap().unwrap();
        device.undo_pop(chain);
        assert_eq!(echo(&mut device).unwrap(), [id]);
        assert_eq!(driver.used(), Some((id, id.into())));
    }
}

#[test]
fn a_look_at_a_ring_takes_nothing_and_finds_what_is_wrong() {
    for features in forms() {
        let (memory, mut driver, mut device, _) = pair(8, features);
        let view = memory.memory();
        device.look(&view).unwrap();
        let id = driver.add(&[(DATA, 4, true)]);
        let more = driver.add(&[(DATA, 4, true); 2]);
        device.look(&view).unwrap();
        device.look(&view).unwrap();
        assert_eq!(echo(&mut device).unwrap(), [id, more], "{features:?}");
        driver.add(&[(0x90_0000, 4, true)]);
        assert!(matches!(device.look(&view), Err(RingError::Outside { .. })), "{features:?}");
    }
}

#[test]
fn what_a_driver_must_not_put_into_a_packed_ring_is_told_by_name() {
    let packed = RingFeatures { event_idx: false, indirect: true, packed: true };
    let error = |descriptors: &[(u64, u16, u16)]| {
        let (memory, _, mut device, _) = pair(4, packed);
        for (place, (address, id, flags)) in (0_u64..).zip(descriptors) {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8] = 4;
            bytes[12..14].copy_from_slice(&id.to_le_bytes());
            bytes[14..].copy_from_slice(&flags.to_le_bytes());
            memory.memory().write_slice(&bytes, GuestAddress(BASE + place * 16)).unwrap();
        }
        let mut held = Vec::new();
        loop {
            match device.pop(&memory.memory()) {
                Ok(Some(chain)) => held.push(chain),
                Ok(None) => panic!("nothing wrong was found"),
                Err(e) => break e,
            }
        }
    };
    let there = 1 << 7;
    assert_eq!(error(&[(DATA, 4, there)]), RingError::Index { index: 4, size: 4 });
    assert_eq!(error(&[(DATA, 1, there), (DATA, 1, there)]), RingError::InUse(1));
    assert_eq!(error(&[(DATA, 1, there | 1), (DATA, 1, 0)]), RingError::Unfinished);
    assert_eq!(error(&[(DATA, 1, there | 1); 4]), RingError::TooLong(4));
    let outside = RingError::Outside { what: "buffer", address: 0x90_0000, len: 4 };
    assert_eq!(error(&[(0x90_0000, 1, there)]), outside);
    assert_eq!(error(&[(DATA, 1, there | 3), (DATA, 1, there)]), RingError::Order);
}

#[test]
fn a_ring_that_cannot_be_where_it_is_said_to_be_is_refused() {
    for features in forms() {
        let memory = memory();
        let good = QueueLayout { size: 8, descriptors: BASE, driver: BASE + 0x1000, device: BASE + 0x2000 };
        let made = |layout: QueueLayout| Ring::new(&layout, features, RingPosition::START, &memory.memory());
        assert!(made(good).is_ok());
        for bad in [
            QueueLayout { size: 0, ..good },
            QueueLayout { size: 0xffff, ..good },
            QueueLayout { descriptors: BASE + 8, ..good },
            QueueLayout { driver: BASE + 1, ..good },
            QueueLayout { device: BASE + 2, ..good },
            QueueLayout { descriptors: 0x80_0000 - 16, ..good },
            QueueLayout { driver: 0x90_0000, ..good },
            QueueLayout { device: u64::MAX - 3, ..good },
        ] {
            assert!(made(bad).is_err(), "{features:?} {bad:?}");
        }
    }
}

#[test]
fn a_driver_that_wants_no_interrupts_gets_none_and_one_that_waits_for_a_chain_gets_one() {
    let split = RingFeatures { event_idx: false, indirect: false, packed: false };
    let (memory, mut driver, mut device, interrupts) = pair(8, split);
    memory.memory().write_obj(1_u16, GuestAddress(driver.layout.driver)).unwrap();
    driver.add(&[(DATA, 4, true)]);
    echo(&mut device).unwrap();
    assert_eq!(interrupts.seen().queues, [0_u16; 0]);
    let at = RingFeatures { event_idx: true, ..split };
    let (memory, mut driver, mut device, interrupts) = pair(8, at);
    // The used event: tell me of the third.
    memory.memory().write_obj(2_u16, GuestAddress(driver.layout.driver + 4 + 16)).unwrap();
    for expected in [0, 0, 1] {
        driver.add(&[(DATA, 4, true)]);
        echo(&mut device).unwrap();
        assert_eq!(interrupts.seen().queues.len(), expected);
    }
    let packed = RingFeatures { packed: true, ..at };
    let (memory, mut driver, mut device, interrupts) = pair(8, packed);
    memory.memory().write_slice(&[2, 0x80, 2, 0], GuestAddress(driver.layout.driver)).unwrap();
    for expected in [0, 0, 1] {
        driver.add(&[(DATA, 4, true)]);
        echo(&mut device).unwrap();
        assert_eq!(interrupts.seen().queues.len(), expected);
    }
    memory.memory().write_slice(&[0, 0, 1, 0], GuestAddress(driver.layout.driver)).unwrap();
    driver.add(&[(DATA, 4, true)]);
    echo(&mut device).unwrap();
    assert_eq!(interrupts.seen().queues.len(), 1, "switched off");
}
