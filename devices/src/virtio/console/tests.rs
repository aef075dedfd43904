//! Tests of the console device, with a driver's rings on one side and real files, sockets and pseudoterminals on the other.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::termios::{Winsize, tcsetwinsize};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::serial::SerialMode;
use crate::virtio::Memory;
use crate::virtio::ring::RingFeatures;
use crate::virtio::testing::{DriverQueue, Interrupts, activation, forms, memory};

const BUFFERS: u64 = 0x10_0000;
const INPUT_LEN: u32 = 64;
const OUTPUT_BUFFER: u64 = 0x20_0000;
const PLAIN: RingFeatures = RingFeatures { packed: false, event_idx: true, indirect: true };

/// A guest's driver, and its device.
struct Guest {
    memory: Memory,
    rx: DriverQueue,
    tx: DriverQueue,
    interrupts: Arc<Interrupts>,
    device: Console,
    active: Option<Box<dyn Active>>,
}

impl Guest {
    fn new(mode: &SerialMode, features: RingFeatures) -> Self {
        Self::over(Backend::open(mode).unwrap().unwrap(), None, features)
    }

    fn over(backend: Arc<Backend>, resized: Option<UnixStream>, features: RingFeatures) -> Self {
        let memory = memory();
        let mut guest = Self {
            rx: DriverQueue::new(&memory, 0x1_0000, QUEUE_SIZE, features),
            tx: DriverQueue::new(&memory, 0x2_0000, QUEUE_SIZE, features),
            memory,
            interrupts: Arc::default(),
            device: Console::new("__console", backend, resized),
            active: None,
        };
        guest.activate();
        guest
    }

    /// As a new driver, after a reset.
    fn activate(&mut self) {
        self.active = None;
        let interrupt = Arc::clone(&self.interrupts) as Arc<dyn Interrupt>;
        let queues = [
            self.rx.device_side(RX, Arc::clone(&interrupt)).unwrap(),
            self.tx.device_side(TX, interrupt).unwrap(),
        ];
        let empty = activation(&self.memory, self.device.features(), &[], &self.interrupts);
        self.active = Some(self.device.activate(Activation { queues: queues.into(), ..empty }).unwrap());
    }

    fn print(&mut self, text: &[u8]) {
        self.memory.memory().write_slice(text, GuestAddress(OUTPUT_BUFFER)).unwrap();
        self.tx.add(&[(OUTPUT_BUFFER, u32::try_from(text.len()).unwrap(), false)]);
        self.tx.ring();
        assert!(self.tx.wait_used().is_some(), "the output is not taken");
    }

    /// Gives the device one buffer for input.
    fn post(&mut self) {
        self.rx.add(&[(BUFFERS, INPUT_LEN, true)]);
        self.rx.ring();
    }

    /// What comes into that buffer.
    fn input(&mut self) -> Vec<u8> {
        let (_, written) = self.rx.wait_used().expect("input");
        let mut bytes = vec![0; usize::try_from(written).unwrap()];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(BUFFERS)).unwrap();
        bytes
    }

    fn input_of(&mut self, len: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < len {
            self.post();
            all.extend(self.input());
        }
        all
    }

    fn size(&self) -> [u8; 4] {
        let mut bytes = [0; 4];
        self.device.read_config(0, &mut bytes);
        bytes
    }

    fn lives(&self) {
        assert_eq!(self.interrupts.seen().stopped, Vec::<String>::new());
    }
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: not within 10 s");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn output_goes_to_the_file_whole_and_in_order() {
    for form in forms() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("console");
        let mut guest = Guest::new(&SerialMode::File(path.clone()), form);
        let text: String = (0..3000).map(|number| format!("line {number}\n")).collect();
        for piece in text.as_bytes().chunks(997) {
            guest.print(piece);
        }
        guest.active = None;
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
        guest.lives();
    }
}

#[test]
fn a_prompt_without_line_end_appears() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("console");
    let mut guest = Guest::new(&SerialMode::File(path.clone()), PLAIN);
    for piece in ["lo", "gin", ": "] {
        guest.print(piece.as_bytes());
    }
    wait_until("the prompt", || fs::read(&path).unwrap() == b"login: ");
}

#[test]
fn a_console_that_leads_nowhere_takes_output_and_has_no_input() {
    let mut guest = Guest::new(&SerialMode::Null, PLAIN);
    guest.post();
    for _ in 0..100 {
        guest.print(&[b'x'; 4096]);
    }
    assert_eq!(guest.rx.used(), None);
    assert_eq!(guest.device.features() & F_SIZE, 0);
    guest.lives();
}

#[test]
fn clients_of_the_socket_come_and_go_and_talk_both_ways() {
    for form in forms() {
        let dir = TempDir::new().unwrap();
        let path = dir.as_path().join("console");
        let mut guest = Guest::new(&SerialMode::Socket(path.clone()), form);
        guest.print(b"nobody is there\n");
        for round in 0..3 {
            let mut client = UnixStream::connect(&path).unwrap();
            client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let typed = format!("typed {round}");
            client.write_all(typed.as_bytes()).unwrap();
            assert_eq!(guest.input_of(typed.len()), typed.as_bytes());
            guest.print(b"echo\n");
            let mut bytes = [0; 5];
            client.read_exact(&mut bytes).unwrap();
            assert_eq!(&bytes, b"echo\n");
        }
        guest.lives();
        drop(guest);
        assert!(!path.exists());
    }
}

