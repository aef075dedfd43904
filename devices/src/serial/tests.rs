//! The serial port against pipes, sockets, a pseudoterminal and an event loop, as the guest and the user see it.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};
use vmm_sys_util::tempdir::TempDir;

use super::output::BACKLOG;
use super::*;

const BASE: PioAddress = PioAddress(0x3f8);

/// A guest with a port, the irqfd's other end, and the event loop.
struct Machine {
    serial: Arc<Serial>,
    interrupt: EventFd,
    events: EventManager<Arc<dyn EventSubscriber>>,
}

impl Machine {
    fn new(backend: &Arc<Backend>) -> Self {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let serial = Arc::new(Serial::new(interrupt.try_clone().unwrap(), Arc::clone(backend)).unwrap());
        let mut events: EventManager<Arc<dyn EventSubscriber>> = EventManager::new().unwrap();
        events.add_subscriber(serial.clone());
        Self { serial, interrupt, events }
    }

    fn write(&self, offset: u16, value: u8) {
        self.serial.pio_write(BASE, offset, &[value]);
    }

    fn read(&self, offset: u16) -> u8 {
        let mut data = [0];
        self.serial.pio_read(BASE, offset, &mut data);
        data[0]
    }

    fn print(&self, text: &[u8]) {
        for byte in text {
            self.write(0, *byte);
        }
    }

    /// What a driver does when its port is opened.
    fn enable_input(&mut self) {
        self.write(u16::from(IER), IER_RECEIVED_DATA);
        self.run();
    }

    /// Runs the event loop until nothing happens any more.
    fn run(&mut self) {
        let start = Instant::now();
        while self.events.run_with_timeout(20).unwrap() > 0 {
            assert!(start.elapsed() < Duration::from_secs(10), "the event loop spins");
        }
    }

    /// What the guest's driver reads in the end, as [`receive`](Self::receive). A pseudoterminal passes bytes on when the
    /// kernel finds the time, which on a busy machine can be later than the event loop waits.
    fn receive_soon(&mut self, length: usize) -> Vec<u8> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut bytes = Vec::new();
        while bytes.len() < length && Instant::now() < deadline {
            bytes.extend(self.receive());
        }
        bytes
    }

    /// What the guest's driver reads: all there is, with the event loop running beside it.
    fn receive(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        loop {
            self.run();
            if self.read(5) & LSR_DATA_READY == 0 {
                return bytes;
            }
            while self.read(5) & LSR_DATA_READY != 0 {
                bytes.push(self.read(0));
            }
        }
    }
}

fn pipe() -> (File, OwnedFd) {
    let (reader, writer) = io::pipe().unwrap();
    (File::from(OwnedFd::from(reader)), writer.into())
}

/// A backend with a pipe for each direction, and their far ends: input, output.
fn piped() -> (Arc<Backend>, File, File) {
    let (input, far_input) = pipe();
    let (far_output, output) = pipe();
    let backend = Backend::from_descriptors(Some(input.into()), Some(output)).unwrap();
    (backend, File::from(far_input), far_output)
}

/// What is in a pipe or socket now.
fn available(file: &impl std::os::fd::AsFd) -> Vec<u8> {
    let stream = stream::Stream::owned(file.as_fd().try_clone_to_owned().unwrap()).unwrap();
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(count) = stream.read(&mut buffer) {
        if count == 0 {
            break;
        }
        bytes.extend_from_slice(&buffer[..count]);
    }
    bytes
}

fn socket_in(dir: &TempDir) -> PathBuf {
    dir.as_path().join("serial.sock")
}

#[test]
fn a_port_that_is_off_has_no_backend() {
    assert!(Backend::open(&SerialMode::Off).unwrap().is_none());
}

#[test]
fn the_first_byte_is_written_at_once() {
    let (backend, _input, output) = piped();
    let machine = Machine::new(&backend);
    machine.print(b"X");
    assert_eq!(available(&output), b"X");
}

