//! The socket device under a hostile driver and careless clients: packets of any kind at any time, buffers of any size, rings overwritten
//! (VIRTIO 1.2, section 5.10). As long as the rings are kept in order every packet of the driver comes back, every packet of the device is whole, of
//! this guest, and no connection gets more data than the driver has said it has room for; else the device stops at most.

#![no_main]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use arbitrary::Arbitrary;
use devices::virtio::Memory;
use devices::virtio::device::VirtioDevice;
use devices::virtio::ring::RingFeatures;
use devices::virtio::testing::{DriverQueue, Interrupts, activation, memory};
use devices::virtio::vsock::Vsock;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::tempdir::TempDir;

const CID: u64 = 9;
const HEADER: usize = 44;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const RW: u16 = 5;
/// Ports of the host: a server listens on the first.
const PORTS: [u32; 3] = [5, 6, 1 << 30];
/// Descriptors of the device's queues, and how many of them one posted buffer may leave for others.
const QUEUE_LEN: u16 = 256;
const RX: u64 = 0x10_0000;
const TX: u64 = 0x40_0000;

#[derive(Arbitrary, Debug)]
struct Input {
    packed: bool,
    event_idx: bool,
    #[arbitrary(with = fuzz::steps::<Step, 120>)]
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// A buffer to receive with.
    Post {
        len: u16,
    },
    /// A packet from the driver.
    Send {
        op: u8,
        host: u8,
        guest: u8,
        flags: u8,
        data: u16,
        room: u16,
    },
    /// One that does not keep to the format: whose, of what kind, how long it says it is.
    Odd {
        op: u16,
        source: u8,
        destination: u8,
        kind: u8,
        len: u32,
        taken: u32,
        bytes: u8,
    },
    /// Packets from the device.
    Receive,
    Client {
        line: Line,
    },
    ClientWrites {
        which: u8,
        len: u16,
    },
    ClientReads {
        which: u8,
    },
    ClientGoes {
        which: u8,
    },
    ServerAccepts,
    /// Something else in a ring's memory.
    Poke {
        queue: u8,
        offset: u16,
        value: u16,
    },
}

#[derive(Arbitrary, Debug)]
enum Line {
    Connect { port: u8 },
    Half,
    Nonsense([u8; 12]),
}

struct Model {
    memory: Memory,
    queues: Vec<DriverQueue>,
    interrupts: Arc<Interrupts>,
    dir: TempDir,
    server: UnixListener,
    ends: Vec<UnixStream>,
    /// By the chain's number: address and size of buffers that were posted.
    posted: HashMap<u16, (u64, u32)>,
    count: u64,
    hostile: bool,
    /// The driver has told lies of what it has taken.
    lies: bool,
    /// By the ports: the most room that was told of, and data that has come.
    room: HashMap<(u32, u32), u32>,
    data: HashMap<(u32, u32), u32>,
}