#[test]
fn input_waits_until_the_driver_has_buffers_and_outlives_its_reset() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("console");
    let mut guest = Guest::new(&SerialMode::Socket(path.clone()), PLAIN);
    let mut client = UnixStream::connect(&path).unwrap();
    let text: String = (0..10_000).map(|number| format!("{number} ")).collect();
    client.write_all(text.as_bytes()).unwrap();
    let mut all = guest.input_of(1000);
    for queue in [0x1_0000, 0x2_0000] {
        guest.memory.memory().write_slice(&[0; 0x8000], GuestAddress(queue)).unwrap();
    }
    guest.active = None;
    guest.rx = DriverQueue::new(&guest.memory, 0x1_0000, QUEUE_SIZE, PLAIN);
    guest.tx = DriverQueue::new(&guest.memory, 0x2_0000, QUEUE_SIZE, PLAIN);
    guest.activate();
    all.extend(guest.input_of(text.len() - all.len()));
    assert_eq!(String::from_utf8(all).unwrap(), text);
    guest.lives();
}

#[test]
fn a_pseudoterminal_carries_bytes_both_ways_and_its_size_reaches_the_driver() {
    let backend = Backend::open(&SerialMode::Pty).unwrap().unwrap();
    let mut guest = Guest::over(backend, None, PLAIN);
    let path = guest.device.terminal().unwrap();
    assert_eq!(guest.device.features() & F_SIZE, F_SIZE);
    assert_eq!(guest.size(), [0; 4]);
    let mut far = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&path).unwrap();
    guest.print(b"hello\n");
    let mut bytes = [0; 6];
    far.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello\n");
    tcsetwinsize(&far, Winsize { ws_row: 40, ws_col: 132, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    far.write_all(b"ls\r").unwrap();
    assert_eq!(guest.input_of(3), b"ls\r");
    assert_eq!((guest.size(), guest.interrupts.seen().config), ([132, 0, 40, 0], 1));
    guest.lives();
}

#[test]
fn a_terminal_nobody_reads_does_not_hold_up_the_driver() {
    let mut guest = Guest::new(&SerialMode::Pty, PLAIN);
    let start = Instant::now();
    for _ in 0..200 {
        guest.print(&[b'x'; 4096]);
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    guest.lives();
}

#[test]
fn a_terminal_of_another_size_is_told_of_by_its_signal() {
    let backend = Backend::open(&SerialMode::Pty).unwrap().unwrap();
    let (mut signal, resized) = UnixStream::pair().unwrap();
    resized.set_nonblocking(true).unwrap();
    let guest = Guest::over(backend, Some(resized), PLAIN);
    let far = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(guest.device.terminal().unwrap())
        .unwrap();
    for (round, columns) in (1..).zip([80, 81]) {
        tcsetwinsize(&far, Winsize { ws_row: 25, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        signal.write_all(b"X").unwrap();
        wait_until("the change", || guest.interrupts.seen().config == round);
        assert_eq!(u16::from(guest.size()[0]), columns);
    }
    // A signal without a change is none.
    signal.write_all(b"X").unwrap();
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(guest.interrupts.seen().config, 2);
    guest.lives();
}

#[test]
fn a_chain_that_names_the_same_memory_again_and_again_is_cut_short() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("console");
    let mut guest = Guest::new(&SerialMode::File(path.clone()), PLAIN);
    // 200 times 4 MiB of the guest's memory.
    guest.tx.add(&[(0x30_0000, 4 << 20, false); 200]);
    guest.tx.ring();
    assert!(guest.tx.wait_used().is_some());
    guest.active = None;
    assert_eq!(fs::metadata(&path).unwrap().len(), CHAIN_BYTES_MAX as u64);
    guest.lives();
}

#[test]
fn chains_for_the_other_direction_go_back_unused() {
    let mut guest = Guest::new(&SerialMode::Null, PLAIN);
    guest.tx.add(&[(OUTPUT_BUFFER, 64, true)]);
    guest.tx.ring();
    assert_eq!(guest.tx.wait_used().unwrap().1, 0);
    guest.rx.add(&[(BUFFERS, 64, false)]);
    guest.rx.ring();
    assert_eq!(guest.rx.wait_used().unwrap().1, 0);
    guest.lives();
}

#[test]
fn a_broken_ring_stops_the_console_and_the_next_driver_has_it_again() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("console");
    let mut guest = Guest::new(&SerialMode::File(path.clone()), PLAIN);
    guest.tx.set_available_index(0x7000);
    guest.tx.ring();
    wait_until("the stop", || !guest.interrupts.seen().stopped.is_empty());
    guest.active = None;
    guest.memory.memory().write_slice(&[0; 0x8000], GuestAddress(0x2_0000)).unwrap();
    guest.tx = DriverQueue::new(&guest.memory, 0x2_0000, QUEUE_SIZE, PLAIN);
    guest.activate();
    guest.print(b"again\n");
    guest.active = None;
    assert_eq!(fs::read(&path).unwrap(), b"again\n");
}
