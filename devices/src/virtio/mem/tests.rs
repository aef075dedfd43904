//! The device with a driver that keeps to the rules or does not.

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestRegionMmap, MmapRegion};

use super::super::Memory;
use super::super::testing::{DriverQueue, Interrupts, activation, forms, memory};
use super::blocks::BLOCK_MIN;
use super::*;

const DATA: u64 = 0x20_0000;
const ANSWER_AT: u64 = DATA + 0x100;
const START: u64 = 1 << 32;
const BLOCKS: u64 = 64;

fn device(requested: u64) -> Mem {
    let mapping = MmapRegion::new(usize::try_from(BLOCKS * BLOCK_MIN).unwrap()).unwrap();
    let region = Arc::new(GuestRegionMmap::new(mapping, GuestAddress(START)).unwrap());
    Mem::new("mem0", 3, Blocks::new(region, 4096, false), requested)
}

struct Driver {
    memory: Memory,
    queues: Vec<DriverQueue>,
}

impl Driver {
    /// Sends a request; the answer, and the state where that was asked for.
    fn ask(&mut self, kind: u16, block: u64, count: u16) -> (u16, u16) {
        self.ask_at(kind, START + block * BLOCK_MIN, count)
    }

    fn ask_at(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        let view = self.memory.memory();
        let mut request = [0; REQUEST];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        view.write_slice(&request, GuestAddress(DATA)).unwrap();
        view.write_slice(&[0xff; 10], GuestAddress(ANSWER_AT)).unwrap();
        self.queues[0].add(&[(DATA, 24, false), (ANSWER_AT, 10, true)]);
        self.queues[0].ring();
        assert_eq!(self.queues[0].wait_used().map(|used| used.1), Some(10));
        let field = |at| u16::from_le(view.read_obj(GuestAddress(ANSWER_AT + at)).unwrap());
        (field(0), field(8))
    }
}

fn config(device: &Mem) -> [u64; 7] {
    let mut bytes = [0; 60];
    device.read_config(0, &mut bytes);
    assert_eq!(bytes[56..], [0; 4], "nothing behind it");
    std::array::from_fn(|field| u64::from_le_bytes(bytes[field * 8..field * 8 + 8].try_into().unwrap()))
}

#[test]
fn requests_change_what_is_plugged_and_wrong_ones_are_refused() {
    for features in forms() {
        let device = device(8 * BLOCK_MIN);
        let memory = memory();
        let interrupts = Arc::new(Interrupts::default());
        let queues = vec![DriverQueue::new(&memory, 0x10_0000, 16, features)];
        let _active = device.activate(activation(&memory, F_RINGS, &queues, &interrupts)).unwrap();
        let mut driver = Driver { memory, queues };
        assert_eq!(driver.ask(PLUG, 0, 4).0, ACK);
        assert_eq!(driver.ask(PLUG, 10, 4).0, ACK);
        assert_eq!(device.blocks().plugged_size(), 8 * BLOCK_MIN);
        // More than is asked for.
        assert_eq!(driver.ask(PLUG, 20, 1).0, NACK);
        device.resize(12 * BLOCK_MIN).unwrap();
        // Part of it is there.
        assert_eq!(driver.ask(PLUG, 3, 2).0, ERROR);
        assert_eq!(driver.ask(UNPLUG, 3, 2).0, ERROR);
        assert_eq!(
            [driver.ask(STATE, 0, 4), driver.ask(STATE, 4, 6), driver.ask(STATE, 3, 2)],
            [(ACK, 0), (ACK, 1), (ACK, 2)]
        );
        for (address, count) in [
            (START + 1, 1),
            (START - BLOCK_MIN, 1),
            (START, 0),
            (START + BLOCKS * BLOCK_MIN, 1),
            (u64::MAX, 9),
        ] {
            for kind in [PLUG, UNPLUG, STATE] {
                assert_eq!(driver.ask_at(kind, address, count).0, ERROR, "{kind} {address:#x} {count}");
            }
        }
        assert_eq!(driver.ask(4, 0, 1).0, ERROR);
        assert_eq!(driver.ask(UNPLUG, 0, 3).0, ACK);
        assert_eq!(config(&device)[5], 5 * BLOCK_MIN);
        assert_eq!(driver.ask_at(UNPLUG_ALL, 0, 0).0, ACK);
        assert_eq!(device.blocks().plugged_size(), 0);
        assert!(interrupts.seen().stopped.is_empty());
        driver.queues[0].add(&[(DATA, 23, false), (ANSWER_AT, 10, true)]);
        driver.memory.memory().write_obj(0_u16, GuestAddress(DATA)).unwrap();
        driver.queues[0].ring();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while interrupts.seen().stopped.is_empty() && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(interrupts.seen().stopped[0].contains("a request of 23 bytes"));
    }
}

#[test]
fn a_new_size_is_told_to_the_driver_and_one_beyond_the_region_is_refused() {
    let device = device(3 * BLOCK_MIN - 5);
    let size = BLOCKS * BLOCK_MIN;
    assert_eq!(config(&device), [BLOCK_MIN, 3, START, size, size, 0, 3 * BLOCK_MIN]);
    let memory = memory();
    let interrupts = Arc::new(Interrupts::default());
    let queues = vec![DriverQueue::new(&memory, 0x10_0000, 16, forms()[0])];
    let _active = device.activate(activation(&memory, F_RINGS, &queues, &interrupts)).unwrap();
    device.resize(size).unwrap();
    assert_eq!((config(&device)[6], interrupts.seen().config), (size, 1));
    for too_much in [size + 1, u64::MAX] {
        assert!(device.resize(too_much).unwrap_err().contains("hotplug_size"));
    }
    assert_eq!((config(&device)[6], interrupts.seen().config), (size, 1));
}

#[test]
fn what_is_plugged_outlives_a_reset_of_the_device_and_goes_elsewhere_with_it() {
    let device = device(8 * BLOCK_MIN);
    let interrupts = Arc::new(Interrupts::default());
    for round in 0..2 {
        let memory = memory();
        let queues = vec![DriverQueue::new(&memory, 0x10_0000, 16, forms()[0])];
        let active = device.activate(activation(&memory, F_RINGS, &queues, &interrupts)).unwrap();
        let mut driver = Driver { memory, queues };
        assert_eq!(driver.ask(PLUG, round * 4, 2).0, ACK);
        drop(active);
    }
    let saved = device.save().unwrap();
    let other = self::device(0);
    other.restore(&saved).unwrap();
    assert_eq!((other.blocks().runs(), config(&other)[6]), (vec![(0, 2), (4, 2)], 8 * BLOCK_MIN));
    for wrong in [
        r#"{"requested": 1, "plugged": [[63, 2]]}"#,
        r#"{"requested": 1, "plugged": [[0, 2], [1, 1]]}"#,
        "{}",
    ] {
        assert!(other.restore(&serde_json::from_str(wrong).unwrap()).is_err(), "{wrong}");
    }
}
