//! Tests of the socket device, with a driver's rings on one side and Unix sockets on the other.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::tempdir::TempDir;

use super::connection::ROOM;
use super::packet::{HOST_CID, STREAM, op, shutdown};
use super::*;
use crate::virtio::ring::RingFeatures;
use crate::virtio::testing::{DriverQueue, Interrupts, activation, forms, memory};

const CID: u64 = 42;
/// Where buffers are: those of the receive queue, then the one for sending.
const RX_BUFFERS: u64 = 0x10_0000;
const RX_LEN: u32 = 4096;
const TX_BUFFER: u64 = 0x40_0000;

/// A guest's driver, and its device.
struct Guest {
    memory: crate::virtio::Memory,
    queues: Vec<DriverQueue>,
    /// Addresses of the buffers in the receive queue, by chain.
    posted: Vec<Option<u64>>,
    interrupts: Arc<Interrupts>,
    active: Option<Box<dyn Active>>,
    device: Vsock,
    dir: TempDir,
    /// What the device has taken of each connection's data is in its headers; the driver's own count of what it took goes there.
    fwd_cnt: u32,
    buf_alloc: u32,
}

const PLAIN: RingFeatures = RingFeatures { packed: false, event_idx: true, indirect: true };

impl Guest {
    fn new(features: RingFeatures) -> Self {
        let dir = TempDir::new().unwrap();
        let device = Vsock::new("vsock", 42, &dir.as_path().join("v")).unwrap();
        let memory = memory();
        let queues: Vec<_> = [0x1_0000, 0x2_0000, 0x3_0000]
            .map(|base| DriverQueue::new(&memory, base, QUEUE_SIZE, features))
            .into();
        let interrupts = Arc::new(Interrupts::default());
        let mut guest = Self {
            memory,
            queues,
            posted: vec![None; usize::from(QUEUE_SIZE)],
            interrupts,
            active: None,
            device,
            dir,
            fwd_cnt: 0,
            buf_alloc: 1 << 20,
        };
        guest.activate();
        guest
    }

    fn activate(&mut self) {
        let activation = activation(&self.memory, F_RINGS, &self.queues, &self.interrupts);
        self.active = Some(self.device.activate(activation).unwrap());
    }

    fn path(&self) -> PathBuf {
        self.dir.as_path().join("v")
    }

