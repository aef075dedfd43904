//! Persistent memory under a driver of any kind, and a file that becomes shorter (VIRTIO 1.2, section 5.19). Each request of a driver that keeps
//! to the form is answered as the file is; one that breaks its ring stops the device at most.

#![no_main]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;

use arbitrary::Arbitrary;
use devices::virtio::Memory;
use devices::virtio::device::VirtioDevice;
use devices::virtio::pmem::{MappedFile, Placed, Places, Pmem};
use devices::virtio::ring::RingFeatures;
use devices::virtio::testing::{DriverQueue, Interrupts, activation, memory};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

const QUEUE: u64 = 0x1_0000;
const DATA: u64 = 0x20_0000;
const SIZE: u64 = 2 << 20;

#[derive(Arbitrary, Debug)]
struct Input {
    packed: bool,
    event_idx: bool,
    discard: bool,
    #[arbitrary(with = fuzz::steps::<Step, 100>)]
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// So many requests at once; those that are not flushes are of this type.
    Ask {
        count: u8,
        flushes: u8,
        kind: u32,
    },
    /// The file's length in pages.
    Truncate {
        pages: u16,
    },
    Config {
        offset: u16,
        value: u64,
    },
    /// A chain of any form.
    Chain {
        parts: [(u32, u16, bool); 3],
    },
    /// Something else in the ring's memory.
    Poke {
        offset: u16,
        value: u16,
    },
}

#[derive(Debug)]
struct Nowhere;

impl Placed for Nowhere {
    fn start(&self) -> u64 {
        1 << 32
    }
}

impl Places for Nowhere {
    fn place(&self, _file: &Arc<MappedFile>, _at: Option<u64>) -> io::Result<Box<dyn Placed>> {
        Ok(Box::new(Self))
    }
}

struct Model {
    memory: Memory,
    queue: DriverQueue,
    file: File,
    discard: bool,
    shortened: bool,
    hostile: bool,
}

impl Model {
    fn run(&mut self, device: &Pmem, step: &Step) {
        match *step {
            Step::Ask { count, flushes, kind } if !self.hostile => {
                let view = self.memory.memory();
                let count = u64::from(count % 8) + 1;
                let is_flush = |number: u64| flushes >> number & 1 == 1 || kind == 0;
                for number in 0..count {
                    let kind = if is_flush(number) { 0 } else { kind };
                    let at = DATA + number * 16;
                    view.write_obj(kind, GuestAddress(at)).expect("memory");
                    view.write_obj(u32::MAX, GuestAddress(at + 8)).expect("memory");
                    self.queue.add(&[(at, 4, false), (at + 8, 4, true)]);
                }
                self.queue.ring();
                for _ in 0..count {
                    let used = self.queue.wait_used();
                    assert_eq!(used.map(|used| used.1), Some(4), "every request is answered");
                }
                let flushed = u32::from(self.shortened && !self.discard);
                for number in 0..count {
                    let status: u32 = view.read_obj(GuestAddress(DATA + number * 16 + 8)).expect("memory");
                    let right = if is_flush(number) { flushed } else { 1 };
                    // Of a file that nothing is written to, what is lost may not be found out.
                    let unsure = self.shortened && self.discard && is_flush(number);
                    assert!(status == right || unsure && status == 1, "{number}: {status}, not {right}");
                }
            }
            Step::Truncate { pages } => {
                let len = u64::from(pages % 1024) * 4096;
                self.shortened |= len < SIZE;
                self.file.set_len(len).expect("a file");
                // Now and not when the device hears of it: the file may have become longer again by then.
                if self.shortened && !self.discard && !self.hostile {
                    self.run(device, &Step::Ask { count: 0, flushes: 1, kind: 0 });
                }
            }
            Step::Config { offset, value } => {
                device.write_config(offset.into(), &value.to_le_bytes());
                device.read_config(offset.into(), &mut [0; 8]);
            }
            Step::Chain { parts } => {
                if !self.hostile {
                    self.hostile = true;
                    self.queue.add(&parts.map(|(address, len, write)| (address.into(), len.into(), write)));
                    self.queue.ring();
                }
            }
            Step::Poke { offset, value } => {
                self.hostile = true;
                let place = GuestAddress(QUEUE + u64::from(offset % 0x7000));
                self.memory.memory().write_obj(value, place).expect("memory");
                self.queue.ring();
            }
            Step::Ask { .. } => {}
        }
    }
}

fuzz_target!(|input: Input| {
    let form = RingFeatures { packed: input.packed, event_idx: input.event_idx, indirect: true };
    let name = rustix::fs::memfd_create("pmem", rustix::fs::MemfdFlags::CLOEXEC);
    let file = File::from(name.expect("a file in memory"));
    file.set_len(SIZE).expect("room");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let mapped = Arc::new(MappedFile::open(&path, None, input.discard).expect("a mapping"));
    let device = Pmem::new("pmem", mapped, Arc::new(Nowhere)).expect("a place");
    let memory = memory();
    let queues = [DriverQueue::new(&memory, QUEUE, 32, form)];
    let interrupts = Arc::new(Interrupts::default());
    let active = device.activate(activation(&memory, device.features(), &queues, &interrupts));
    let [queue] = queues;
    let mut model = Model { memory, queue, file, discard: input.discard, shortened: false, hostile: false };
    for step in &input.steps {
        model.run(&device, step);
        assert!(model.hostile || interrupts.seen().stopped.is_empty(), "the device has stopped");
    }
    drop(active);
});