#[test]
fn a_prompt_without_line_end_appears_without_more_output() {
    let (backend, _input, output) = piped();
    let mut machine = Machine::new(&backend);
    // The descriptor's first event as writable would flush as well.
    machine.run();
    machine.print(b"login: ");
    machine.run();
    assert_eq!(available(&output), b"login: ");
    // And the event loop is left alone afterwards.
    assert_eq!(machine.events.run_with_timeout(20).unwrap(), 0);
}

#[test]
fn lines_arrive_whole_and_in_order_without_the_event_loop() {
    let (backend, _input, output) = piped();
    let machine = Machine::new(&backend);
    let text: String =
        (0..500).map(|number| format!("[ 0.{number:03}] a line of the kernel's\r\n")).collect();
    machine.print(text.as_bytes());
    assert_eq!(String::from_utf8(available(&output)).unwrap(), text);
}

#[test]
fn a_reader_that_never_reads_costs_bounded_time_and_memory() {
    let (backend, _input, output) = piped();
    let mut machine = Machine::new(&backend);
    let start = Instant::now();
    for number in 0..40_000u32 {
        machine.print(format!("line {number:06}\n").as_bytes());
    }
    assert!(start.elapsed() < Duration::from_secs(20), "the vCPU waited {:?}", start.elapsed());
    assert!(backend.output().queued() <= BACKLOG);
    // It begins to read: what was kept arrives, the newest last.
    let mut text = String::new();
    loop {
        let more = available(&output);
        if more.is_empty() {
            break;
        }
        text.push_str(&String::from_utf8(more).unwrap());
        machine.run();
    }
    assert!(text.starts_with("line 000000\n") && text.ends_with("line 039999\n"), "{}", text.len());
    machine.print(b"alive\n");
    assert_eq!(available(&output), b"alive\n");
}

#[test]
fn a_reader_that_goes_away_does_not_stop_the_guest() {
    let (backend, _input, output) = piped();
    let machine = Machine::new(&backend);
    drop(output);
    for _ in 0..100 {
        machine.print(b"into the void\n");
    }
    assert_eq!(machine.read(5) & 0x60, 0x60);
}

#[test]
fn input_longer_than_the_fifo_arrives_whole() {
    let (backend, mut input, _output) = piped();
    let mut machine = Machine::new(&backend);
    machine.enable_input();
    let text: Vec<u8> = (0..1_000u32).flat_map(u32::to_le_bytes).collect();
    input.write_all(&text).unwrap();
    machine.run();
    assert!(machine.interrupt.read().is_ok());
    assert_eq!(machine.receive(), text);
}

#[test]
fn a_driver_that_leaves_bytes_in_the_fifo_is_told_of_them_when_it_asks_for_the_cause() {
    let (backend, mut far_input, _output) = piped();
    let mut machine = Machine::new(&backend);
    machine.enable_input();
    far_input.write_all(b"abc").unwrap();
    machine.run();
    let cause = |machine: &Machine| machine.read(u16::from(IIR)) & IIR_CAUSE;
    assert_eq!(cause(&machine), IIR_RECEIVED_DATA);
    for byte in b"abc" {
        assert_eq!(cause(&machine), IIR_RECEIVED_DATA, "there is more");
        assert_eq!(machine.read(0), *byte);
    }
    assert_eq!(cause(&machine), IIR_NONE);
}

#[test]
fn input_waits_in_the_host_while_the_guest_does_not_read() {
    let (backend, mut input, _output) = piped();
    let mut machine = Machine::new(&backend);
    machine.enable_input();
    input.write_all(&[b'a'; 1000]).unwrap();
    machine.run();
    // The event loop has nothing to do, although there is input.
    assert_eq!(machine.events.run_with_timeout(50).unwrap(), 0);
    assert_eq!(machine.receive().len(), 1000);
}