    fn server(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.as_path().join(format!("v_{port}"))).unwrap()
    }

    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.path()).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client
    }

    /// Gives the device buffers to receive with.
    fn post(&mut self, count: u64) {
        for number in 0..count {
            let address = RX_BUFFERS + number * u64::from(RX_LEN);
            let id = self.queues[0].add(&[(address, RX_LEN, true)]);
            self.posted[usize::from(id)] = Some(address);
        }
        self.queues[0].ring();
    }

    /// The next packet from the device, whose buffer is posted again.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let (id, written) = self.queues[0].wait_used()?;
        let address = self.posted[usize::from(id)].take().unwrap();
        let mut bytes = vec![0; usize::try_from(written).unwrap()];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        let again = self.queues[0].add(&[(address, RX_LEN, true)]);
        self.posted[usize::from(again)] = Some(address);
        self.queues[0].ring();
        let header = Header::from_bytes(bytes[..HEADER_LEN].try_into().unwrap());
        assert_eq!(usize::try_from(header.len).unwrap(), bytes.len() - HEADER_LEN);
        assert_eq!(header.dst_cid, CID);
        Some((header, bytes.split_off(HEADER_LEN)))
    }

    /// The next packet, which must be this.
    fn expect(&mut self, op: u16) -> (Header, Vec<u8>) {
        let (header, data) = self.receive().expect("a packet from the device");
        assert_eq!(header.op, op, "{header:?}");
        (header, data)
    }

    fn send_raw(&mut self, bytes: &[u8]) {
        self.memory.memory().write_slice(bytes, GuestAddress(TX_BUFFER)).unwrap();
        // The header and the data in buffers of their own, as Linux has them.
        let (head, rest) = bytes.split_at(bytes.len().min(HEADER_LEN));
        let mut parts = vec![(TX_BUFFER, u32::try_from(head.len()).unwrap(), false)];
        if !rest.is_empty() {
            let address = TX_BUFFER + u64::try_from(head.len()).unwrap();
            parts.push((address, u32::try_from(rest.len()).unwrap(), false));
        }
        self.queues[1].add(&parts);
        self.queues[1].ring();
        self.queues[1].wait_used().expect("the device takes a packet");
    }

    fn header(&self, op: u16, host_port: u32, guest_port: u32) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: guest_port,
            dst_port: host_port,
            kind: STREAM,
            op,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let header = Header { len: u32::try_from(data.len()).unwrap(), ..header };
        self.send_raw(&[&header.to_bytes()[..], data].concat());
    }

    /// Connects to a server of the host; its end.
    fn connect(&mut self, server: &UnixListener, port: u32, guest_port: u32) -> UnixStream {
        self.send(self.header(op::REQUEST, port, guest_port), &[]);
        let (response, _) = self.expect(op::RESPONSE);
        assert_eq!((response.src_port, response.dst_port, response.buf_alloc), (port, guest_port, ROOM));
        let (stream, _) = server.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }

    /// A client of the host reaches the guest's port 52; it, and the port it has on the host's side.
    fn accept(&mut self) -> (UnixStream, u32) {
        let mut client = self.client();
        client.write_all(b"CONNECT 52\n").unwrap();
        let (request, _) = self.expect(op::REQUEST);
        assert_eq!((request.src_cid, request.dst_port), (HOST_CID, 52));
        self.send(self.header(op::RESPONSE, request.src_port, 52), &[]);
        let reply = format!("OK {}\n", request.src_port);
        let mut bytes = vec![0; reply.len()];
        client.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, reply.as_bytes());
        (client, request.src_port)
    }

    fn lives(&self) {
        assert_eq!(self.interrupts.seen().stopped, Vec::<String>::new());
    }
}

fn closed(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(0) => true,
        Err(e) => e.kind() == io::ErrorKind::ConnectionReset,
        Ok(_) => false,
    }
}

#[test]
fn a_client_of_the_host_reaches_the_guest_and_both_halves_end_in_order() {
    for form in forms() {
        let mut guest = Guest::new(form);
        guest.post(8);
        let (mut client, port) = guest.accept();
        client.write_all(b"to the guest").unwrap();
        let (header, data) = guest.expect(op::RW);
        assert_eq!((header.src_port, header.dst_port, data.as_slice()), (port, 52, &b"to the guest"[..]));
        guest.send(guest.header(op::RW, port, 52), b"to the host");
        let mut bytes = [0; 11];
        client.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"to the host");

        client.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(guest.expect(op::SHUTDOWN).0.flags, shutdown::SEND);
        // The other half goes on.
        guest.send(guest.header(op::RW, port, 52), b"late");
        client.read_exact(&mut bytes[..4]).unwrap();
        assert_eq!(&bytes[..4], b"late");
        let end = Header { flags: shutdown::BOTH, ..guest.header(op::SHUTDOWN, port, 52) };
        guest.send(end, &[]);
        guest.expect(op::RST);
        assert!(closed(&mut client));
        guest.lives();
    }
}

#[test]
fn the_guest_reaches_a_server_of_the_host_and_its_half_close_arrives() {
    for form in forms() {
        let mut guest = Guest::new(form);
        guest.post(8);
        let server = guest.server(1234);
        let mut stream = guest.connect(&server, 1234, 7);
        guest.send(guest.header(op::RW, 1234, 7), b"question");
        let end = Header { flags: shutdown::SEND, ..guest.header(op::SHUTDOWN, 1234, 7) };
        guest.send(end, &[]);
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "question");
        stream.write_all(b"answer").unwrap();
        drop(stream);
        assert_eq!(guest.expect(op::RW).1, b"answer");
        assert_eq!(guest.expect(op::SHUTDOWN).0.flags, shutdown::BOTH);
        guest.send(guest.header(op::RST, 1234, 7), &[]);
        // The port is free again.
        drop(guest.connect(&server, 1234, 7));
        guest.lives();
    }
}

