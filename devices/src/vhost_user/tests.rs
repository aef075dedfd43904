//! Devices against real backends in this process, on the library that backends in Rust are written with, and against ones that do wrong.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueOwnedT;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use super::*;
use crate::virtio::Memory;
use crate::virtio::device::{
    Activation, Active, DeviceType, F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED, F_VERSION_1, VirtioDevice,
};
use crate::virtio::ring::{RingFeatures, RingPosition};
use crate::virtio::testing::{DriverQueue, Interrupts, activation, memory};

mod peers;

const PROTOCOL_FEATURES: u64 = 1 << 30;
const SPLIT: RingFeatures = RingFeatures { packed: false, event_idx: false, indirect: true };
const LONG: Duration = Duration::from_secs(10);

/// What it writes into every buffer.
const MARK: u8 = 0x5a;

/// A backend that fills what it may write, and remembers what it was told.
struct Filler {
    features: u64,
    protocol: VhostUserProtocolFeatures,
    config: Mutex<Vec<u8>>,
    memory: RwLock<Option<GuestMemoryAtomic<GuestMemoryMmap>>>,
    resets: AtomicU32,
    exit: Mutex<Option<(EventConsumer, EventNotifier)>>,
}

impl VhostUserBackend for Filler {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        4
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.protocol
    }

    fn reset_device(&self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.config.lock().unwrap();
        let from = offset as usize;
        config.get(from..from + size as usize).map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn set_config(&self, offset: u32, data: &[u8]) -> std::io::Result<()> {
        let from = offset as usize;
        self.config.lock().unwrap()[from..from + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> std::io::Result<()> {
        *self.memory.write().unwrap() = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        self.exit.lock().unwrap().take()
    }

    fn handle_event(
        &self,
        device_event: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> std::io::Result<()> {
        let memory = self.memory.read().unwrap().clone().unwrap().memory();
        let vring = &vrings[usize::from(device_event)];
        let chains: Vec<_> = vring.get_mut().get_queue_mut().iter(memory.clone()).unwrap().collect();
        for chain in chains {
            let head = chain.head_index();
            let mut written = 0;
            for part in chain.writable() {
                memory.write_slice(&vec![MARK; part.len() as usize], part.addr()).unwrap();
                written += part.len();
            }
            vring.add_used(head, written).unwrap();
        }
        vring.signal_used_queue()
    }
}

/// One backend at its socket.
struct Running {
    backend: Arc<Filler>,
    socket: PathBuf,
    handle: Arc<Mutex<Option<ShutdownHandle>>>,
}

fn socket() -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("dormouse-vhost-user-{}-{number}", std::process::id()))
}

fn all_protocol() -> VhostUserProtocolFeatures {
    use VhostUserProtocolFeatures as F;
    F::MQ | F::REPLY_ACK | F::CONFIG | F::BACKEND_REQ | F::CONFIGURE_MEM_SLOTS | F::RESET_DEVICE
}

fn filler(features: u64, protocol: VhostUserProtocolFeatures, config: &[u8]) -> Arc<Filler> {
    Arc::new(Filler {
        features: features | F_VERSION_1 | PROTOCOL_FEATURES,
        protocol,
        config: Mutex::new(config.to_vec()),
        memory: RwLock::default(),
        resets: AtomicU32::new(0),
        exit: Mutex::new(Some(new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap())),
    })
}

impl Running {
    fn start(features: u64, protocol: VhostUserProtocolFeatures, config: &[u8]) -> Self {
        Self::at(socket(), features, protocol, config)
    }

    fn at(socket: PathBuf, features: u64, protocol: VhostUserProtocolFeatures, config: &[u8]) -> Self {
        let backend = filler(features, protocol, config);
        let mut listener = Listener::new(&socket, true).unwrap();
        let handle = Arc::new(Mutex::new(None));
        let (its, its_handle) = (Arc::clone(&backend), Arc::clone(&handle));
        thread::spawn(move || {
            let empty = GuestMemoryAtomic::new(GuestMemoryMmap::new());
            let mut daemon = VhostUserDaemon::new("filler".into(), its, empty).unwrap();
            daemon.start(&mut listener).unwrap();
            // It takes its socket along, and must not take that of the next.
            drop(listener);
            *its_handle.lock().unwrap() = daemon.shutdown_handle();
            let _ = daemon.wait();
        });
        Self { backend, socket, handle }
    }

    /// What the frontend sees when the process is killed.
    fn kill(&self) {
        self.handle.lock().unwrap().take().unwrap().shutdown();
        until("the backend has ended", || Arc::strong_count(&self.backend) == 1);
    }
}

fn shared_memory() -> Memory {
    const MIB: usize = 1 << 20;
    let range = |start: u64, size: usize| {
        let file = std::fs::File::from(rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(size as u64).unwrap();
        (GuestAddress(start), size, Some(FileOffset::new(file, 0)))
    };
    let ranges = [range(0, 8 * MIB), range(12 << 20, 4 * MIB)];
    Memory::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap())
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {LONG:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// The driver's side of a device with one queue or more.
struct Driver {
    memory: Memory,
    queues: Vec<DriverQueue>,
    interrupts: Arc<Interrupts>,
    active: Option<Box<dyn Active>>,
}

impl Driver {
    fn start(device: &VhostUser, memory: Memory, queues: u64) -> Self {
        let queues: Vec<_> =
            (0..queues).map(|n| DriverQueue::new(&memory, 0x10000 + n * 0x10000, 16, SPLIT)).collect();
        let interrupts = Arc::<Interrupts>::default();
        let features = device.features() & !F_EVENT_IDX | F_VERSION_1;
        let active = Some(device.activate(activation(&memory, features, &queues, &interrupts)).unwrap());
        Self { memory, queues, interrupts, active }
    }

    fn active(&self) -> &dyn Active {
        self.active.as_deref().unwrap()
    }

    /// Has a buffer filled.
    fn fill(&mut self, queue: usize, at: u64) {
        let id = self.queues[queue].add(&[(at, 8, true)]);
        self.queues[queue].ring();
        assert_eq!(self.queues[queue].wait_used(), Some((id, 8)));
        let mut bytes = [0; 8];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        assert_eq!(bytes, [MARK; 8]);
    }

    /// Asks for so many pairs of queues; the answer.
    fn set_pairs(&mut self, pairs: u8) -> u8 {
        let (memory, control) = (self.memory.memory(), &mut self.queues[4]);
        memory.write_slice(&[4, 0, pairs, 0], GuestAddress(0x60000)).unwrap();
        control.add(&[(0x60000, 4, false), (0x61000, 1, true)]);
        control.ring();
        assert_eq!(control.wait_used().map(|(_, written)| written), Some(1));
        memory.read_obj(GuestAddress(0x61000)).unwrap()
    }
}

fn fs_at(socket: &std::path::Path) -> Result<VhostUser, VhostUserError> {
    fs::new("_fs0", "share", socket, 1, 16)
}

#[test]
fn data_goes_both_ways_whatever_of_the_protocol_the_backend_has() {
    use VhostUserProtocolFeatures as F;
    for protocol in [all_protocol(), F::MQ, F::MQ | F::REPLY_ACK] {
        let backend = Running::start(F_INDIRECT_DESC, protocol, &[]);
        let device = fs_at(&backend.socket).unwrap();
        assert_eq!(device.features(), F_INDIRECT_DESC, "no more than the backend has");
        let mut driver = Driver::start(&device, shared_memory(), 2);
        for at in [0x50000, 12 << 20] {
            driver.fill(0, at);
            driver.fill(1, at + 0x1000);
        }
        assert_eq!(driver.interrupts.seen().stopped, [""; 0]);
    }
}

#[test]
fn a_file_systems_configuration_is_its_name_and_number_of_queues() {
    let backend = Running::start(0, all_protocol(), &[]);
    let device = fs::new("_fs0", "share", &backend.socket, 3, 16).unwrap();
    assert_eq!(device.queue_sizes(), [16; 4]);
    let mut config = [0xff; 44];
    device.read_config(0, &mut config[..40]);
    assert_eq!(&config[..8], b"share\0\0\0");
    assert_eq!(config[36..40], [3, 0, 0, 0]);
    let mut beyond = [0; 8];
    device.read_config(38, &mut beyond);
    device.read_config(u64::MAX, &mut beyond);
    assert_eq!(beyond, [0; 8]);
}

#[test]
fn after_pause_reset_and_a_second_driver_the_rings_go_on_where_they_are() {
    let backend = Running::start(0, all_protocol(), &[]);
    let device = fs_at(&backend.socket).unwrap();
    let mut driver = Driver::start(&device, shared_memory(), 2);
    driver.fill(1, 0x50000);
    driver.fill(1, 0x51000);
    driver.active().pause();
    does_nothing_until_resumed(driver.active.as_deref().unwrap(), &mut driver.queues[1], "paused");
    driver.active().hold(LONG);
    does_nothing_until_resumed(driver.active.as_deref().unwrap(), &mut driver.queues[1], "held");
    driver.fill(1, 0x53000);
    driver.active().stop();
    assert!(driver.active().wait_stopped(LONG));
    assert_eq!(backend.backend.resets.load(Ordering::Relaxed), 1);
    driver.active = None;
    let mut second = Driver::start(&device, shared_memory(), 2);
    second.fill(0, 0x50000);
    second.fill(1, 12 << 20);
    assert_eq!(second.interrupts.seen().stopped, [""; 0]);
}

#[test]
fn a_restored_device_begins_when_its_machine_goes_on() {
    let backend = Running::start(0, all_protocol(), &[]);
    let device = fs_at(&backend.socket).unwrap();
    let (mut queues, activation, interrupts) = offered(&shared_memory());
    interrupts.paused.store(true, Ordering::Relaxed);
    let active = device.activate(activation).unwrap();
    does_nothing_until_resumed(&*active, &mut queues[1], "restored");
}

fn does_nothing_until_resumed(active: &dyn Active, queue: &mut DriverQueue, state: &str) {
    let id = queue.add(&[(0x52000, 8, true)]);
    queue.ring();
    thread::sleep(Duration::from_millis(100));
    assert_eq!(queue.used(), None, "a {state} device does nothing");
    active.resume();
    assert_eq!(queue.wait_used(), Some((id, 8)));
}

/// Two queues, what a device is activated with that has them, and the interrupts that it gives.
fn offered(memory: &Memory) -> (Vec<DriverQueue>, Activation, Arc<Interrupts>) {
    let queues: Vec<_> = (0..2).map(|n| DriverQueue::new(memory, 0x10000 + n * 0x10000, 16, SPLIT)).collect();
    let interrupts = Arc::<Interrupts>::default();
    let activation = activation(memory, F_VERSION_1, &queues, &interrupts);
    (queues, activation, interrupts)
}

#[test]
fn the_position_of_a_stopped_ring_is_known_to_who_saves_it() {
    let backend = Running::start(0, all_protocol(), &[]);
    let device = fs_at(&backend.socket).unwrap();
    let memory = shared_memory();
    let (mut queues, activation, _interrupts) = offered(&memory);
    let position = activation.queues[1].shared_position().clone();
    let active = device.activate(activation).unwrap();
    for _ in 0..3 {
        queues[1].add(&[(0x50000, 8, true)]);
        queues[1].ring();
        queues[1].wait_used().unwrap();
    }
    active.pause();
    assert_eq!(position.get(), RingPosition { avail: 3, used: 3, ..RingPosition::START });
}

#[test]
fn a_device_whose_backend_dies_says_so_once_and_answers_what_is_asked_with_errors() {
    let backend = Running::start(0, all_protocol(), &[]);
    let device = fs_at(&backend.socket).unwrap();
    let mut driver = Driver::start(&device, shared_memory(), 2);
    driver.fill(1, 0x50000);
    backend.kill();
    until("the device has stopped", || !driver.interrupts.seen().stopped.is_empty());
    // FUSE_LOOKUP with the number 7.
    let request = [&56_u32.to_le_bytes()[..], &1_u32.to_le_bytes(), &7_u64.to_le_bytes(), &[0; 40]].concat();
    driver.memory.memory().write_slice(&request, GuestAddress(0x60000)).unwrap();
    let id = driver.queues[1].add(&[(0x60000, 56, false), (0x61000, 144, true)]);
    driver.queues[1].ring();
    assert_eq!(driver.queues[1].wait_used(), Some((id, 16)));
    let mut answer = [0; 16];
    driver.memory.memory().read_slice(&mut answer, GuestAddress(0x61000)).unwrap();
    let expected = [&16_u32.to_le_bytes()[..], &(-libc::ENOTCONN).to_le_bytes(), &7_u64.to_le_bytes()];
    assert_eq!(answer.to_vec(), expected.concat());
    // One that has no answer comes back too.
    let id = driver.queues[0].add(&[(0x60000, 56, false)]);
    driver.queues[0].ring();
    assert_eq!(driver.queues[0].wait_used(), Some((id, 0)));
    let stopped = driver.interrupts.seen().stopped;
    assert_eq!(stopped.len(), 1, "{stopped:?}");
    assert!(stopped[0].ends_with("has gone"), "{stopped:?}");
    driver.active().stop();
    assert!(driver.active().wait_stopped(LONG));
}

#[test]
fn a_backend_that_is_back_serves_the_next_driver() {
    let first = Running::start(F_INDIRECT_DESC, all_protocol(), &[]);
    let device = fs_at(&first.socket).unwrap();
    first.kill();
    let _second = Running::at(first.socket.clone(), F_INDIRECT_DESC, all_protocol(), &[]);
    let mut driver = Driver::start(&device, shared_memory(), 2);
    driver.fill(1, 0x50000);
}

#[test]
fn a_disk_gets_errors_for_its_reads_when_its_backend_has_gone() {
    let config = [0; 60];
    let backend = Running::start(1 << 12 | 1 << 9, all_protocol(), &config);
    let device = block::new("_disk0", &backend.socket, 1, 16).unwrap();
    assert_eq!(device.features(), 1 << 9, "one queue needs no MQ");
    let mut queues = [0; 2];
    device.read_config(34, &mut queues);
    assert_eq!(queues, [1, 0]);
    let mut driver = Driver::start(&device, shared_memory(), 1);
    driver.fill(0, 0x50000);
    backend.kill();
    until("the device has stopped", || !driver.interrupts.seen().stopped.is_empty());
    let id = driver.queues[0].add(&[(0x60000, 16, false), (0x61000, 512, true), (0x62000, 1, true)]);
    driver.queues[0].ring();
    assert_eq!(driver.queues[0].wait_used().map(|(id, _)| id), Some(id));
    assert_eq!(driver.memory.memory().read_obj::<u8>(GuestAddress(0x62000)).unwrap(), 1);
}

#[test]
fn what_the_driver_writes_to_the_configuration_reaches_the_backend() {
    let mut config = [0; 60];
    config[0] = 8;
    let backend = Running::start(0, all_protocol(), &config);
    let device = block::new("_disk0", &backend.socket, 1, 16).unwrap();
    let driver = Driver::start(&device, shared_memory(), 1);
    let mut capacity = [0; 8];
    device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 8);
    // What the driver writes is there when it reads.
    device.write_config(32, &[1]);
    let mut cache = [0];
    device.read_config(32, &mut cache);
    assert_eq!((cache, backend.backend.config.lock().unwrap()[32]), ([1], 1));
    until("the driver is told", || driver.interrupts.seen().config == 1);
    device.write_config(59, &[1, 1]);
    assert_eq!(driver.interrupts.seen().stopped, [""; 0]);
}

#[test]
fn a_generic_device_has_what_its_backend_says() {
    let config: Vec<u8> = (1..=16).collect();
    let bits = 1 << 3 | 1 << 55;
    let backend = Running::start(bits | F_EVENT_IDX, all_protocol(), &config);
    let device = generic::new("_vu0", DeviceType(42), &backend.socket, vec![16, 32]).unwrap();
    assert_eq!((device.device_type(), device.queue_sizes()), (DeviceType(42), vec![16, 32]));
    assert_eq!(device.features(), bits | F_EVENT_IDX);
    let mut bytes = [0; 20];
    device.read_config(0, &mut bytes);
    assert_eq!(bytes[..16], config[..]);
    Driver::start(&device, shared_memory(), 2).fill(1, 0x50000);
}

#[test]
fn a_snapshot_is_refused_where_the_backend_knows_more_than_the_rings() {
    let backend = Running::start(0, all_protocol(), &[0; 60]);
    assert!(fs_at(&backend.socket).unwrap().save().unwrap_err().contains("remove the device first"));
    let backend = Running::start(0, all_protocol(), &[0; 60]);
    assert!(block::new("_disk0", &backend.socket, 1, 16).unwrap().save().is_ok());
}

#[test]
fn packed_rings_are_offered_if_the_backend_has_them() {
    let backend = Running::start(F_RING_PACKED, all_protocol(), &[]);
    assert_eq!(fs_at(&backend.socket).unwrap().features(), F_RING_PACKED);
}

#[test]
fn memory_that_is_not_shared_stops_the_device_with_the_remedy() {
    let backend = Running::start(0, all_protocol(), &[]);
    let device = fs_at(&backend.socket).unwrap();
    let driver = Driver::start(&device, memory(), 2);
    until("the device has stopped", || !driver.interrupts.seen().stopped.is_empty());
    assert!(driver.interrupts.seen().stopped[0].contains("shared=on"));
}

fn net_settings(socket: &std::path::Path, mode: Mode, num_queues: u16) -> net::NetSettings {
    let mac = [2, 0, 0, 0, 0, 1];
    let (socket, queue_size) = (socket.to_owned(), 16);
    let (tso, ufo, csum) = (true, true, true);
    net::NetSettings { socket, mode, mac, mtu: Some(1400), num_queues, queue_size, tso, ufo, csum }
}

#[test]
fn a_network_device_goes_on_when_its_backend_comes_back() {
    let first = Running::start(1 << 15 | 1 << 22, all_protocol(), &[]);
    let device = net::new("_net0", &net_settings(&first.socket, Mode::Client, 2)).unwrap();
    assert_eq!(device.features(), 1 << 15 | 1 << 5 | 1 << 3);
    let mut config = [0; 12];
    device.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0x78, 5]);
    let mut driver = Driver::start(&device, shared_memory(), 2);
    driver.fill(0, 0x50000);
    driver.fill(0, 0x51000);
    first.kill();
    let _second = Running::at(first.socket.clone(), 1 << 15 | 1 << 22, all_protocol(), &[]);
    driver.fill(0, 0x52000);
    driver.fill(1, 0x53000);
    assert_eq!(driver.interrupts.seen().stopped, [""; 0]);
}

