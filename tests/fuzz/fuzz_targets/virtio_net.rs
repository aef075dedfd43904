//! The network device under a hostile driver: chains of any form, rings overwritten at any moment, any commands, packets of any length from
//! outside (VIRTIO 1.2, sections 2.6 to 2.8 and 5.1). A driver that keeps to the rules gets every packet once, whole, in order, in buffers that
//! are its own; one that does not stops the device at most.

#![no_main]

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use arbitrary::Arbitrary;
use devices::net::testing::{Bench, CONTROL, RECEIVE, SEND};
use devices::virtio::Memory;
use devices::virtio::ring::RingFeatures;
use devices::virtio::testing::{DriverQueue, Interrupts, activation, memory};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

const QUEUE_LEN: u16 = 32;
const HEADER: usize = 12;
/// GUEST_CSUM and GUEST_TSO4: packets of 64 KiB may come.
const LARGE: u64 = 1 << 1 | 1 << 7;
/// Buffers: each queue's are apart from the others', and from the rings.
const BUFFERS: u64 = 0x10_0000;
const BUFFER_LEN: u64 = 0x2000;

#[derive(Arbitrary, Debug)]
struct Input {
    packed: bool,
    event_idx: bool,
    mergeable: bool,
    large: bool,
    #[arbitrary(with = fuzz::steps::<Step, 200>)]
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// A receive buffer as a driver gives it.
    Post {
        len: u16,
        pieces: u8,
    },
    /// A packet as a driver sends it.
    Send {
        len: u16,
        pieces: u8,
    },
    /// A packet from outside.
    Arrive {
        len: u16,
    },
    Command {
        bytes: [u8; 10],
        len: u8,
    },
    Kick {
        queue: u8,
    },
    Quiesce,
    /// A chain of any form.
    Chain {
        queue: u8,
        parts: [(u32, u16, bool); 3],
        count: u8,
    },
    /// Something else in a ring's memory.
    Poke {
        queue: u8,
        offset: u16,
        value: u16,
    },
}

struct Model {
    bench: Bench,
    queues: Vec<DriverQueue>,
    free: [u16; 3],
    far: UnixDatagram,
    /// Whether the driver has broken the rules: then only what must never happen is looked for.
    hostile: bool,
    stopped: bool,
    /// By the chain's number: descriptors, address, length.
    given: [HashMap<u16, (u16, u64, u32)>; 3],
    /// Lengths of what is on its way to the guest.
    arriving: VecDeque<usize>,
    /// Chains given so far in each queue: buffers go round, and there are more of them than chains.
    number: [u64; 3],
    memory: Memory,
}