#[test]
fn input_from_before_the_guest_listens_is_not_lost_by_the_drivers_startup() {
    let (backend, mut input, _output) = piped();
    input.write_all(b"#!/bin/sh\n").unwrap();
    let mut machine = Machine::new(&backend);
    machine.run();
    // The driver empties the receiver, then enables its interrupt.
    for offset in [5, 0, 2, 6, 5, 0] {
        machine.read(offset);
    }
    machine.run();
    machine.enable_input();
    assert_eq!(machine.receive(), b"#!/bin/sh\n");
}

#[test]
fn a_guest_that_polls_gets_input_without_interrupts() {
    let (backend, mut input, _output) = piped();
    let mut machine = Machine::new(&backend);
    input.write_all(b"q").unwrap();
    for _ in 0..100 {
        machine.read(5);
    }
    assert_eq!(machine.receive(), b"q");
}

#[test]
fn loopback_keeps_the_hosts_input_waiting() {
    let (backend, mut input, output) = piped();
    let mut machine = Machine::new(&backend);
    machine.enable_input();
    machine.write(4, MCR_LOOPBACK);
    input.write_all(b"host").unwrap();
    machine.run();
    machine.write(0, b'g');
    assert_eq!(machine.read(0), b'g');
    machine.write(4, 0);
    assert_eq!(machine.receive(), b"host");
    assert_eq!(available(&output), b"");
}

#[test]
fn the_end_of_the_input_does_not_spin_and_output_goes_on() {
    let (backend, mut input, output) = piped();
    let mut machine = Machine::new(&backend);
    machine.enable_input();
    input.write_all(&[b'x'; 100]).unwrap();
    drop(input);
    machine.run();
    assert_eq!(machine.receive().len(), 100);
    assert_eq!(machine.events.run_with_timeout(50).unwrap(), 0);
    machine.print(b"still here\n");
    assert_eq!(available(&output), b"still here\n");
}

#[test]
fn input_from_a_regular_file_is_read_to_its_end() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("script");
    let text = vec![b's'; 500];
    fs::write(&path, &text).unwrap();
    let backend = Backend::from_descriptors(Some(File::open(&path).unwrap().into()), None).unwrap();
    let mut machine = Machine::new(&backend);
    machine.enable_input();
    assert_eq!(machine.receive(), text);
    assert_eq!(machine.events.run_with_timeout(20).unwrap(), 0);
}

#[test]
fn output_goes_to_the_file_and_replaces_what_was_there() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("log");
    fs::write(&path, "an old log, longer than the new one").unwrap();
    let backend = Backend::open(&SerialMode::File(path.clone())).unwrap().unwrap();
    let machine = Machine::new(&backend);
    machine.print(b"one\ntwo");
    drop((machine, backend));
    assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo");
    let error = Backend::open(&SerialMode::File(dir.as_path().join("no/such"))).unwrap_err();
    assert!(error.to_string().contains("no/such"), "{error}");
}

#[test]
fn a_fifo_without_reader_is_refused_rather_than_waited_for() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
    assert!(Backend::open(&SerialMode::File(path)).is_err());
}

#[test]
fn socket_clients_come_go_and_come_back() {
    let dir = TempDir::new().unwrap();
    let path = socket_in(&dir);
    let backend = Backend::open(&SerialMode::Socket(path.clone())).unwrap().unwrap();
    let mut machine = Machine::new(&backend);
    machine.enable_input();
    machine.print(b"nobody listens\n");
    for round in 0..3 {
        let mut client = UnixStream::connect(&path).unwrap();
        machine.run();
        machine.print(format!("hello {round}\n").as_bytes());
        assert_eq!(available(&client), format!("hello {round}\n").into_bytes());
        client.write_all(b"typed").unwrap();
        assert_eq!(machine.receive(), b"typed");
        drop(client);
        machine.run();
        machine.print(b"into the void\n");
    }
    drop((machine, backend));
    assert!(!path.exists());
}