#[test]
fn what_is_unknown_is_reset_and_resets_are_not_answered() {
    let mut guest = Guest::new(PLAIN);
    guest.post(8);
    let nobody = guest.header(op::REQUEST, 99, 7);
    let cases = [
        nobody,
        guest.header(op::RW, 99, 7),
        guest.header(op::SHUTDOWN, 99, 7),
        guest.header(op::CREDIT_REQUEST, 99, 7),
        guest.header(77, 99, 7),
        Header { kind: 2, ..nobody },
        Header { dst_cid: 1, ..nobody },
        Header { dst_cid: u64::MAX, ..nobody },
    ];
    for case in cases {
        guest.send(guest.header(op::RST, 98, 7), &[]);
        guest.send(Header { src_cid: 3, ..nobody }, &[]);
        guest.send(case, &[]);
        let (header, _) = guest.expect(op::RST);
        assert_eq!(header, Header { dst_cid: CID, ..case.refusal() }, "{case:?}");
    }
    guest.lives();
}

#[test]
fn an_operation_that_a_connection_does_not_know_ends_it() {
    for wrong in [op::REQUEST, op::RESPONSE, 0, 8, u16::MAX] {
        let mut guest = Guest::new(PLAIN);
        guest.post(8);
        let server = guest.server(5);
        let mut stream = guest.connect(&server, 5, 7);
        guest.send(guest.header(wrong, 5, 7), &[]);
        guest.expect(op::RST);
        assert!(closed(&mut stream));
        guest.lives();
    }
}

#[test]
fn data_flows_to_the_guest_no_faster_than_it_has_room() {
    let mut guest = Guest::new(PLAIN);
    guest.post(64);
    guest.buf_alloc = 10_000;
    let server = guest.server(5);
    let mut stream = guest.connect(&server, 5, 7);
    let data: Vec<u8> = (0..100_000_u32).map(|n| n.to_le_bytes()[1] ^ n.to_le_bytes()[0]).collect();
    let sent = data.clone();
    let writer = std::thread::spawn(move || {
        stream.write_all(&sent).unwrap();
        stream
    });
    let mut received = Vec::new();
    let mut asked = 0;
    while received.len() < data.len() {
        let (header, piece) = guest.receive().expect("data, or a question for room");
        received.extend(piece);
        let taken = u32::try_from(received.len()).unwrap();
        assert!(taken - guest.fwd_cnt <= guest.buf_alloc, "more than there is room for");
        if header.op == op::CREDIT_REQUEST {
            asked += 1;
            guest.fwd_cnt = taken;
            guest.send(guest.header(op::CREDIT_UPDATE, 5, 7), &[]);
        }
    }
    assert_eq!(received, data);
    assert!(asked >= 9, "asked {asked} times");
    drop(writer.join().unwrap());
    guest.lives();
}

