//! Tests of the device with a driver of our own on the one side, and sockets or a real tap on the other.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::thread;
use std::time::Duration;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::*;
use crate::net::tap::HEADER_LEN;
use crate::rate_limit::Bucket;
use crate::virtio::Memory;
use crate::virtio::ring::RingFeatures;
use crate::virtio::testing::{DriverQueue, Interrupts, Part, activation, forms, memory};

const MRG: u64 = bit(VIRTIO_NET_F_MRG_RXBUF);
const CONTROL: u64 = bit(VIRTIO_NET_F_CTRL_VQ);
const LARGE: u64 = bit(VIRTIO_NET_F_GUEST_CSUM) | bit(VIRTIO_NET_F_GUEST_TSO4);
/// Where buffers are.
const BUFFERS: u64 = 0x10_0000;
const QUEUE_LEN: u16 = 64;

fn spec() -> NetSpec {
    NetSpec {
        name: "_net0".to_owned(),
        mac: [2, 0, 0, 0, 0, 9],
        queue_size: 256,
        offloads: OffloadChoice { tso: true, ufo: true, csum: true },
        limit: RateLimit::default(),
        vhost: VhostUse::Never,
    }
}

/// A device at work, with sockets where its taps would be.
struct Bench {
    net: Net,
    queues: Vec<DriverQueue>,
    far: Vec<UnixDatagram>,
    memory: Memory,
    interrupts: Arc<Interrupts>,
    active: Option<Box<dyn Active>>,
}

impl Bench {
    fn new(spec: NetSpec, pairs: u16, features: u64, form: RingFeatures) -> Self {
        let (near, far): (Vec<_>, Vec<_>) = (0..pairs)
            .map(|_| {
                let (near, far) = UnixDatagram::pair().unwrap();
                near.set_nonblocking(true).unwrap();
                far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                (File::from(OwnedFd::from(near)), far)
            })
            .unzip();
        let net = Net::new(spec, Tap::over_files(near)).unwrap();
        Self::over(net, far, features, form)
    }

    fn over(net: Net, far: Vec<UnixDatagram>, features: u64, form: RingFeatures) -> Self {
        let memory = memory();
        let count = net.queue_sizes().len() as u64;
        let queues = (0..count).map(|n| DriverQueue::new(&memory, n * 0x1_0000, QUEUE_LEN, form)).collect();
        let mut bench =
            Self { net, queues, far, memory, interrupts: Arc::new(Interrupts::default()), active: None };
        bench.activate(features);
        bench
    }

