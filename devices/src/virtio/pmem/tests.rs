//! The device over a real file, and a driver that keeps to the rules or does not.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::super::testing::{DriverQueue, Interrupts, activation, forms, memory};
use super::file::tests::Scratch;
use super::*;

const DATA: u64 = 0x20_0000;

/// Room without a guest: where what comes next is to be.
#[derive(Debug, Default)]
struct Room(AtomicU64);

#[derive(Debug)]
struct Spot(u64);

impl Placed for Spot {
    fn start(&self) -> u64 {
        self.0
    }
}

impl Places for Room {
    fn place(&self, _file: &Arc<MappedFile>, at: Option<u64>) -> io::Result<Box<dyn Placed>> {
        let start = at.unwrap_or(self.0.load(Ordering::SeqCst));
        if start.is_multiple_of(4096) { Ok(Box::new(Spot(start))) } else { Err(io::Error::other("no room")) }
    }
}

fn device(scratch: &Scratch) -> Pmem {
    let file = Arc::new(MappedFile::open(&scratch.0, None, false).unwrap());
    Pmem::new("_pmem0", file, Arc::new(Room(AtomicU64::new(0x1_4000_0000)))).unwrap()
}

#[test]
fn flushes_are_answered_and_what_is_none_is_refused() {
    for (number, features) in forms().into_iter().enumerate() {
        let scratch = Scratch::new(&format!("flush{number}"), 2 << 20);
        let device = device(&scratch);
        let memory = memory();
        let interrupts = Arc::new(Interrupts::default());
        let mut queues = vec![DriverQueue::new(&memory, 0x10_0000, 16, features)];
        let _active = device.activate(activation(&memory, F_RINGS, &queues, &interrupts)).unwrap();
        let view = memory.memory();
        let mut ask = |kind: u32| {
            view.write_obj(kind.to_le(), GuestAddress(DATA)).unwrap();
            view.write_obj(u32::MAX, GuestAddress(DATA + 8)).unwrap();
            queues[0].add(&[(DATA, 4, false), (DATA + 8, 4, true)]);
            queues[0].ring();
            assert_eq!(queues[0].wait_used().map(|used| used.1), Some(4), "{features:?}");
            view.read_obj::<u32>(GuestAddress(DATA + 8)).unwrap()
        };
        assert_eq!((ask(FLUSH), ask(1), ask(u32::MAX)), (DONE, FAILED, FAILED));
        std::fs::File::options().write(true).open(&scratch.0).unwrap().set_len(4096).unwrap();
        assert_eq!(ask(FLUSH), FAILED);
        assert!(interrupts.seen().stopped.is_empty());
        queues[0].add(&[(DATA, 3, false), (DATA + 8, 4, true)]);
        queues[0].ring();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while interrupts.seen().stopped.is_empty() && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(interrupts.seen().stopped[0].contains("a request of 3 bytes"));
    }
}

#[test]
fn a_file_that_becomes_shorter_is_heard_of_without_a_request() {
    let scratch = Scratch::new("heard", 4 << 20);
    let file = Arc::new(MappedFile::open(&scratch.0, None, false).unwrap());
    let mut guard = Guard::new(&file).unwrap();
    guard.changed();
    file.flush().unwrap();
    std::fs::File::options().write(true).open(&scratch.0).unwrap().set_len(4096).unwrap();
    let mut waits = [rustix::event::PollFd::new(guard.changes(), rustix::event::PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut waits, None).unwrap(), 1);
    guard.changed();
    assert!(!file.mend(), "it has been mended");
    assert!(file.flush().is_err());
}

#[test]
fn a_file_without_holes_is_not_looked_at() {
    let (full, holes) = (Scratch::new("holes-not", 4 << 20), Scratch::new("holes", 4096));
    std::fs::File::options().write(true).open(&holes.0).unwrap().set_len(4 << 20).unwrap();
    for (scratch, looks) in [(&full, false), (&holes, true)] {
        let file = Arc::new(MappedFile::open(&scratch.0, None, false).unwrap());
        let mut guard = Guard::new(&file).unwrap();
        guard.flushed();
        assert_eq!(guard.timer().is_armed().unwrap(), looks);
    }
}

#[test]
fn the_driver_reads_where_it_is_and_it_can_be_there_again() {
    let scratch = Scratch::new("place", 2 << 20);
    let device = device(&scratch);
    let mut config = [0xff; 20];
    config[16..].fill(0);
    device.read_config(0, &mut config);
    assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), 0x1_4000_0000);
    assert_eq!(u64::from_le_bytes(config[8..16].try_into().unwrap()), 2 << 20);
    device.write_config(0, &[0; 8]);
    assert_eq!(device.save().unwrap()["start"], 0x1_4000_0000_u64);
    device.restore(&serde_json::json!({ "start": 0x1_8000_0000_u64 })).unwrap();
    assert_eq!(device.start(), 0x1_8000_0000);
    assert!(device.restore(&serde_json::json!({ "start": 1 })).unwrap_err().contains("no room"));
    assert!(device.restore(&Saved::Null).is_err());
}