#[test]
fn a_host_that_does_not_read_holds_up_the_guest_and_gets_all_of_it_in_the_end() {
    let mut guest = Guest::new(PLAIN);
    guest.post(64);
    let server = guest.server(5);
    let mut stream = guest.connect(&server, 5, 7);
    // The socket's own buffer first, which the device hands on; then the device's.
    let piece = vec![0x5a; 32 << 10];
    let (mut sent, mut taken) = (0_u32, 0);
    let start = Instant::now();
    while sent - taken + 32 * 1024 <= ROOM {
        guest.send(guest.header(op::RW, 5, 7), &piece);
        sent += 32 * 1024;
        guest.send(guest.header(op::CREDIT_REQUEST, 5, 7), &[]);
        taken = guest.expect(op::CREDIT_UPDATE).0.fwd_cnt;
        assert!(start.elapsed() < Duration::from_secs(20), "the device takes everything");
    }
    assert!(sent > ROOM);
    // The guest ends its half and forgets the connection, as Linux does 8 s after close(2).
    let end = Header { flags: shutdown::BOTH, ..guest.header(op::SHUTDOWN, 5, 7) };
    guest.send(end, &[]);
    guest.send(guest.header(op::RST, 5, 7), &[]);
    // Its port can be used again although the host has not got everything yet.
    let mut again = guest.connect(&server, 5, 7);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), usize::try_from(sent).unwrap());
    guest.send(guest.header(op::RW, 5, 7), b"new");
    let mut bytes = [0; 3];
    again.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"new");
    guest.lives();
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_is_reset() {
    let mut guest = Guest::new(PLAIN);
    guest.post(64);
    let server = guest.server(5);
    let mut stream = guest.connect(&server, 5, 7);
    let piece = vec![1; 64 << 10];
    let mut reset = false;
    for _ in 0..40 {
        guest.send(guest.header(op::RW, 5, 7), &piece);
        if guest.queues[0].layout.size > 0
            && let Some((header, _)) = try_receive(&mut guest)
            && header.op == op::RST
        {
            reset = true;
            break;
        }
    }
    assert!(reset, "40 pieces of 64 KiB were taken");
    // Whole pieces only, and not what came too much.
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert!(all.len() <= 39 * piece.len());
    let huge = Header { len: u32::MAX, ..guest.header(op::RW, 5, 7) };
    guest.send_raw(&huge.to_bytes());
    guest.lives();
}

/// A packet that is there already, of those that matter.
fn try_receive(guest: &mut Guest) -> Option<(Header, Vec<u8>)> {
    std::thread::sleep(Duration::from_millis(5));
    let (id, written) = guest.queues[0].used()?;
    let address = guest.posted[usize::from(id)].take()?;
    let mut bytes = vec![0; usize::try_from(written).ok()?];
    guest.memory.memory().read_slice(&mut bytes, GuestAddress(address)).ok()?;
    Some((Header::from_bytes(bytes[..HEADER_LEN].try_into().ok()?), bytes.split_off(HEADER_LEN)))
}

#[test]
fn packets_that_are_not_whole_are_dropped() {
    let mut guest = Guest::new(PLAIN);
    guest.post(8);
    let server = guest.server(5);
    let mut stream = guest.connect(&server, 5, 7);
    guest.send_raw(&[1; 10]);
    let lie = Header { len: 100, ..guest.header(op::RW, 5, 7) };
    guest.send_raw(&[&lie.to_bytes()[..], &[0; 99]].concat());
    // A chain without anything to read, and a buffer too small for a header.
    guest.queues[1].add(&[(TX_BUFFER, 64, true)]);
    guest.queues[1].ring();
    assert_eq!(guest.queues[1].wait_used().unwrap().1, 0);
    guest.send(guest.header(op::RW, 5, 7), b"x");
    let mut byte = [0];
    stream.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"x");
    guest.lives();
}

#[test]
fn buffers_too_small_for_a_packet_go_back_unused() {
    let mut guest = Guest::new(PLAIN);
    let id = guest.queues[0].add(&[(RX_BUFFERS, 44, true)]);
    guest.posted[usize::from(id)] = Some(RX_BUFFERS);
    guest.send(guest.header(op::RW, 5, 7), &[]);
    assert_eq!(guest.queues[0].wait_used().unwrap().1, 0);
    guest.post(1);
    guest.expect(op::RST);
    guest.lives();
}

#[test]
fn clients_that_talk_nonsense_are_sent_away_and_silent_ones_disturb_nobody() {
    let mut guest = Guest::new(PLAIN);
    guest.post(8);
    let silent: Vec<_> = (0..3).map(|_| guest.client()).collect();
    let mut half = guest.client();
    half.write_all(b"CONNECT").unwrap();
    for nonsense in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"CONNECT x\n", b"CONNECT 4294967296\n", &[0; 100]] {
        let mut client = guest.client();
        client.write_all(nonsense).unwrap();
        assert!(closed(&mut client), "{nonsense:?}");
    }
    drop(guest.client());
    drop(guest.accept());
    guest.expect(op::SHUTDOWN);
    drop(silent);
    half.write_all(b" 60\n").unwrap();
    assert_eq!(guest.expect(op::REQUEST).0.dst_port, 60);
    guest.lives();
}