impl Model {
    fn add(&mut self, queue: u16, len: u32, pieces: u8, writable: bool) -> Option<u16> {
        let at = usize::from(queue);
        let pieces = u32::from(pieces % 3 + 1).min(len.max(1));
        let descriptors = u16::try_from(pieces).unwrap_or(1);
        if self.free[at] < descriptors {
            return None;
        }
        self.number[at] += 1;
        let address = BUFFERS + u64::from(queue) * 0x10_0000 + self.number[at] % 64 * BUFFER_LEN;
        let mut parts = Vec::new();
        let mut offset = 0;
        for piece in 0..pieces {
            let size = if piece + 1 == pieces { len - offset } else { len / pieces };
            parts.push((address + u64::from(offset), size, writable));
            offset += size;
        }
        let id = self.queues[at].add(&parts);
        self.free[at] -= descriptors;
        self.given[at].insert(id, (descriptors, address, len));
        Some(id)
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Post { len, pieces } => {
                let len = u32::from(len) % 4000 + 12;
                let _ = self.add(RECEIVE, len, pieces, true);
            }
            Step::Send { len, pieces } => {
                let _ = self.add(SEND, u32::from(len) % 4000 + 1, pieces, false);
            }
            Step::Arrive { len } => {
                let len = HEADER + 1 + usize::from(len) % 9000;
                let mark = u8::try_from(self.arriving.len() % 250).unwrap_or(0) + 1;
                if self.far.send(&vec![mark; len]).is_ok() {
                    self.arriving.push_back(len);
                }
                let result = self.bench.tap_readable();
                self.note(result.is_err());
            }
            Step::Command { bytes, len } => self.command(bytes, len),
            Step::Kick { queue } => self.kick(u16::from(queue) % 3),
            Step::Quiesce => self.bench.quiesce(),
            Step::Chain { queue, parts, count } => {
                self.hostile = true;
                let count = u16::from(count) % 3 + 1;
                let at = usize::from(queue % 3);
                if self.free[at] >= count {
                    self.free[at] -= count;
                    let parts: Vec<_> = parts
                        .iter()
                        .take(count.into())
                        .map(|(address, len, writable)| (u64::from(*address), u32::from(*len), *writable))
                        .collect();
                    let _ = self.queues[at].add(&parts);
                }
            }
            Step::Poke { queue, offset, value } => {
                self.hostile = true;
                let base = u64::from(queue % 3) * 0x1_0000;
                let address = GuestAddress(base + u64::from(offset % 0x7000));
                let memory = self.memory.clone();
                let _ = memory.memory().write_obj(value, address);
            }
        }
    }

    fn command(&mut self, bytes: [u8; 10], len: u8) {
        if self.free[2] < 2 {
            return;
        }
        let len = usize::from(len) % 10 + 1;
        let memory = self.memory.clone();
        let (command, answer) = (BUFFERS + 0x30_0000, BUFFERS + 0x30_0100);
        let _ = memory.memory().write_slice(&bytes[..len], GuestAddress(command));
        let size = u32::try_from(len).unwrap_or(1);
        self.queues[2].add(&[(command, size, false), (answer, 1, true)]);
        self.free[2] -= 2;
        self.kick(CONTROL);
        if self.hostile || self.stopped {
            return;
        }
        let used = self.queues[2].used();
        assert!(used.is_some_and(|(_, written)| written == 1), "a command is answered at once: {used:?}");
        self.free[2] += 2;
        let answer: u8 = memory.memory().read_obj(GuestAddress(answer)).unwrap_or(2);
        assert!(answer <= 1, "answered {answer}");
    }

    fn note(&mut self, failed: bool) {
        assert!(!failed || self.hostile, "the device stops though the driver has kept to the rules");
        self.stopped |= failed;
    }

    fn kick(&mut self, queue: u16) {
        let result = self.bench.kick(queue);
        self.note(result.is_err());
        if self.hostile || self.stopped {
            return;
        }
        match queue {
            SEND => self.take_sent(),
            RECEIVE => self.take_received(),
            _ => {}
        }
    }

    fn take_sent(&mut self) {
        let mut bytes = vec![0; 8192];
        while let Some((id, written)) = self.queues[1].used() {
            let (descriptors, _, len) = self.given[1].remove(&id).expect("a chain that was sent");
            self.free[1] += descriptors;
            assert_eq!(written, 0);
            if len as usize > HEADER {
                let count = self.far.recv(&mut bytes).expect("what was sent has left");
                assert_eq!(count, len as usize);
            }
        }
    }

    fn take_received(&mut self) {
        let memory = self.memory.clone();
        while let Some((id, first)) = self.queues[0].used() {
            let (descriptors, address, room) = self.given[0].remove(&id).expect("a buffer that was given");
            self.free[0] += descriptors;
            assert!(first <= room, "{first} bytes in {room}");
            let count: u16 = memory.memory().read_obj(GuestAddress(address + 10)).unwrap_or(0);
            let mut sum = first as usize;
            for _ in 1..count {
                // All of a packet is there at once.
                let (id, len) = self.queues[0].used().expect("as many buffers as the header says");
                let (descriptors, _, room) = self.given[0].remove(&id).expect("a buffer that was given");
                self.free[0] += descriptors;
                assert!(len <= room);
                sum += len as usize;
            }
            // Those that did not fit have been dropped.
            let found = self.arriving.iter().position(|len| *len == sum);
            let found = found.unwrap_or_else(|| panic!("a packet of {sum} bytes, of {:?}", self.arriving));
            self.arriving.drain(..=found);
        }
    }
}

fuzz_target!(|input: Input| {
    let form = RingFeatures { packed: input.packed, event_idx: input.event_idx, indirect: true };
    let memory = memory();
    let queues: Vec<_> = (0..3).map(|n| DriverQueue::new(&memory, n * 0x1_0000, QUEUE_LEN, form)).collect();
    let (near, far) = UnixDatagram::pair().expect("a pair of sockets");
    near.set_nonblocking(true).expect("not waiting");
    far.set_nonblocking(true).expect("not waiting");
    let interrupts = Arc::new(Interrupts::default());
    let features = if input.large { LARGE } else { 0 };
    let bench = Bench::new(
        File::from(OwnedFd::from(near)),
        activation(&memory, features, &queues, &interrupts),
        input.mergeable,
    );
    let mut model = Model {
        bench,
        queues,
        free: [QUEUE_LEN; 3],
        far,
        hostile: false,
        stopped: false,
        given: [HashMap::new(), HashMap::new(), HashMap::new()],
        arriving: VecDeque::new(),
        number: [0; 3],
        memory,
    };
    for step in &input.steps {
        model.run(step);
        // What has failed is not called again, as its worker would not.
        if model.stopped {
            return;
        }
    }
    for queue in 0..3 {
        model.kick(queue);
        if model.stopped {
            return;
        }
    }
});
