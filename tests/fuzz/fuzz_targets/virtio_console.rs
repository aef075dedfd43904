//! The console device under a hostile driver: chains of any form, rings overwritten (VIRTIO 1.2, section 5.3). As long as the driver keeps to the
//! rules, what it prints and what is typed arrives whole and in order; else the device stops at most.

#![no_main]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use arbitrary::Arbitrary;
use devices::serial::Backend;
use devices::virtio::Memory;
use devices::virtio::console::Console;
use devices::virtio::device::VirtioDevice;
use devices::virtio::ring::RingFeatures;
use devices::virtio::testing::{DriverQueue, Interrupts, activation, memory};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

const QUEUE_LEN: u16 = 256;
const INPUT: u64 = 0x10_0000;
const OUTPUT: u64 = 0x40_0000;

#[derive(Arbitrary, Debug)]
struct Input {
    packed: bool,
    event_idx: bool,
    #[arbitrary(with = fuzz::steps::<Step, 100>)]
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// A buffer for input.
    Post {
        len: u8,
    },
    /// Output of so many bytes, in so many buffers.
    Print {
        len: u16,
        pieces: u8,
    },
    Type {
        len: u8,
    },
    Take,
    Config {
        offset: u8,
        value: u32,
    },
    /// A chain of any form, in either queue.
    Chain {
        queue: bool,
        parts: [(u32, u16, bool); 3],
    },
    /// Something else in a ring's memory.
    Poke {
        queue: bool,
        offset: u16,
        value: u16,
    },
}

struct Model {
    memory: Memory,
    rx: DriverQueue,
    tx: DriverQueue,
    posted: HashMap<u16, (u64, u32)>,
    count: u64,
    far: UnixStream,
    printed: Vec<u8>,
    heard: Vec<u8>,
    typed: Vec<u8>,
    taken: Vec<u8>,
    hostile: bool,
}

impl Model {
    fn post(&mut self, len: u32) {
        if self.hostile || self.posted.len() >= usize::from(QUEUE_LEN) {
            return;
        }
        self.count += 1;
        let address = INPUT + self.count % 512 * 0x100;
        let id = self.rx.add(&[(address, len, true)]);
        self.posted.insert(id, (address, len));
        self.rx.ring();
    }

    /// Takes what has come; whether there was something.
    fn take(&mut self, wait: bool) -> bool {
        if self.hostile {
            return false;
        }
        let used = if wait { self.rx.wait_used() } else { self.rx.used() };
        let Some((id, written)) = used else { return false };
        let (address, len) = self.posted.remove(&id).expect("a buffer that was posted, once");
        assert!((1..=len).contains(&written), "{written} bytes in {len}");
        let mut bytes = vec![0; written as usize];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(address)).expect("memory");
        self.taken.extend(bytes);
        assert_eq!(self.taken, self.typed[..self.taken.len()], "what was typed, in order");
        true
    }

    /// Reads what was printed: who does not loses what there is no more room for.
    fn hear(&mut self) {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = self.far.read(&mut bytes) {
            self.heard.extend(&bytes[..count]);
        }
    }

    fn run(&mut self, device: &Console, step: &Step) {
        match *step {
            Step::Post { len } => self.post(u32::from(len) + 1),
            Step::Print { len, pieces } if !self.hostile => {
                let len = u32::from(len) % 1000 + 1;
                let seed = self.printed.len();
                let text: Vec<u8> = (0..len as usize).map(|at| ((seed + at) % 251) as u8).collect();
                self.memory.memory().write_slice(&text, GuestAddress(OUTPUT)).expect("memory");
                let first = len / (u32::from(pieces) % 4 + 1);
                let address = OUTPUT + u64::from(first);
                self.tx.add(&[(OUTPUT, first, false), (address, len - first, false)]);
                self.tx.ring();
                let used = self.tx.wait_used();
                assert!(used.is_some_and(|(_, written)| written == 0), "output is taken: {used:?}");
                self.printed.extend(text);
                self.hear();
            }
            Step::Type { len } => {
                let seed = self.typed.len();
                let text: Vec<u8> = (0..usize::from(len) + 1).map(|at| ((seed + at) % 253) as u8).collect();
                if let Ok(count) = self.far.write(&text) {
                    self.typed.extend(&text[..count]);
                }
            }
            Step::Take => while self.take(false) {},
            Step::Config { offset, value } => {
                device.write_config(offset.into(), &value.to_le_bytes());
                device.read_config(offset.into(), &mut [0; 8]);
            }
            Step::Chain { queue, parts } => {
                if !self.hostile {
                    self.hostile = true;
                    let parts = parts.map(|(address, len, writable)| (address.into(), len.into(), writable));
                    let queue = if queue { &mut self.rx } else { &mut self.tx };
                    queue.add(&parts[..if self.posted.len() > 250 { 1 } else { 3 }]);
                    queue.ring();
                }
            }
            Step::Poke { queue, offset, value } => {
                self.hostile = true;
                let (base, queue) = if queue { (0x1_0000, &self.rx) } else { (0x2_0000, &self.tx) };
                let place = GuestAddress(base + u64::from(offset % 0x7000));
                self.memory.memory().write_obj(value, place).expect("memory");
                queue.ring();
            }
            Step::Print { .. } => {}
        }
    }
}

fuzz_target!(|input: Input| {
    let form = RingFeatures { packed: input.packed, event_idx: input.event_idx, indirect: true };
    let (near, far) = UnixStream::pair().expect("a pair of sockets");
    far.set_nonblocking(true).expect("not waiting");
    let copy = near.try_clone().expect("a copy");
    let backend = Backend::from_descriptors(Some(near.into()), Some(copy.into())).expect("a backend");
    let device = Console::new("console", backend, None);
    let memory = memory();
    let queues = [0x1_0000, 0x2_0000].map(|base| DriverQueue::new(&memory, base, QUEUE_LEN, form));
    let interrupts = Arc::new(Interrupts::default());
    let active = device.activate(activation(&memory, device.features(), &queues, &interrupts));
    let [rx, tx] = queues;
    let mut model = Model {
        memory,
        rx,
        tx,
        posted: HashMap::new(),
        count: 0,
        far,
        printed: Vec::new(),
        heard: Vec::new(),
        typed: Vec::new(),
        taken: Vec::new(),
        hostile: false,
    };
    for step in &input.steps {
        model.run(&device, step);
        assert!(model.hostile || interrupts.seen().stopped.is_empty(), "the device has stopped");
    }
    while !model.hostile && model.taken.len() < model.typed.len() {
        model.post(256);
        assert!(model.take(true), "input does not arrive");
    }
    drop(active);
    // As long as somebody is there to hear its last words: a program of libFuzzer's dies of a closed socket, as no program of Rust's own does.
    drop(device);
    if !model.hostile {
        model.hear();
        assert_eq!(model.heard, model.printed, "what was printed, in order");
    }
});