#[test]
fn pairs_of_queues_are_switched_on_by_the_control_queue() {
    let backend = Running::start(1 << 22, all_protocol(), &[]);
    let device = net::new("_net0", &net_settings(&backend.socket, Mode::Client, 4)).unwrap();
    assert_eq!(device.queue_sizes(), [16, 16, 16, 16, 64]);
    let mut driver = Driver::start(&device, shared_memory(), 5);
    driver.fill(0, 0x50000);
    let id = driver.queues[2].add(&[(0x51000, 8, true)]);
    driver.queues[2].ring();
    assert_eq!((driver.set_pairs(0), driver.set_pairs(3)), (1, 1));
    assert_eq!(driver.queues[2].used(), None);
    assert_eq!(driver.set_pairs(2), 0);
    driver.queues[2].ring();
    assert_eq!(driver.queues[2].wait_used(), Some((id, 8)));

    // What goes on elsewhere has them both from the start, and a driver that begins anew has one.
    let saved = device.save().unwrap();
    let backend = Running::start(1 << 22, all_protocol(), &[]);
    let device = net::new("_net0", &net_settings(&backend.socket, Mode::Client, 4)).unwrap();
    assert!(device.restore(&9.into()).is_err());
    device.restore(&saved).unwrap();
    let mut driver = Driver::start(&device, shared_memory(), 5);
    driver.fill(2, 0x51000);
    driver.active().stop();
    assert!(driver.active().wait_stopped(LONG));
    drop(driver);
    let driver = Driver::start(&device, shared_memory(), 5);
    assert_eq!(device.save().unwrap(), 1);
    drop(driver);
}

