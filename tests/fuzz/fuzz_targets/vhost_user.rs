//! A vhost-user backend that means harm, at the other end of the socket (QEMU's Vhost-user Protocol, `docs/interop/vhost-user.rst`): answers of wrong sizes
//! and kinds, values that make no sense, answers nobody asked for, with descriptors or cut off, anything on the channel for its own requests.
//!
//! It must not make this process panic, wait for long, or keep descriptors. Once it behaves, the next driver is served.

#![no_main]

use std::collections::VecDeque;
use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Once};
use std::thread;
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use devices::vhost_user::{Mode, VhostUser, VhostUserError, block, fs, generic, net};
use devices::virtio::Memory;
use devices::virtio::device::{Active, DeviceType, VirtioDevice};
use devices::virtio::ring::RingFeatures;
use devices::virtio::testing::{DriverQueue, Interrupts, activation};
use libfuzzer_sys::fuzz_target;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Resource, Rlimit, setrlimit};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vmm_sys_util::tempdir::TempDir;

const VERSION_1: u64 = 1 << 32;
const PACKED: u64 = 1 << 34;
const EVENT_IDX: u64 = 1 << 29;
/// VHOST_USER_F_PROTOCOL_FEATURES.
const PROTOCOL: u64 = 1 << 30;
/// Flags of a message: version 1, a reply, a reply is wanted.
const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
/// Requests that have an answer of their own, and the one with the channel for the backend's requests.
const GET_FEATURES: u32 = 1;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const GET_PROTOCOL_FEATURES: u32 = 15;
const GET_QUEUE_NUM: u32 = 17;
const SET_BACKEND_REQ_FD: u32 = 21;
const GET_CONFIG: u32 = 24;
const GET_MAX_MEM_SLOTS: u32 = 36;
const HEADER: usize = 12;
const MESSAGE_MAX: usize = 8192;
/// Descriptors with a message. With more the message counts as not received, as if the backend hung: that takes the time that it is given to answer.
const FILES_MAX: usize = 32;
const QUEUE_SIZE: u16 = 16;
/// The most address space that the process may have: stacks of its threads for the greatest part.
const ADDRESS_SPACE: u64 = 2 << 30;
/// Longer than anything may take, and shorter than what counts as an input without an end.
const LONG: Duration = Duration::from_secs(8);

#[derive(Arbitrary, Debug)]
struct Input {
    kind: Kind,
    #[arbitrary(with = fuzz::steps::<Move, 100>)]
    moves: Vec<Move>,
}

#[derive(Arbitrary, Debug)]
enum Kind {
    Disk { queues: u8 },
    FileSystem { queues: u8 },
    Generic { device_type: u8, queues: u8 },
    Net { pairs: u8 },
}

/// Of both sides, so that they do not use up each other's bytes.
#[derive(Arbitrary, Debug)]
enum Move {
    Driver(Step),
    Backend(Answer),
    Honest { times: u8 },
}

