//! The memory device under a driver of any kind (VIRTIO 1.2, section 5.15). Each request of one that keeps to the form has the answer of a plain
//! model, and what is unplugged reads as zeroes; one that breaks its ring stops the device at most.

#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use devices::virtio::Memory;
use devices::virtio::device::VirtioDevice;
use devices::virtio::mem::Mem;
use devices::virtio::mem::blocks::{BLOCK_MIN, Blocks};
use devices::virtio::ring::RingFeatures;
use devices::virtio::testing::{DriverQueue, Interrupts, activation, memory};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestRegionMmap, MemoryRegionAddress, MmapRegion};

const QUEUE: u64 = 0x1_0000;
const DATA: u64 = 0x20_0000;
const START: u64 = 1 << 32;
const BLOCKS: usize = 16;

#[derive(Arbitrary, Debug)]
struct Input {
    packed: bool,
    event_idx: bool,
    #[arbitrary(with = fuzz::steps::<Step, 100>)]
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// A request for blocks, which there may be.
    Ask {
        kind: u8,
        block: u8,
        count: u8,
    },
    /// A request for anything.
    AskAny {
        kind: u16,
        address: u64,
        count: u16,
    },
    Resize {
        blocks: u8,
    },
    /// The guest writes to a block that it has.
    Touch {
        block: u8,
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

struct Model {
    memory: Memory,
    region: Arc<GuestRegionMmap>,
    queue: DriverQueue,
    plugged: [bool; BLOCKS],
    requested: usize,
    hostile: bool,
}

impl Model {
    /// Type and state of the right answer.
    fn answer(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        if kind == 2 {
            self.plugged = [false; BLOCKS];
            return (0, 0);
        }
        let offset = address.wrapping_sub(START);
        let first = usize::try_from(offset / BLOCK_MIN).expect("64 bits");
        let end = first + usize::from(count);
        let inside = address >= START && offset.is_multiple_of(BLOCK_MIN) && count > 0 && end <= BLOCKS;
        if !inside || kind > 3 {
            return (3, 0);
        }
        let have = self.plugged[first..end].iter().filter(|plugged| **plugged).count();
        let all = self.plugged.iter().filter(|plugged| **plugged).count();
        let wanted = end - first;
        match kind {
            0 if all + wanted > self.requested => (1, 0),
            0 | 1 if have != if kind == 0 { 0 } else { wanted } => (3, 0),
            0 | 1 => {
                self.plugged[first..end].fill(kind == 0);
                (0, 0)
            }
            _ if have == wanted => (0, 0),
            _ if have == 0 => (0, 1),
            _ => (0, 2),
        }
    }

    fn ask(&mut self, kind: u16, address: u64, count: u16) {
        let view = self.memory.memory();
        let mut request = [0; 24];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        view.write_slice(&request, GuestAddress(DATA)).expect("memory");
        self.queue.add(&[(DATA, 24, false), (DATA + 64, 10, true)]);
        self.queue.ring();
        assert_eq!(self.queue.wait_used().map(|used| used.1), Some(10), "every request is answered");
        let field = |at| view.read_obj::<u16>(GuestAddress(DATA + 64 + at)).expect("memory");
        let found = (field(0), field(8));
        assert_eq!(found, self.answer(kind, address, count), "{kind} {address:#x} {count}");
    }

    fn mark(block: usize) -> MemoryRegionAddress {
        MemoryRegionAddress(u64::try_from(block).expect("few") * BLOCK_MIN + 4099)
    }

    fn run(&mut self, device: &Mem, step: &Step) {
        match *step {
            Step::Ask { kind, block, count } if !self.hostile => {
                let address = START + u64::from(block % 20) * BLOCK_MIN;
                self.ask(u16::from(kind % 5), address, u16::from(count % 9));
            }
            Step::AskAny { kind, address, count } if !self.hostile => self.ask(kind, address, count),
            Step::Resize { blocks } => {
                let blocks = usize::from(blocks % 20);
                let size = u64::try_from(blocks).expect("few") * BLOCK_MIN;
                let resized = device.resize(size);
                assert_eq!(resized.is_ok(), blocks <= BLOCKS, "{resized:?}");
                if resized.is_ok() {
                    self.requested = blocks;
                }
            }
            Step::Touch { block } => {
                let block = usize::from(block) % BLOCKS;
                if self.plugged[block] {
                    self.region.write_obj(1_u8, Self::mark(block)).expect("memory");
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
            Step::Ask { .. } | Step::AskAny { .. } => {}
        }
    }
}

fuzz_target!(|input: Input| {
    let form = RingFeatures { packed: input.packed, event_idx: input.event_idx, indirect: true };
    let size = usize::try_from(BLOCK_MIN).expect("64 bits") * BLOCKS;
    let mapping = MmapRegion::new(size).expect("memory");
    let region = Arc::new(GuestRegionMmap::new(mapping, GuestAddress(START)).expect("a region"));
    let device = Mem::new("mem0", 0, Blocks::new(Arc::clone(&region), 4096, false), 0);
    let memory = memory();
    let queues = [DriverQueue::new(&memory, QUEUE, 32, form)];
    let interrupts = Arc::new(Interrupts::default());
    let active = device.activate(activation(&memory, device.features(), &queues, &interrupts));
    let [queue] = queues;
    let mut model = Model { memory, region, queue, plugged: [false; BLOCKS], requested: 0, hostile: false };
    for step in &input.steps {
        model.run(&device, step);
        assert!(model.hostile || interrupts.seen().stopped.is_empty(), "the device has stopped");
    }
    drop(active);
    if !model.hostile {
        let count = model.plugged.iter().filter(|plugged| **plugged).count();
        assert_eq!(device.blocks().plugged_size(), u64::try_from(count).expect("few") * BLOCK_MIN);
        for block in (0..BLOCKS).filter(|block| !model.plugged[*block]) {
            let read: u8 = model.region.read_obj(Model::mark(block)).expect("memory");
            assert_eq!(read, 0, "block {block} has been given back");
        }
    }
});