#[test]
fn a_backend_may_be_the_one_that_connects() {
    let path = socket();
    // What a process that was killed has left.
    drop(UnixListener::bind(&path).unwrap());
    let its = path.clone();
    thread::spawn(move || {
        let empty = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let mut daemon =
            VhostUserDaemon::new("filler".into(), filler(0, all_protocol(), &[]), empty).unwrap();
        while daemon.start_client(its.to_str().unwrap()).is_err() {
            thread::sleep(Duration::from_millis(5));
        }
        let _ = daemon.wait();
    });
    let device = net::new("_net0", &net_settings(&path, Mode::Server, 2)).unwrap();
    Driver::start(&device, shared_memory(), 2).fill(1, 0x50000);
    let again = net::new("_net1", &net_settings(&path, Mode::Server, 2));
    assert!(again.unwrap_err().to_string().starts_with("cannot listen at"), "a socket in use is left alone");
    drop(device);
    assert!(!path.exists());
}

#[test]
fn a_backend_that_is_not_there_or_lacks_something_is_an_error_with_a_remedy() {
    let refused = |device: Result<VhostUser, VhostUserError>| device.unwrap_err().to_string();
    let path = socket();
    drop(UnixListener::bind(&path).unwrap());
    let error = refused(fs_at(&path));
    std::fs::remove_file(&path).unwrap();
    assert!(error.contains("Connection refused") && error.contains("start the backend first"), "{error}");
    let backend = Running::start(0, all_protocol(), &[]);
    let error = refused(fs::new("_fs0", "share", &backend.socket, 8, 16));
    assert!(error.contains("4 queues") && error.contains("9"), "{error}");
    let backend = Running::start(0, all_protocol(), &[0; 8]);
    let error = refused(block::new("_disk0", &backend.socket, 1, 16));
    assert!(error.contains("GET_CONFIG"), "{error}");
    let backend = Running::start(0, VhostUserProtocolFeatures::MQ, &[]);
    let error = refused(block::new("_disk0", &backend.socket, 1, 16));
    assert!(error.contains("VHOST_USER_PROTOCOL_F_CONFIG"), "{error}");
}