    fn activate(&mut self, features: u64) {
        let activation = activation(&self.memory, features, &self.queues, &self.interrupts);
        self.active = Some(self.net.activate(activation).unwrap());
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.memory().write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn add(&mut self, queue: usize, parts: &[Part]) -> u16 {
        let id = self.queues[queue].add(parts);
        self.queues[queue].ring();
        id
    }

    /// Sends a packet from outside.
    fn arrive(&self, pair: usize, frame: &[u8]) {
        self.far[pair].send(&packet(frame)).unwrap();
    }

    /// Sends a command to the device; its answer.
    fn command(&mut self, class: u32, command: u8, data: &[u8]) -> u32 {
        let class = u8::try_from(class).unwrap();
        let bytes = [&[class, command][..], data].concat();
        self.write(BUFFERS - 0x1000, &bytes);
        let queue = self.queues.len() - 1;
        let len = u32::try_from(bytes.len()).unwrap();
        self.add(queue, &[(BUFFERS - 0x1000, len, false), (BUFFERS - 0x800, 1, true)]);
        let (_, written) = self.queues[queue].wait_used().expect("an answer");
        assert_eq!(written, 1);
        self.read(BUFFERS - 0x800, 1)[0].into()
    }

    fn quiet(&mut self, queue: usize) {
        thread::sleep(Duration::from_millis(100));
        assert_eq!(self.queues[queue].used(), None);
    }
}

fn packet(frame: &[u8]) -> Vec<u8> {
    [&[0; HEADER_LEN][..], frame].concat()
}

fn frame(len: usize) -> Vec<u8> {
    (0..=250).cycle().take(len).collect()
}

#[test]
fn packets_go_both_ways_in_every_form_of_ring() {
    for form in forms() {
        let mut bench = Bench::new(spec(), 1, MRG, form);
        for round in 0..200 {
            let body = frame(60 + (round * 7) % 900);
            let id = bench.add(0, &[(BUFFERS, 100, true), (BUFFERS + 0x1000, 1500, true)]);
            bench.arrive(0, &body);
            let (used, len) = bench.queues[0].wait_used().unwrap();
            assert_eq!((used, len as usize), (id, HEADER_LEN + body.len()), "{form:?}");
            let bytes = [bench.read(BUFFERS, 100), bench.read(BUFFERS + 0x1000, 1500)].concat();
            assert_eq!(bytes[HEADER_LEN..HEADER_LEN + body.len()], body);
            assert_eq!(bytes[10..12], [1, 0], "one buffer");

            bench.write(BUFFERS + 0x4000, &packet(&body));
            let len = u32::try_from(HEADER_LEN + body.len()).unwrap();
            // The header by itself, and the rest in two pieces.
            bench.add(
                1,
                &[
                    (BUFFERS + 0x4000, 12, false),
                    (BUFFERS + 0x400c, 20, false),
                    (BUFFERS + 0x4020, len - 32, false),
                ],
            );
            let mut bytes = [0; 2000];
            let count = bench.far[0].recv(&mut bytes).unwrap();
            assert_eq!(bytes[HEADER_LEN..count], body);
            assert!(bench.queues[1].wait_used().is_some());
        }
        let counters: std::collections::BTreeMap<_, _> = bench.net.counters().into_iter().collect();
        assert_eq!((counters["rx_frames"], counters["tx_frames"]), (200, 200));
        assert_eq!(counters["rx_bytes"], counters["tx_bytes"]);
        assert!(counters["rx_bytes"] > 200 * 60);
        assert_eq!(bench.interrupts.seen().stopped, Vec::<String>::new());
    }
}

#[test]
fn a_large_packet_takes_as_many_buffers_as_it_fills() {
    for form in forms() {
        for (size, count) in [(40_000, 27), (100, 1), (3_000 - HEADER_LEN, 2), (65_550, 44)] {
            let mut bench = Bench::new(spec(), 1, MRG | LARGE, form);
            let mut places = [0; QUEUE_LEN as usize];
            for n in 0..48 {
                let address = BUFFERS + n * 0x1000;
                let id = bench.queues[0].add(&[(address, 1500, true)]);
                places[usize::from(id)] = address;
            }
            bench.queues[0].ring();
            let body = frame(size);
            bench.arrive(0, &body);
            let mut bytes = Vec::new();
            for _ in 0..count {
                let (id, len) = bench.queues[0].wait_used().expect("as many buffers as the packet fills");
                bytes.extend(bench.read(places[usize::from(id)], len as usize));
            }
            assert_eq!(u16::from_le_bytes([bytes[10], bytes[11]]), count, "{form:?}");
            assert_eq!(bytes[HEADER_LEN..], body[..]);
            bench.quiet(0);
        }
    }
}

#[test]
fn with_too_few_buffers_for_the_longest_packet_short_ones_still_arrive() {
    for form in forms() {
        let mut bench = Bench::new(spec(), 1, MRG | LARGE, form);
        for n in 0..3 {
            bench.queues[0].add(&[(BUFFERS + n * 0x1000, 1500, true)]);
        }
        bench.queues[0].ring();
        bench.arrive(0, &frame(200));
        let (_, len) = bench.queues[0].wait_used().unwrap();
        assert_eq!(len as usize, HEADER_LEN + 200);
        assert_eq!(bench.read(BUFFERS + 10, 2), [1, 0]);
        // One that needs more waits for them.
        let body = frame(10_000);
        bench.arrive(0, &body);
        bench.quiet(0);
        for n in 3..12 {
            bench.queues[0].add(&[(BUFFERS + n * 0x1000, 1500, true)]);
        }
        bench.queues[0].ring();
        let mut sum = 0;
        for _ in 0..7 {
            sum += bench.queues[0].wait_used().expect("all of it").1;
        }
        assert_eq!(sum as usize, HEADER_LEN + body.len(), "{form:?}");
        assert_eq!(bench.read(BUFFERS + 0x1000 + 10, 2), [7, 0]);
    }
}

#[test]
fn a_packet_that_does_not_fit_is_dropped_and_the_next_one_arrives() {
    let form = RingFeatures::default();
    // Without mergeable buffers one chain takes a whole packet or none.
    let mut bench = Bench::new(spec(), 1, 0, form);
    bench.add(0, &[(BUFFERS, 300, true)]);
    bench.arrive(0, &frame(400));
    bench.quiet(0);
    bench.arrive(0, &frame(200));
    assert_eq!(bench.queues[0].wait_used().unwrap().1 as usize, HEADER_LEN + 200);
    assert_eq!(bench.read(BUFFERS + 10, 2), [1, 0]);
}

#[test]
fn without_buffers_nothing_is_read_and_nothing_wakes_the_thread() {
    let spec = NetSpec { name: "_idle".to_owned(), ..spec() };
    let mut bench = Bench::new(spec, 1, MRG, RingFeatures::default());
    for _ in 0..5 {
        bench.arrive(0, &frame(100));
    }
    thread::sleep(Duration::from_millis(100));
    let before = switches("_idle_qp0");
    thread::sleep(Duration::from_millis(400));
    let woken = switches("_idle_qp0") - before;
    assert!(woken <= 1, "woken {woken} times");
    bench.arrive(0, &frame(100));
    for n in 0..6 {
        bench.add(0, &[(BUFFERS + n * 0x1000, 1500, true)]);
        assert!(bench.queues[0].wait_used().is_some(), "packet {n}");
    }
}

/// How often the thread of this name has slept.
fn switches(name: &str) -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let mut sum = 0;
    for task in tasks {
        let read = |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        if read("comm").trim() == name {
            let status = read("status");
            let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            sum += line.map_or(0, |number| number.trim().parse().unwrap());
        }
    }
    sum
}