#[derive(Arbitrary, Clone, Debug)]
enum Answer {
    Right,
    /// Of the right form, with another value; of features, with or without those that are needed to go on.
    Value {
        value: u64,
        sensible: bool,
    },
    /// Anything in its header and behind it; then the connection ends.
    Odd {
        request: u8,
        flags: u8,
        size: Size,
        bytes: u8,
    },
    /// So many bytes of the right one; then the connection ends.
    Cut {
        bytes: u8,
    },
    Twice,
    /// With descriptors nobody asked for.
    Files {
        count: u8,
    },
    End,
    /// The right one, after a message of the backend's own.
    Notice {
        request: u8,
        flags: u8,
        size: Size,
        bytes: u8,
        times: u8,
    },
    /// The right one, after the end of the channel for such messages.
    NoMoreNotices,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Size {
    Right,
    Any(u32),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Step {
    Activate {
        packed: bool,
        event_idx: bool,
    },
    Stop,
    Pause,
    Resume,
    MoreMemory,
    Write {
        offset: u8,
        value: u32,
    },
    Read {
        offset: u16,
    },
    /// A request to a queue, which nobody answers but whoever stands in for the backend.
    Ask {
        queue: u8,
    },
    /// What the control queue of a network device is asked.
    Pairs {
        pairs: u8,
    },
    Rest,
}

/// The process at the other end.
struct Backend {
    answers: Mutex<VecDeque<Answer>>,
    /// It does as it should from now on.
    honest: AtomicBool,
    ended: AtomicBool,
    /// Rings that it was given while it was honest.
    rings: AtomicUsize,
}

impl Backend {
    fn serve(&self, listener: &UnixListener) {
        while let Ok((stream, _)) = listener.accept() {
            if self.ended.load(Ordering::Relaxed) {
                return;
            }
            let mut channel = None;
            while self.answer(&stream, &mut channel).is_some() {}
            // Descriptors of it may be on their way, and would keep it open.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Takes one request and answers it; `None` at the end of the connection.
    fn answer(&self, mut stream: &UnixStream, channel: &mut Option<UnixStream>) -> Option<()> {
        let mut header = [0; HEADER];
        let (count, fd) = receive(stream, &mut header).filter(|(count, _)| *count > 0)?;
        stream.read_exact(&mut header[count..]).ok()?;
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (request, flags, size) = (word(0), word(4), word(8) as usize);
        assert!(size <= MESSAGE_MAX, "a request of {size} bytes");
        let mut body = vec![0; size];
        stream.read_exact(&mut body).ok()?;
        if request == SET_BACKEND_REQ_FD {
            *channel = fd.map(UnixStream::from);
        }
        let honest = self.honest.load(Ordering::Relaxed);
        if honest && request == SET_VRING_KICK {
            self.rings.fetch_add(1, Ordering::Relaxed);
        }
        let answer = if honest { None } else { self.answers.lock().expect("a lock").pop_front() };
        let right = |value| reply(request, flags, &body, value);
        match answer.unwrap_or(Answer::Right) {
            Answer::Right => stream.write_all(&right(None)).ok(),
            Answer::Value { value, sensible } => {
                let needed = if sensible && request == GET_FEATURES { VERSION_1 | PROTOCOL } else { 0 };
                stream.write_all(&right(Some(value | needed))).ok()
            }
            Answer::Odd { request: other, flags, size, bytes } => {
                // As often as not it is an answer to what was asked.
                let code = if other & 1 == 0 { request } else { u32::from(other) };
                let flags = if flags & 1 == 0 { VERSION | REPLY } else { flags.into() };
                let _ = stream.write_all(&message(code, flags, size, usize::from(bytes)));
                None
            }
            Answer::Cut { bytes } => {
                let message = right(None);
                let _ = stream.write_all(&message[..usize::from(bytes).min(message.len())]);
                None
            }
            Answer::Twice => stream.write_all(&[right(None), right(None)].concat()).ok(),
            Answer::Files { count } => {
                let message = right(None);
                let fds = vec![stream.as_raw_fd(); usize::from(count) % (FILES_MAX + 1)];
                if message.is_empty() {
                    return Some(());
                }
                stream.send_with_fds(&[&message[..]], &fds).ok().map(drop)
            }
            Answer::End => None,
            Answer::Notice { request, flags, size, bytes, times } => {
                if let Some(channel) = channel {
                    channel.set_nonblocking(true).ok()?;
                    let text = message(u32::from(request % 8), u32::from(flags), size, usize::from(bytes));
                    let _ = channel.write_all(&text.repeat(usize::from(times) + 1));
                }
                stream.write_all(&right(None)).ok()
            }
            Answer::NoMoreNotices => {
                *channel = None;
                stream.write_all(&right(None)).ok()
            }
        }
    }
}

/// Bytes, and a descriptor that came with them, if any.
fn receive(stream: &UnixStream, bytes: &mut [u8]) -> Option<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let parts = &mut [IoSliceMut::new(bytes)];
    let count = recvmsg(stream, parts, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?.bytes;
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    Some((count, fds.flatten().last()))
}

/// A header and so many bytes behind it, which `size` may not tell.
fn message(request: u32, flags: u32, size: Size, bytes: usize) -> Vec<u8> {
    let size = match size {
        Size::Right => u32::try_from(bytes).unwrap_or(0),
        Size::Any(size) => size,
    };
    let header = [request, flags, size].map(u32::to_le_bytes).concat();
    [header, vec![0xa5; bytes]].concat()
}

/// The answer to a request, with another value if there is one; nothing if there is none.
fn reply(request: u32, flags: u32, body: &[u8], value: Option<u64>) -> Vec<u8> {
    let number = |usual: u64| value.unwrap_or(usual).to_le_bytes().to_vec();
    let body = match request {
        // Everything, so that nobody misses what was there before.
        GET_FEATURES => number(u64::MAX),
        GET_PROTOCOL_FEATURES => number(u64::MAX),
        GET_QUEUE_NUM => number(256),
        GET_MAX_MEM_SLOTS => number(32),
        GET_VRING_BASE => [&body[..4.min(body.len())], &number(0)[..4]].concat(),
        GET_CONFIG => {
            let fill = value.unwrap_or(0).to_le_bytes()[0];
            let mut body = body.to_vec();
            body.iter_mut().skip(HEADER).for_each(|byte| *byte = fill);
            body
        }
        _ if flags & NEED_REPLY != 0 => number(0),
        _ => return Vec::new(),
    };
    let size = u32::try_from(body.len()).unwrap_or(0);
    [[request, VERSION | REPLY, size].map(u32::to_le_bytes).concat(), body].concat()
}

fn shared(start: u64, size: usize) -> (GuestAddress, usize, Option<FileOffset>) {
    let name = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC);
    let file = File::from(name.expect("a file in memory"));
    file.set_len(size as u64).expect("room");
    (GuestAddress(start), size, Some(FileOffset::new(file, 0)))
}

/// Guest memory of so many parts.
fn memory(parts: u64) -> GuestMemoryMmap {
    let first = shared(0, 2 << 20);
    let others = (1..parts).map(|part| shared(part << 24, 4096));
    GuestMemoryMmap::from_ranges_with_files(std::iter::once(first).chain(others)).expect("memory")
}

/// A driver at work.
struct Driver {
    memory: Memory,
    parts: u64,
    queues: Vec<DriverQueue>,
    asked: u8,
    active: Box<dyn Active>,
}

impl Driver {
    fn start(device: &VhostUser, packed: bool, event_idx: bool) -> Option<Self> {
        let offered = device.features();
        let form = RingFeatures {
            packed: packed && offered & PACKED != 0,
            event_idx: event_idx && offered & EVENT_IDX != 0,
            indirect: false,
        };
        let features =
            offered & !(if form.packed { 0 } else { PACKED }) & !(if form.event_idx { 0 } else { EVENT_IDX })
                | VERSION_1;
        let memory = Memory::new(memory(2));
        let queue = |n: usize| DriverQueue::new(&memory, 0x1_0000 * (n as u64 + 1), QUEUE_SIZE, form);
        let queues: Vec<_> = (0..device.queue_sizes().len()).map(queue).collect();
        let interrupts = Arc::new(Interrupts::default());
        let active = device.activate(activation(&memory, features, &queues, &interrupts)).ok()?;
        Some(Self { memory, parts: 2, queues, asked: 0, active })
    }

    fn stop(self) {
        self.active.stop();
        assert!(self.active.wait_stopped(LONG), "a reset that does not end");
    }

    fn more_memory(&mut self) {
        self.parts = self.parts % 12 + 1;
        let parts = memory(self.parts);
        self.memory.lock().expect("a lock").replace(parts);
    }

    fn ask(&mut self, queue: usize, parts: &[(u64, u32, bool)]) {
        if self.asked < 5 {
            self.asked += 1;
            self.queues[queue].add(parts);
            self.queues[queue].ring();
        }
    }
}

fn take(device: &VhostUser, driver: &mut Option<Driver>, step: Step) {
    match (step, driver.as_mut()) {
        (Step::Activate { packed, event_idx }, None) => *driver = Driver::start(device, packed, event_idx),
        (Step::Stop, Some(_)) => driver.take().into_iter().for_each(Driver::stop),
        (Step::Pause, Some(driver)) => driver.active.pause(),
        (Step::Resume, Some(driver)) => driver.active.resume(),
        (Step::MoreMemory, Some(driver)) => {
            driver.more_memory();
            device.memory_changed();
        }
        (Step::Write { offset, value }, _) => device.write_config(offset.into(), &value.to_le_bytes()),
        (Step::Read { offset }, _) => device.read_config(offset.into(), &mut [0; 16]),
        (Step::Ask { queue }, Some(driver)) => {
            let queue = usize::from(queue) % driver.queues.len();
            driver.ask(queue, &[(0x1000, 56, false), (0x2000, 144, true)]);
        }
        (Step::Pairs { pairs }, Some(driver)) => {
            let command = [4, 0, pairs, 0];
            let view = vm_memory::GuestAddressSpace::memory(&driver.memory);
            let _ = vm_memory::Bytes::write_slice(&*view, &command, GuestAddress(0x3000));
            let last = driver.queues.len() - 1;
            driver.ask(last, &[(0x3000, 4, false), (0x4000, 1, true)]);
        }
        (Step::Rest, _) => thread::sleep(Duration::from_millis(1)),
        _ => {}
    }
}

fn connect(kind: &Kind, socket: &Path) -> Result<VhostUser, VhostUserError> {
    match *kind {
        Kind::Disk { queues } => block::new("disk", socket, u16::from(queues % 4) + 1, QUEUE_SIZE),
        Kind::FileSystem { queues } => fs::new("fs", "tag", socket, u16::from(queues % 4) + 1, QUEUE_SIZE),
        Kind::Generic { device_type, queues } => {
            let sizes = vec![QUEUE_SIZE; usize::from(queues % 4) + 1];
            generic::new("vu", DeviceType(device_type.into()), socket, sizes)
        }
        Kind::Net { pairs } => {
            let settings = net::NetSettings {
                socket: socket.into(),
                mode: Mode::Client,
                mac: [2, 0, 0, 0, 0, 1],
                mtu: None,
                num_queues: (u16::from(pairs % 3) + 1) * 2,
                queue_size: QUEUE_SIZE,
                tso: true,
                ufo: true,
                csum: true,
            };
            net::new("net", &settings)
        }
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// A backend that behaves serves a driver. A connection on which it has not may be used up for that, once.
fn serves_again(device: &VhostUser, backend: &Backend) {
    for _ in 0..3 {
        backend.rings.store(0, Ordering::Relaxed);
        let driver = Driver::start(device, false, false).expect("a device that starts");
        let most = device.queue_sizes().len();
        // The control queue is not the backend's.
        let rings = if device.device_type() == DeviceType::NET { most & !1 } else { most };
        let begun = Instant::now();
        while backend.rings.load(Ordering::Relaxed) < rings && begun.elapsed() < LONG / 8 {
            thread::sleep(Duration::from_micros(200));
        }
        driver.stop();
        if backend.rings.load(Ordering::Relaxed) >= rings {
            return;
        }
    }
    panic!("a backend that behaves is not used");
}

fn run(input: &Input) {
    static QUIET: Once = Once::new();
    // As in a program with Rust's own `main`: who writes to a socket without an end hears of it by an error.
    QUIET.call_once(|| {
        vmm_sys_util::signal::block_signal(libc::SIGPIPE).expect("a signal");
        // A length that the backend makes up must not become memory, not even memory that nobody touches.
        let limit = Rlimit { current: Some(ADDRESS_SPACE), maximum: Some(ADDRESS_SPACE) };
        setrlimit(Resource::As, limit).expect("a limit");
    });
    let directory = TempDir::new().expect("a directory");
    let socket = directory.as_path().join("socket");
    let listener = UnixListener::bind(&socket).expect("a socket");
    let mut answers = VecDeque::new();
    for step in &input.moves {
        match step {
            Move::Backend(answer) => answers.push_back(answer.clone()),
            Move::Honest { times } => answers.extend(vec![Answer::Right; usize::from(times % 4)]),
            Move::Driver(_) => {}
        }
    }
    let backend = Backend {
        answers: Mutex::new(answers),
        honest: AtomicBool::new(false),
        ended: AtomicBool::new(false),
        rings: AtomicUsize::new(0),
    };
    thread::scope(|scope| {
        scope.spawn(|| backend.serve(&listener));
        // Each failure uses up an answer at least.
        let device = loop {
            match connect(&input.kind, &socket) {
                Ok(device) => break device,
                Err(error) => assert!(error.to_string().contains("backend"), "{error}"),
            }
        };
        let mut driver = None;
        for step in &input.moves {
            if let Move::Driver(step) = step {
                take(&device, &mut driver, *step);
            }
        }
        backend.honest.store(true, Ordering::Relaxed);
        driver.into_iter().for_each(Driver::stop);
        serves_again(&device, &backend);
        drop(device);
        backend.ended.store(true, Ordering::Relaxed);
        UnixStream::connect(&socket).expect("a backend that accepts");
    });
}

fuzz_target!(|input: Input| {
    let before = descriptors();
    run(&input);
    assert_eq!(descriptors(), before, "descriptors are left");
});