/// A backend that answers as far as `work` goes, and then keeps the connection open and says no more.
fn hostile(work: impl FnOnce(&mut UnixStream) + Send + 'static) -> PathBuf {
    let path = socket();
    let (listener, its) = (UnixListener::bind(&path).unwrap(), path.clone());
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        std::fs::remove_file(its).unwrap();
        work(&mut stream);
        thread::sleep(Duration::from_secs(60));
    });
    path
}

#[test]
fn a_backend_that_hangs_keeps_nobody_waiting_for_long() {
    for cut in [0, 5, 15] {
        let path = hostile(move |stream| {
            let mut request = [0; 24];
            stream.read_exact(&mut request).unwrap();
            // The beginning of an answer to GET_FEATURES.
            let answer = [&1_u32.to_le_bytes()[..], &5_u32.to_le_bytes(), &8_u32.to_le_bytes(), &[0xff; 8]];
            stream.write_all(&answer.concat()[..cut]).unwrap();
        });
        let start = Instant::now();
        let error = fs_at(&path).unwrap_err().to_string();
        assert!(error.contains("did not answer in 5 s"), "{error}");
        assert!(start.elapsed() < Duration::from_secs(20));
    }
}

#[test]
fn a_backend_that_stops_answering_keeps_neither_driver_nor_operator() {
    let protocol = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
    let backend = Running::start(0, protocol, &[]);
    let middle = socket();
    let listener = UnixListener::bind(&middle).unwrap();
    let there = backend.socket.clone();
    // What stands between passes no descriptors on. It lets no answers through once it is told to, and so looks like a backend that hangs.
    let silent = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let its = Arc::clone(&silent);
    thread::spawn(move || {
        let (here, _) = listener.accept().unwrap();
        let there = UnixStream::connect(there).unwrap();
        let (mut from, mut to) = (there.try_clone().unwrap(), here.try_clone().unwrap());
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                if its.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_secs(60));
                }
                to.write_all(&bytes[..count]).unwrap();
            }
        });
        let (mut from, mut to) = (here, there);
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            if to.write_all(&bytes[..count]).is_err() {
                return;
            }
        }
    });
    let device = fs_at(&middle).unwrap();
    silent.store(true, Ordering::Relaxed);
    let start = Instant::now();
    let driver = Driver::start(&device, shared_memory(), 2);
    device.write_config(0, &[1]);
    assert!(start.elapsed() < Duration::from_secs(1), "the driver does not wait");
    driver.active().stop();
    assert!(driver.active().wait_stopped(LONG * 2));
    assert!(driver.interrupts.seen().stopped[0].contains("did not answer"));
    drop(driver);
    drop(device);
    std::fs::remove_file(middle).unwrap();
    assert!(start.elapsed() < Duration::from_secs(30));
}