#[test]
fn a_new_socket_client_replaces_the_old_one() {
    let dir = TempDir::new().unwrap();
    let backend = Backend::open(&SerialMode::Socket(socket_in(&dir))).unwrap().unwrap();
    let mut machine = Machine::new(&backend);
    let mut first = UnixStream::connect(socket_in(&dir)).unwrap();
    machine.run();
    let second = UnixStream::connect(socket_in(&dir)).unwrap();
    machine.run();
    machine.print(b"to the second\n");
    assert_eq!(available(&second), b"to the second\n");
    let mut rest = Vec::new();
    first.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"");
}

#[test]
fn a_stale_socket_is_taken_over_and_one_in_use_is_not() {
    let dir = TempDir::new().unwrap();
    let mode = SerialMode::Socket(socket_in(&dir));
    drop(std::os::unix::net::UnixListener::bind(socket_in(&dir)).unwrap());
    let backend = Backend::open(&mode).unwrap();
    assert!(Backend::open(&mode).is_err());
    drop(backend);
    fs::write(socket_in(&dir), "a file").unwrap();
    assert!(Backend::open(&mode).is_err());
    assert_eq!(fs::read_to_string(socket_in(&dir)).unwrap(), "a file");
}

#[test]
fn a_pty_carries_bytes_both_ways_unchanged_and_never_blocks() {
    let backend = Backend::open(&SerialMode::Pty).unwrap().unwrap();
    let path = backend.pty_path().unwrap().to_owned();
    let mut machine = Machine::new(&backend);
    machine.enable_input();
    let start = Instant::now();
    for _ in 0..20_000 {
        machine.print(b"nobody reads this\n");
    }
    assert!(start.elapsed() < Duration::from_secs(10));
    let mut far = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut seen = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(10);
    machine.print(b"last\r\n");
    while !seen.ends_with(b"last\r\n") {
        assert!(Instant::now() < deadline, "{} bytes", seen.len());
        seen.extend(available(&far));
        machine.run();
    }
    assert!(seen.starts_with(b"nobody reads this\n"));
    far.write_all(b"a\x03\x04\r\n").unwrap();
    assert_eq!(machine.receive_soon(b"a\x03\x04\r\n".len()), b"a\x03\x04\r\n");
    // A program that closes the far end does not hang it up.
    drop(far);
    machine.run();
    let mut again = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    again.write_all(b"b").unwrap();
    assert_eq!(machine.receive_soon(b"b".len()), b"b");
}

#[test]
fn a_reboot_keeps_the_connection_and_the_input_that_was_not_taken() {
    let dir = TempDir::new().unwrap();
    let backend = Backend::open(&SerialMode::Socket(socket_in(&dir))).unwrap().unwrap();
    let mut machine = Machine::new(&backend);
    let mut client = UnixStream::connect(socket_in(&dir)).unwrap();
    machine.run();
    client.write_all(b"for the next boot").unwrap();
    machine.run();
    drop(machine);
    let mut machine = Machine::new(&backend);
    machine.run();
    machine.enable_input();
    assert_eq!(machine.receive(), b"for the next boot");
    machine.print(b"second boot\n");
    assert_eq!(available(&client), b"second boot\n");
}

#[test]
fn odd_accesses_read_all_ones_and_are_dropped() {
    let (backend, _input, output) = piped();
    let machine = Machine::new(&backend);
    for (offset, size) in [(0, 2), (0, 4), (5, 2), (8, 1), (u16::MAX, 1), (0x100, 1), (5, 0)] {
        let mut data = vec![0; size];
        machine.serial.pio_read(BASE, offset, &mut data);
        assert_eq!(data, vec![0xff; size], "{offset} {size}");
        machine.serial.pio_write(BASE, offset, &vec![b'!'; size]);
    }
    assert_eq!(available(&output), b"");
}

#[test]
fn the_scratch_register_makes_linux_see_a_16550() {
    let backend = Backend::open(&SerialMode::Null).unwrap().unwrap();
    let machine = Machine::new(&backend);
    machine.write(7, 0x5a);
    assert_eq!(machine.read(7), 0x5a);
    machine.write(2, 0x01);
    assert_eq!(machine.read(2) & 0xc0, 0xc0);
    assert_eq!(machine.read(5), 0x60);
}
