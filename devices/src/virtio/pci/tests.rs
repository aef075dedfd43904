//! A device behind the function's registers, as a driver comes upon it.

use pci::cap::vectors::fake::FakeAllocator;
use vm_memory::Bytes;
use vm_memory::GuestAddress;

use super::super::device::{F_RING_PACKED, F_RINGS};
use super::super::ring::RingFeatures;
use super::super::rng::Rng;
use super::super::testing::{DriverQueue, memory};
use super::common::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET};
use super::*;

const BASE: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const AT: u64 = 0x8000_0000;

#[derive(Debug)]
struct NoDoorbells;

impl DoorbellMapper for NoDoorbells {
    fn map(&self, _address: u64, _event: &Arc<EventFd>) -> std::io::Result<Box<dyn Doorbell>> {
        Err(std::io::Error::other("the stores are trapped here"))
    }
}

/// What the operator is told, in its order.
#[derive(Debug, Default)]
struct News(Mutex<Vec<&'static str>>);

impl News {
    fn take(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl LifeSink for News {
    fn activated(&self) {
        self.0.lock().unwrap().push("activated");
    }

    fn reset(&self) {
        self.0.lock().unwrap().push("reset");
    }
}

struct Bench {
    function: Arc<VirtioPci>,
    memory: Memory,
    msi: Arc<FakeAllocator>,
    window: Arc<BarWindow>,
    news: Arc<News>,
}

impl Bench {
    /// An entropy device whose BAR is decoded, with vector 1 for its queue.
    fn new() -> Self {
        let bench = Self::bare(memory());
        bench.function.config_write(0x10, &u32::try_from(AT).unwrap().to_le_bytes());
        bench.function.config_write(4, &[6, 0]);
        bench
    }

    /// One that nobody has touched.
    fn bare(memory: Memory) -> Self {
        let msi = FakeAllocator::new();
        let window = Arc::new(BarWindow::new(AT, 1 << 20).unwrap());
        let news = Arc::<News>::default();
        let function = VirtioPci::new(VirtioPciSpec {
            name: "rng".to_owned(),
            device: Arc::new(Rng::new("rng", "/dev/urandom".as_ref()).unwrap()),
            devfn: DevFn::from_bits(8),
            memory: memory.clone(),
            window: Arc::clone(&window),
            msi: msi.clone(),
            doorbells: Arc::new(NoDoorbells),
            life: Arc::clone(&news) as _,
        })
        .unwrap();
        Self { function, memory, msi, window, news }
    }

    fn put(&self, offset: u64, data: &[u8]) {
        self.window.write(AT + offset, data);
    }

    fn get<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.window.read(AT + offset, &mut data);
        data
    }

    fn status(&self) -> u8 {
        self.get::<1>(20)[0]
    }

    /// Goes as far as FEATURES_OK.
    fn negotiate(&self, features: u64) {
        self.put(20, &[0]);
        assert_eq!(self.status(), 0);
        self.put(20, &[ACKNOWLEDGE]);
        self.put(20, &[ACKNOWLEDGE | DRIVER]);
        for (select, half) in [(0_u32, features), (1, features >> 32)] {
            self.put(8, &select.to_le_bytes());
            self.put(12, &half.to_le_bytes()[..4]);
        }
        self.put(20, &[ACKNOWLEDGE | DRIVER | FEATURES_OK]);
    }

    fn set_queue(&self, queue: &DriverQueue) {
        self.put(22, &[0, 0]);
        self.put(24, &queue.layout.size.to_le_bytes());
        self.put(26, &[1, 0]);
        for (at, address) in
            [(32, queue.layout.descriptors), (40, queue.layout.driver), (48, queue.layout.device)]
        {
            self.put(at, &address.to_le_bytes()[..4]);
            self.put(at + 4, &address.to_le_bytes()[4..]);
        }
        self.put(28, &[1, 0]);
    }

    fn unmask_vectors(&self) {
        let span = self.function.capabilities.msix.start();
        self.function.config_write(span + 2, &0x8000_u16.to_le_bytes());
        for vector in 0..2 {
            let entry = u64::from(MSIX_TABLE) + vector * 16;
            self.put(entry, &0xfee0_0000_u32.to_le_bytes());
            self.put(entry + 12, &[0; 4]);
        }
    }

    fn ready(&self) {
        self.put(20, &[ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK]);
    }

    /// A driver with one queue that is at work.
    fn start(&self, features: RingFeatures) -> DriverQueue {
        let mut bits = F_VERSION_1 | F_RINGS;
        if !features.packed {
            bits &= !F_RING_PACKED;
        }
        self.memory.memory().write_slice(&[0; 0x8000], GuestAddress(BASE)).unwrap();
        self.negotiate(bits);
        let queue = DriverQueue::new(&self.memory, BASE, 16, features);
        self.set_queue(&queue);
        self.unmask_vectors();
        self.ready();
        queue
    }

    fn ring(&self) {
        self.put(DOORBELLS, &[0, 0]);
    }

    fn works(&self, queue: &mut DriverQueue) {
        let id = queue.add(&[(DATA, 64, true)]);
        self.ring();
        assert_eq!(queue.wait_used(), Some((id, 64)));
        let mut bytes = [0; 64];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
        assert_ne!(bytes, [0; 64]);
    }
}

const SPLIT: RingFeatures = RingFeatures { packed: false, event_idx: true, indirect: true };
const PACKED: RingFeatures = RingFeatures { packed: true, event_idx: true, indirect: true };

#[test]
fn a_driver_finds_the_device_sets_it_up_uses_it_and_resets_it() {
    let bench = Bench::new();
    let mut identity = [0; 4];
    bench.function.config_read(0, &mut identity);
    assert_eq!(identity, [0xf4, 0x1a, 0x44, 0x10]);
    for features in [SPLIT, PACKED, SPLIT] {
        let mut queue = bench.start(features);
        assert_eq!(bench.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        bench.works(&mut queue);
        let signals: u64 = bench.msi.vectors().iter().map(|vector| vector.signals()).sum();
        assert_eq!(signals, 1);
        assert_eq!(bench.get::<1>(ISR), [1]);
        assert_eq!(bench.get::<1>(ISR), [0], "reading clears it");
        bench.put(20, &[0]);
        assert_eq!(bench.status(), 0);
        bench.put(22, &[0, 0]);
        assert_eq!(bench.get::<2>(28), [0, 0], "the queue is not enabled any more");
    }
}

#[test]
fn features_that_were_not_offered_or_without_the_standard_are_not_agreed_to() {
    let bench = Bench::new();
    for features in [0, 1, F_VERSION_1 | 1, F_RINGS] {
        bench.negotiate(features);
        assert_eq!(bench.status() & FEATURES_OK, 0, "{features:#x}");
    }
    bench.ready();
    assert_ne!(bench.status() & NEEDS_RESET, 0);
    assert_eq!(bench.status() & DRIVER_OK, 0);
}

#[test]
fn a_broken_ring_stops_the_device_and_a_reset_mends_it() {
    let bench = Bench::new();
    let mut queue = bench.start(SPLIT);
    bench.works(&mut queue);
    queue.make_available(99);
    bench.ring();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while bench.status() & NEEDS_RESET == 0 {
        assert!(std::time::Instant::now() < deadline, "the device goes on");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(bench.get::<1>(ISR)[0] & 2, 2, "the driver is told");
    let mut queue = bench.start(SPLIT);
    bench.works(&mut queue);
}

#[test]
fn a_queue_that_is_changed_in_use_or_is_not_there_stops_the_device() {
    type Act = fn(&Bench);
    let acts: [Act; 5] = [
        |bench| bench.put(24, &[8, 0]),
        |bench| bench.put(32, &[0; 8]),
        |bench| bench.put(28, &[0, 0]),
        |bench| {
            bench.put(22, &[0xff, 0xff]);
            bench.put(28, &[1, 0]);
        },
        |bench| {
            bench.put(22, &[1, 0]);
            bench.put(24, &[8, 0]);
        },
    ];
    for (number, act) in acts.iter().enumerate() {
        let bench = Bench::new();
        let mut queue = bench.start(SPLIT);
        bench.works(&mut queue);
        act(&bench);
        assert_ne!(bench.status() & NEEDS_RESET, 0, "act {number}");
        let mut queue = bench.start(SPLIT);
        bench.works(&mut queue);
    }
}

#[test]
fn registers_answer_any_access_and_those_of_no_queue_read_zero() {
    let bench = Bench::new();
    bench.put(22, &[0xff, 0xff]);
    assert_eq!(bench.get::<2>(24), [0, 0]);
    assert_eq!(bench.get::<8>(32), [0; 8]);
    for offset in (0..BAR_SIZE - 8).step_by(7) {
        bench.get::<8>(offset);
        bench.get::<3>(offset);
        if !(20..22).contains(&offset) {
            bench.put(offset, &[0xff; 8]);
            bench.put(offset, &[0xff]);
        }
    }
    for offset in 0..256 {
        bench.function.config_write(offset, &[0xff]);
        bench.function.config_read(offset, &mut [0]);
    }
}

#[test]
fn the_operator_hears_when_the_device_begins_and_when_it_is_reset_and_of_nothing_else() {
    let bench = Bench::new();
    bench.put(20, &[0]);
    bench.negotiate(F_VERSION_1);
    bench.put(20, &[0]);
    assert_eq!(bench.news.take(), [""; 0], "a reset of what was not active");
    let _queue = bench.start(SPLIT);
    assert_eq!(bench.news.take(), ["activated"]);
    bench.ready();
    assert_eq!(bench.news.take(), [""; 0], "it is active already");
    bench.put(20, &[0]);
    bench.put(20, &[0]);
    assert_eq!(bench.news.take(), ["reset"]);
    // What cannot begin does not: this ring is nowhere.
    bench.negotiate(F_VERSION_1);
    let layout = DriverQueue::new(&bench.memory, BASE, 16, SPLIT);
    bench.set_queue(&layout);
    bench.put(36, &[0xff, 0xff, 0xff, 0]);
    bench.ready();
    assert_ne!(bench.status() & NEEDS_RESET, 0);
    bench.put(20, &[0]);
    assert_eq!(bench.news.take(), [""; 0]);
    let _queue = bench.start(PACKED);
    bench.function.shutdown();
    assert_eq!(bench.news.take(), ["activated"], "the end of the machine is no reset");
}

#[test]
fn a_device_that_is_restored_at_work_is_active_again() {
    let first = Bench::new();
    let _queue = first.start(SPLIT);
    first.function.pause();
    let second = Bench::bare(first.memory.clone());
    second.function.restore(&first.function.save().unwrap()).unwrap();
    assert_eq!(second.news.take(), ["activated"]);
}

#[test]
fn asleep_in_d3hot_it_answers_nothing_and_knows_all_when_it_is_back() {
    let bench = Bench::new();
    let mut queue = bench.start(SPLIT);
    let pmcsr = bench.function.capabilities.pm.start() + 4;
    bench.function.config_write(pmcsr, &[3, 0]);
    assert_eq!(bench.get::<4>(0), [0xff; 4]);
    bench.put(20, &[0]);
    bench.function.config_write(pmcsr, &[0, 0]);
    assert_eq!(bench.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    bench.works(&mut queue);
}

#[test]
fn the_registers_can_be_reached_by_configuration_cycles_alone() {
    let bench = Bench::new();
    let cap = bench.function.capabilities.access.start();
    let access = |offset: u32, len: u32| {
        bench.function.config_write(cap + 4, &[0]);
        bench.function.config_write(cap + 8, &offset.to_le_bytes());
        bench.function.config_write(cap + 12, &len.to_le_bytes());
    };
    access(18, 2);
    let mut count = [0; 2];
    bench.function.config_read(cap + 16, &mut count);
    assert_eq!(count, [1, 0]);
    access(20, 1);
    bench.function.config_write(cap + 16, &[ACKNOWLEDGE]);
    assert_eq!(bench.status(), ACKNOWLEDGE);
    for (offset, len) in [(u32::MAX, 4), (0xfffe, 4), (0, 3), (0, 0)] {
        access(offset, len);
        let mut data = [0; 4];
        bench.function.config_read(cap + 16, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}

#[test]
fn a_paused_device_does_nothing_and_does_it_afterwards() {
    let bench = Bench::new();
    let mut queue = bench.start(PACKED);
    bench.works(&mut queue);
    bench.function.pause();
    let id = queue.add(&[(DATA, 8, true)]);
    bench.ring();
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(queue.used(), None);
    bench.function.resume();
    assert_eq!(queue.wait_used(), Some((id, 8)));
    bench.function.pause();
    bench.put(20, &[0]);
    assert_eq!(bench.status(), 0, "a reset ends a pause");
    bench.function.resume();
}

#[test]
fn a_function_goes_on_from_what_was_saved_with_its_rings_where_they_were() {
    for features in [SPLIT, PACKED] {
        let first = Bench::new();
        let mut queue = first.start(features);
        (0..20).for_each(|_| first.works(&mut queue));
        first.function.pause();
        // Made available while nobody looks, and nobody rings for it again.
        let waiting = queue.add(&[(DATA, 64, true)]);
        let saved = first.function.save().unwrap();
        first.function.shutdown();
        let text = serde_json::to_string(&saved).unwrap();

        let second = Bench::bare(first.memory.clone());
        second.function.restore(&serde_json::from_str(&text).unwrap()).unwrap();
        assert_eq!(second.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK, "its BAR is decoded");
        second.function.resume();
        assert_eq!(queue.wait_used(), Some((waiting, 64)), "{features:?}");
        assert!(second.msi.vectors().iter().any(|vector| vector.signals() > 0), "the driver is told");
        (0..20).for_each(|_| second.works(&mut queue));
        // Saved again it is the same but for the positions.
        second.function.pause();
        let again = second.function.save().unwrap();
        for part in ["header", "pmcsr", "common", "device"] {
            assert_eq!(saved[part], again[part], "{part}");
        }
    }
}

#[test]
fn what_was_saved_of_another_device_is_refused_and_a_stopped_one_stays_stopped() {
    let first = Bench::new();
    let queue = first.start(SPLIT);
    first.function.pause();
    let saved = first.function.save().unwrap();
    let mut other = saved.clone();
    other["common"]["queues"].as_array_mut().unwrap().clear();
    let error = Bench::bare(memory()).function.restore(&other).unwrap_err();
    assert!(error.contains("queues of"), "{error}");
    let mut other = saved.clone();
    other["common"]["acknowledged"] = u64::MAX.into();
    let error = Bench::bare(memory()).function.restore(&other).unwrap_err();
    assert!(error.contains("features"), "{error}");
    first.function.resume();
    // A broken ring.
    first.memory.memory().write_obj(999_u16, GuestAddress(queue.layout.driver + 2)).unwrap();
    first.ring();
    while first.status() & NEEDS_RESET == 0 {
        std::thread::yield_now();
    }
    first.function.pause();
    let second = Bench::bare(first.memory.clone());
    second.function.restore(&first.function.save().unwrap()).unwrap();
    second.function.resume();
    assert_ne!(second.status() & NEEDS_RESET, 0);
    let mut queue = second.start(SPLIT);
    second.works(&mut queue);
}

#[test]
fn a_device_that_loses_bus_mastering_leaves_memory_alone_until_it_has_it_again_or_is_reset() {
    const COMMAND: u16 = 4;
    for features in [SPLIT, PACKED] {
        let mut bench = Bench::new();
        let mut queue = bench.start(features);
        bench.works(&mut queue);
        bench.function.config_write(COMMAND, &[2, 0]);
        let id = queue.add(&[(DATA, 8, true)]);
        bench.ring();
        // Neither a pause nor another process changes that.
        bench.function.pause();
        let saved = bench.function.save().unwrap();
        let second = Bench::bare(bench.memory.clone());
        second.function.restore(&saved).unwrap();
        bench.function.shutdown();
        bench = second;
        bench.function.resume();
        bench.ring();
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(queue.used(), None, "{features:?}");
        bench.function.config_write(COMMAND, &[6, 0]);
        assert_eq!(queue.wait_used(), Some((id, 8)), "{features:?}");
        bench.works(&mut queue);
        // Paused, it does not go on for the bit alone.
        bench.function.config_write(COMMAND, &[2, 0]);
        bench.function.pause();
        let id = queue.add(&[(DATA, 8, true)]);
        bench.function.config_write(COMMAND, &[6, 0]);
        bench.ring();
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(queue.used(), None, "{features:?}");
        bench.function.resume();
        assert_eq!(queue.wait_used(), Some((id, 8)), "{features:?}");
        // There are drivers that never set it.
        bench.function.config_write(COMMAND, &[2, 0]);
        let mut queue = bench.start(features);
        bench.works(&mut queue);
    }
}