#[test]
fn the_oldest_silent_client_makes_room_for_the_next() {
    let mut guest = Guest::new(PLAIN);
    guest.post(8);
    let mut silent: Vec<_> = (0..100).map(|_| guest.client()).collect();
    drop(guest.accept());
    assert!(closed(&mut silent[0]));
    silent[99].set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    assert!(!matches!(silent[99].read(&mut [0]), Ok(0)), "the last one is still there");
}

#[test]
fn a_client_that_the_guest_refuses_or_that_leaves_is_done_with() {
    let mut guest = Guest::new(PLAIN);
    guest.post(8);
    let mut client = guest.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    let (request, _) = guest.expect(op::REQUEST);
    guest.send(guest.header(op::RST, request.src_port, 1), &[]);
    assert!(closed(&mut client));
    let mut client = guest.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    guest.expect(op::REQUEST);
    drop(client);
    guest.expect(op::RST);
    guest.lives();
}

#[test]
fn what_a_client_says_before_the_guest_answers_is_kept_for_it() {
    let mut guest = Guest::new(PLAIN);
    guest.post(8);
    let mut client = guest.client();
    client.write_all(b"CONNECT 52\nhello").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let (request, _) = guest.expect(op::REQUEST);
    guest.send(guest.header(op::RESPONSE, request.src_port, 52), &[]);
    assert_eq!(guest.expect(op::RW).1, b"hello");
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, shutdown::SEND);
}

#[test]
fn a_guest_without_buffers_cannot_make_answers_pile_up() {
    let mut guest = Guest::new(PLAIN);
    let header = guest.header(op::RW, 5, 7).to_bytes();
    guest.memory.memory().write_slice(&header, GuestAddress(TX_BUFFER)).unwrap();
    let mut taken = 0;
    for _ in 0..600 {
        guest.queues[1].add(&[(TX_BUFFER, 44, false)]);
        guest.queues[1].ring();
        let deadline = Instant::now() + Duration::from_millis(300);
        let came_back = loop {
            match guest.queues[1].used() {
                Some(_) => break true,
                None if Instant::now() > deadline => break false,
                None => std::thread::yield_now(),
            }
        };
        if !came_back {
            break;
        }
        taken += 1;
    }
    assert!((200..400).contains(&taken), "{taken} packets were taken");
    // With buffers it goes on where it stopped.
    guest.post(64);
    for _ in 0..taken {
        guest.expect(op::RST);
    }
    assert!(guest.queues[1].wait_used().is_some());
    guest.expect(op::RST);
    guest.lives();
}

#[test]
fn many_connections_live_side_by_side() {
    let mut guest = Guest::new(PLAIN);
    guest.post(128);
    let server = guest.server(5);
    let mut streams: Vec<_> = (0..200).map(|port| guest.connect(&server, 5, port)).collect();
    for (port, stream) in (0..).zip(&mut streams) {
        stream.write_all(format!("for {port}").as_bytes()).unwrap();
        let (header, data) = guest.expect(op::RW);
        assert_eq!((header.dst_port, data), (port, format!("for {port}").into_bytes()));
    }
    guest.lives();
}

#[test]
fn a_reset_of_the_device_ends_connections_and_the_next_driver_starts_anew() {
    let mut guest = Guest::new(PLAIN);
    guest.post(8);
    let (mut client, _) = guest.accept();
    guest.active = None;
    assert!(closed(&mut client));
    // Who comes while no driver is there waits.
    let mut early = guest.client();
    early.write_all(b"CONNECT 9\n").unwrap();
    guest.queues = [0x1_0000, 0x2_0000, 0x3_0000]
        .map(|base| {
            guest.memory.memory().write_slice(&[0; 0x8000], GuestAddress(base)).unwrap();
            DriverQueue::new(&guest.memory, base, QUEUE_SIZE, PLAIN)
        })
        .into();
    guest.activate();
    guest.post(8);
    assert_eq!(guest.expect(op::REQUEST).0.dst_port, 9);
    guest.lives();
}