#[test]
fn what_no_driver_sends_is_dropped_and_comes_back() {
    let mut bench = Bench::new(spec(), 1, MRG, RingFeatures::default());
    for parts in [
        vec![(BUFFERS, 4, false)],
        vec![(BUFFERS, 12, false)],
        vec![(BUFFERS, 70_000, false)],
        vec![(BUFFERS, 100, false), (BUFFERS, 100, true)],
        vec![(BUFFERS, 100, true)],
    ] {
        bench.add(1, &parts);
        assert_eq!(bench.queues[1].wait_used().map(|(_, len)| len), Some(0), "{parts:?}");
    }
    bench.far[0].set_nonblocking(true).unwrap();
    assert!(bench.far[0].recv(&mut [0; 10]).is_err(), "nothing has left");
    assert_eq!(bench.interrupts.seen().stopped, Vec::<String>::new());
}

#[test]
fn a_receive_buffer_that_is_none_stops_the_device_and_no_more() {
    for parts in [
        vec![(BUFFERS, 100, false)],
        vec![(BUFFERS, 11, true)],
        vec![(BUFFERS, 4, false), (BUFFERS, 1500, true)],
    ] {
        let mut bench = Bench::new(spec(), 1, MRG, RingFeatures::default());
        bench.add(0, &parts);
        bench.arrive(0, &frame(100));
        wait(|| !bench.interrupts.seen().stopped.is_empty());
        assert!(bench.interrupts.seen().stopped[0].contains("receive buffer"), "{parts:?}");
    }
}

fn wait(mut until: impl FnMut() -> bool) {
    for _ in 0..2_000 {
        if until() {
            return;
        }
        thread::sleep(Duration::from_millis(5));
    }
    panic!("not within ten seconds");
}