/// A header, field by field as the standard has it.
fn header(ids: [u64; 2], ports: [u32; 2], len: u32, kind: u16, op: u16, rest: [u32; 3]) -> Vec<u8> {
    let mut bytes = Vec::new();
    ids.iter().for_each(|id| bytes.extend(id.to_le_bytes()));
    ports.iter().for_each(|port| bytes.extend(port.to_le_bytes()));
    bytes.extend(len.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.extend(op.to_le_bytes());
    rest.iter().for_each(|word| bytes.extend(word.to_le_bytes()));
    bytes
}

impl Model {
    fn send(&mut self, bytes: &[u8]) {
        if self.hostile {
            return;
        }
        self.memory.memory().write_slice(bytes, GuestAddress(TX)).expect("memory");
        self.queues[1].add(&[(TX, u32::try_from(bytes.len()).expect("a short packet"), false)]);
        self.queues[1].ring();
        let used = self.queues[1].wait_used();
        assert!(used.is_some_and(|(_, written)| written == 0), "a packet comes back as it is: {used:?}");
    }

    fn receive(&mut self) {
        if self.hostile {
            return;
        }
        while let Some((id, written)) = self.queues[0].used() {
            let (address, size) = self.posted.remove(&id).expect("a buffer that was posted, once");
            assert!(written <= size, "{written} bytes in {size}");
            if written == 0 {
                assert!(size <= HEADER as u32, "a buffer of {size} bytes is not used");
                continue;
            }
            let mut bytes = vec![0; written as usize];
            self.memory.memory().read_slice(&mut bytes, GuestAddress(address)).expect("memory");
            self.check(&bytes);
        }
    }

    fn check(&mut self, bytes: &[u8]) {
        assert!(bytes.len() >= HEADER, "a packet of {} bytes", bytes.len());
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let (to, ports, len, op) = (word(8), (word(16), word(20)), word(24), half(30));
        assert_eq!((u64::from(to), word(12)), (CID, 0), "for this guest");
        assert_eq!(len as usize, bytes.len() - HEADER);
        assert!((1..=7).contains(&op), "operation {op}");
        assert!(len == 0 || op == RW, "operation {op} with data");
        match op {
            REQUEST | RESPONSE => drop(self.data.insert(ports, 0)),
            RW => {
                let sum = self.data.entry(ports).or_default();
                *sum += len;
                let room = self.room.get(&ports).copied().unwrap_or(0);
                assert!(self.lies || *sum <= room, "{sum} bytes where there is room for {room}");
            }
            _ => {}
        }
    }

    fn end(&mut self, which: u8) -> Option<&mut UnixStream> {
        let count = self.ends.len();
        self.ends.get_mut(usize::from(which) % count.max(1))
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Post { len } if self.posted.len() < usize::from(QUEUE_LEN) / 2 && !self.hostile => {
                self.count += 1;
                let (address, size) = (RX + self.count % 64 * 0x4000, u32::from(len) % 0x3000 + 1);
                let id = self.queues[0].add(&[(address, size, true)]);
                self.posted.insert(id, (address, size));
                self.queues[0].ring();
            }
            Step::Send { op, host, guest, flags, data, room } => {
                let ports = [u32::from(guest % 3), PORTS[usize::from(host % 3)]];
                let data = if op % 8 == 5 { data % 9000 } else { 0 };
                let most = self.room.entry((ports[1], ports[0])).or_default();
                *most = (*most).max(room.into());
                let rest = [u32::from(flags % 4), room.into(), 0];
                let mut bytes = header([CID, 2], ports, data.into(), 1, u16::from(op % 8), rest);
                bytes.resize(HEADER + usize::from(data), 7);
                self.send(&bytes);
            }
            Step::Odd { op, source, destination, kind, len, taken, bytes } => {
                self.lies = true;
                let ids = [CID + u64::from(source % 2), u64::from(destination % 4)];
                let ports = [u32::from(source % 3), PORTS[usize::from(kind % 3)]];
                let rest = [taken, len ^ taken, taken];
                let mut packet = header(ids, ports, len >> (kind % 32), u16::from(kind % 3), op % 10, rest);
                packet.resize(usize::from(bytes).max(1), 3);
                self.send(&packet);
            }
            Step::Receive => self.receive(),
            Step::Client { ref line } if self.ends.len() < 40 => self.client(line),
            Step::ClientWrites { which, len } => {
                if let Some(end) = self.end(which) {
                    // It may be closed or full.
                    let _ = end.write(&vec![9; usize::from(len) % 5000 + 1]);
                }
            }
            Step::ClientReads { which } => {
                if let Some(end) = self.end(which) {
                    let _ = end.read(&mut [0; 4096]);
                }
            }
            Step::ClientGoes { which } => {
                if !self.ends.is_empty() {
                    let at = usize::from(which) % self.ends.len();
                    drop(self.ends.swap_remove(at));
                }
            }
            Step::ServerAccepts => {
                if let Ok((end, _)) = self.server.accept() {
                    end.set_nonblocking(true).expect("not waiting");
                    self.ends.push(end);
                }
            }
            Step::Poke { queue, offset, value } => {
                self.hostile = true;
                let base = 0x1_0000 * (u64::from(queue % 3) + 1);
                let place = GuestAddress(base + u64::from(offset % 0x7000));
                self.memory.memory().write_obj(value, place).expect("memory");
                self.queues[usize::from(queue % 3)].ring();
            }
            Step::Post { .. } | Step::Client { .. } => {}
        }
    }

    fn client(&mut self, line: &Line) {
        let Ok(mut end) = UnixStream::connect(self.dir.as_path().join("v")) else { return };
        end.set_nonblocking(true).expect("not waiting");
        let text = match line {
            Line::Connect { port } => format!("CONNECT {}\n", port % 3).into_bytes(),
            Line::Half => b"CONNECT ".to_vec(),
            Line::Nonsense(bytes) => bytes.to_vec(),
        };
        let _ = end.write(&text);
        self.ends.push(end);
    }
}

fuzz_target!(|input: Input| {
    let form = RingFeatures { packed: input.packed, event_idx: input.event_idx, indirect: true };
    let dir = TempDir::new().expect("a directory");
    let device = Vsock::new("vsock", 9, &dir.as_path().join("v")).expect("a socket");
    let server = UnixListener::bind(dir.as_path().join("v_5")).expect("a server");
    server.set_nonblocking(true).expect("not waiting");
    let memory = memory();
    let queues: Vec<_> =
        (1..4).map(|number| DriverQueue::new(&memory, number * 0x1_0000, QUEUE_LEN, form)).collect();
    let interrupts = Arc::new(Interrupts::default());
    let active = device.activate(activation(&memory, device.features(), &queues, &interrupts));
    let mut model = Model {
        memory,
        queues,
        interrupts,
        dir,
        server,
        ends: Vec::new(),
        posted: HashMap::new(),
        count: 0,
        hostile: false,
        lies: false,
        room: HashMap::new(),
        data: HashMap::new(),
    };
    for step in &input.steps {
        model.run(step);
        assert!(model.hostile || model.interrupts.seen().stopped.is_empty(), "the device has stopped");
    }
    // A last one that no connection can refuse: everything before it has been taken.
    model.send(&header([CID, 2], [77, 77], 0, 1, RST, [0; 3]));
    drop(active);
    model.receive();
});