#[test]
fn a_pause_holds_everything_and_loses_nothing() {
    let mut guest = Guest::new(PLAIN);
    guest.post(8);
    let (mut client, _) = guest.accept();
    guest.active.as_ref().unwrap().pause();
    client.write_all(b"meanwhile").unwrap();
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(guest.queues[0].used(), None);
    guest.active.as_ref().unwrap().resume();
    assert_eq!(guest.expect(op::RW).1, b"meanwhile");
}

#[test]
fn a_restored_guest_is_told_once_that_its_connections_are_gone() {
    let mut guest = Guest::new(PLAIN);
    guest.active = None;
    guest.device.restore(&Saved::Null).unwrap();
    guest.activate();
    for told in [true, false] {
        guest.memory.memory().write_slice(&[0xff; 4], GuestAddress(TX_BUFFER)).unwrap();
        guest.queues[2].add(&[(TX_BUFFER, 4, true)]);
        guest.queues[2].ring();
        if told {
            assert_eq!(guest.queues[2].wait_used().unwrap().1, 4);
            let event: u32 = guest.memory.memory().read_obj(GuestAddress(TX_BUFFER)).unwrap();
            assert_eq!(event, TRANSPORT_RESET);
        } else {
            std::thread::sleep(Duration::from_millis(30));
            assert_eq!(guest.queues[2].used(), None);
        }
    }
}

#[test]
fn a_broken_ring_stops_the_device_and_no_more() {
    let mut guest = Guest::new(PLAIN);
    guest.post(8);
    let (mut client, _) = guest.accept();
    guest.queues[1].set_available_index(0x4000);
    guest.queues[1].ring();
    let deadline = Instant::now() + Duration::from_secs(10);
    while guest.interrupts.seen().stopped.is_empty() {
        assert!(Instant::now() < deadline, "the device goes on");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(guest.interrupts.seen().stopped[0].contains("available index"));
    guest.active = None;
    assert!(closed(&mut client));
}

#[test]
fn the_configuration_is_the_guests_number() {
    let dir = TempDir::new().unwrap();
    let device = Vsock::new("vsock", 0x0102_0304, &dir.as_path().join("v")).unwrap();
    let read = |offset| {
        let mut data = [0; 4];
        device.read_config(offset, &mut data);
        data
    };
    assert_eq!((read(0), read(2), read(4), read(u64::MAX)), ([4, 3, 2, 1], [2, 1, 0, 0], [0; 4], [0; 4]));
}

#[test]
fn a_dead_socket_is_replaced_a_live_one_is_not_and_the_path_goes_with_the_device() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("v");
    drop(UnixListener::bind(&path).unwrap());
    let first = Vsock::new("a", 3, &path).unwrap();
    let error = Vsock::new("b", 4, &path).unwrap_err().to_string();
    assert!(error.contains("another program listens"), "{error}");
    drop(first);
    assert!(!path.exists());
    std::fs::write(&path, "text").unwrap();
    let error = Vsock::new("c", 5, &path).unwrap_err().to_string();
    assert!(error.contains("no socket"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"text");
    std::fs::remove_file(&path).unwrap();
    // Whatever somebody else has put there meanwhile stays.
    let device = Vsock::new("d", 6, &path).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "new").unwrap();
    drop(device);
    assert!(path.exists());
    let long = dir.as_path().join("x".repeat(100));
    assert!(Vsock::new("e", 7, &long).unwrap_err().to_string().contains("96 bytes"));
    let nowhere = Vsock::new("f", 8, &dir.as_path().join("no/v")).unwrap_err().to_string();
    assert!(nowhere.contains("cannot listen"), "{nowhere}");
}