#[test]
fn a_pause_puts_buffers_back_and_moves_nothing() {
    for form in forms() {
        let mut bench = Bench::new(spec(), 1, MRG | LARGE, form);
        for n in 0..48 {
            bench.queues[0].add(&[(BUFFERS + n * 0x1000, 1500, true)]);
        }
        bench.queues[0].ring();
        bench.arrive(0, &frame(100));
        bench.queues[0].wait_used().unwrap();
        bench.active.as_ref().unwrap().pause();
        bench.arrive(0, &frame(5_000));
        bench.quiet(0);
        bench.active.as_ref().unwrap().resume();
        for _ in 0..4 {
            bench.queues[0].wait_used().expect("a buffer of the packet");
        }
        bench.quiet(0);
        assert_eq!(bench.interrupts.seen().stopped, Vec::<String>::new());
    }
}

#[test]
fn a_limit_holds_the_packets_back_and_loses_none() {
    let bucket = Bucket { size: 10, one_time_burst: 0, refill_time: Duration::from_millis(100) };
    let limit = RateLimit { bandwidth: None, ops: Some(bucket) };
    let mut bench =
        Bench::new(NetSpec { limit, name: "_limit".to_owned(), ..spec() }, 1, MRG, RingFeatures::default());
    let started = Instant::now();
    for n in 0..40_u64 {
        bench.write(BUFFERS, &packet(&frame(100)));
        bench.queues[1].add(&[(BUFFERS, 112, false)]);
        bench.queues[0].add(&[(BUFFERS + 0x1_0000 + n * 0x1000, 1500, true)]);
        bench.arrive(0, &frame(100));
    }
    bench.queues[1].ring();
    bench.queues[0].ring();
    for _ in 0..40 {
        bench.far[0].recv(&mut [0; 200]).unwrap();
        bench.queues[1].wait_used().unwrap();
        bench.queues[0].wait_used().unwrap();
    }
    // Ten at once, then one each ten milliseconds.
    let passed = started.elapsed();
    assert!(passed > Duration::from_millis(280), "{passed:?}");
    let before = switches("_limit_qp0");
    thread::sleep(Duration::from_millis(300));
    assert!(switches("_limit_qp0") - before <= 2, "no timer runs when nothing waits");
}

#[test]
fn commands_are_checked_and_answered() {
    for form in forms() {
        let features = MRG | CONTROL | LARGE | bit(VIRTIO_NET_F_MQ) | bit(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS);
        let mut bench = Bench::new(spec(), 2, features, form);
        assert_eq!(bench.command(VIRTIO_NET_CTRL_MQ, 0, &2_u16.to_le_bytes()), VIRTIO_NET_OK);
        assert_eq!(bench.net.shared.pairs(), 2);
        for wrong in [0_u16, 3, 0xffff] {
            assert_eq!(bench.command(VIRTIO_NET_CTRL_MQ, 0, &wrong.to_le_bytes()), VIRTIO_NET_ERR, "{wrong}");
        }
        assert_eq!(bench.command(VIRTIO_NET_CTRL_MQ, 0, &[1]), VIRTIO_NET_ERR, "cut short");
        assert_eq!(bench.command(VIRTIO_NET_CTRL_MQ, 1, &[1, 0]), VIRTIO_NET_ERR);
        assert_eq!(bench.command(77, 0, &[]), VIRTIO_NET_ERR);
        let not_negotiated = bit(VIRTIO_NET_F_GUEST_UFO).to_le_bytes();
        assert_eq!(bench.command(VIRTIO_NET_CTRL_GUEST_OFFLOADS, 0, &not_negotiated), VIRTIO_NET_ERR);
        assert_eq!(bench.interrupts.seen().stopped, Vec::<String>::new());
        // A pair in use works, and one that is not stays quiet.
        bench.add(2, &[(BUFFERS, 1500, true)]);
        bench.arrive(1, &frame(64));
        assert!(bench.queues[2].wait_used().is_some());
        assert_eq!(bench.command(VIRTIO_NET_CTRL_MQ, 0, &1_u16.to_le_bytes()), VIRTIO_NET_OK);
        bench.add(2, &[(BUFFERS, 1500, true)]);
        bench.arrive(1, &frame(64));
        bench.quiet(2);
    }
}

#[test]
fn a_command_without_room_for_its_answer_stops_the_device() {
    let mut bench = Bench::new(spec(), 1, MRG | CONTROL, RingFeatures::default());
    bench.add(2, &[(BUFFERS, 4, false)]);
    wait(|| bench.interrupts.seen().stopped.iter().any(|why| why.contains("answer")));
}

#[test]
fn the_device_can_be_activated_again_and_again() {
    for form in forms() {
        let mut bench = Bench::new(spec(), 1, MRG, form);
        for _ in 0..5 {
            bench.add(0, &[(BUFFERS, 1500, true)]);
            bench.arrive(0, &frame(80));
            assert_eq!(bench.queues[0].wait_used().unwrap().1 as usize, HEADER_LEN + 80);
            let active = bench.active.take().unwrap();
            active.stop();
            assert!(active.wait_stopped(Duration::from_secs(10)));
            drop(active);
            for (n, queue) in (0..).zip(&mut bench.queues) {
                *queue = DriverQueue::new(&bench.memory, n * 0x1_0000, QUEUE_LEN, form);
                bench.memory.memory().write_slice(&[0; 0x8000], GuestAddress(n * 0x1_0000)).unwrap();
            }
            // What came between is of no use to the next driver.
            bench.arrive(0, &frame(90));
            bench.activate(MRG);
            thread::sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn configuration_and_features_are_those_of_the_settings() {
    let net = |spec: NetSpec, pairs: usize| {
        let files = (0..pairs).map(|_| File::open("/dev/null").unwrap()).collect();
        Net::new(spec, Tap::over_files(files)).unwrap()
    };
    let one = net(spec(), 1);
    assert_eq!(one.queue_sizes(), [256, 256, 64]);
    assert_eq!(one.features() & bit(VIRTIO_NET_F_MQ), 0);
    let mut config = [0xff; 16];
    one.read_config(0, &mut config[..12]);
    assert_eq!(config[..12], [2, 0, 0, 0, 0, 9, 1, 0, 1, 0, 0xdc, 5]);
    one.read_config(u64::MAX, &mut config);
    let three = net(spec(), 3);
    assert_eq!(three.queue_sizes().len(), 7);
    assert_ne!(three.features() & bit(VIRTIO_NET_F_MQ), 0);
    let without = OffloadChoice { tso: false, ufo: false, csum: false };
    let plain = net(NetSpec { offloads: without, ..spec() }, 1).features();
    let all = bit(VIRTIO_NET_F_CSUM) | LARGE | bit(VIRTIO_NET_F_HOST_TSO4) | bit(VIRTIO_NET_F_HOST_UFO);
    assert_eq!((plain & all, one.features() & all), (0, all));
    assert_eq!(offloads_of(bit(VIRTIO_NET_F_GUEST_TSO4)), Offloads::empty(), "not without the checksum");
}

#[test]
fn what_the_driver_has_settled_goes_on_elsewhere() {
    let features = MRG | CONTROL | bit(VIRTIO_NET_F_MQ);
    let mut first = Bench::new(spec(), 2, features, RingFeatures::default());
    first.command(VIRTIO_NET_CTRL_MQ, 0, &2_u16.to_le_bytes());
    let saved = first.net.save().unwrap();
    let mut second = Bench::new(spec(), 2, features, RingFeatures::default());
    second.active = None;
    second.net.restore(&saved).unwrap();
    second.activate(features);
    assert_eq!(second.net.shared.pairs(), 2);
    let one = Bench::new(spec(), 1, features, RingFeatures::default());
    assert!(one.net.restore(&saved).unwrap_err().contains("2 pairs"));
}

#[test]
fn names_of_threads_keep_their_end() {
    assert_eq!(thread_name("_net0", "_qp0"), "_net0_qp0");
    assert_eq!(thread_name("a-very-long-name", "_qp11"), "a-very-lon_qp11");
}
