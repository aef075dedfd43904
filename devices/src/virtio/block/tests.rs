//! The device behind rings of every form, over images of every kind.
#![allow(clippy::cast_possible_truncation)] // Patterns of bytes.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::AtomicU32;

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::*;
use crate::block::{DiskSpec, ImageType};
use crate::rate_limit::{Bucket, RateLimit};
use crate::virtio::Memory;
use crate::virtio::ring::RingFeatures;
use crate::virtio::testing::{DriverQueue, Interrupts, Part, activation, forms, memory};

const MIB: u64 = 1 << 20;
const RING: u64 = 0x1_0000;
const HEADER: u64 = 0x4_0000;
const DATA: u64 = 0x10_0000;
const STATUS: u64 = 0x5_0000;
const SPLIT: RingFeatures = RingFeatures { packed: false, event_idx: false, indirect: true };
/// What a driver of today takes.
const ALL: u64 = F_RINGS | F_FLUSH | F_CONFIG_WCE;

/// An image that goes when the test ends.
struct Image(PathBuf);

impl Image {
    fn raw(size: u64) -> Self {
        let image = Self::at("raw");
        File::create(&image.0).unwrap().set_len(size).unwrap();
        image
    }

    fn at(kind: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self(std::env::temp_dir().join(format!("dormouse-vblk-{}-{number}.{kind}", std::process::id())))
    }

    /// `None` without `qemu-img`.
    fn qcow2(size: &str) -> Option<Self> {
        let image = Self::at("qcow2");
        match Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image.0).arg(size).status()
        {
            Ok(status) if status.success() => Some(image),
            other => {
                eprintln!("SKIPPED: qemu-img cannot make an image (Debian package qemu-utils): {other:?}");
                None
            }
        }
    }

    fn spec(&self) -> DiskSpec {
        let image_type = if self.0.extension().unwrap() == "raw" { ImageType::Raw } else { ImageType::Qcow2 };
        DiskSpec { image_type, ..DiskSpec::new(&self.0) }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn options() -> BlockOptions {
    BlockOptions { num_queues: 1, queue_size: 64, ..BlockOptions::default() }
}

fn device(spec: &DiskSpec, options: BlockOptions) -> Block {
    Block::new("_disk0", Disk::open(spec).unwrap(), options)
}

/// A driver with one queue of a device.
struct Driver {
    memory: Memory,
    queue: DriverQueue,
    interrupts: Arc<Interrupts>,
    active: Option<Box<dyn Active>>,
}

impl Driver {
    fn new(device: &Block, form: RingFeatures, features: u64) -> Self {
        let memory = memory();
        let queue = DriverQueue::new(&memory, RING, 64, form);
        let interrupts = Arc::new(Interrupts::default());
        let queues = [queue];
        let active = device.activate(activation(&memory, features, &queues, &interrupts)).unwrap();
        let [queue] = queues;
        Self { memory, queue, interrupts, active: Some(active) }
    }

    fn header(&self, kind: u32, sector: u64) {
        let memory = self.memory.memory();
        memory.write_obj(u64::from(kind).to_le(), GuestAddress(HEADER)).unwrap();
        memory.write_obj(sector.to_le(), GuestAddress(HEADER + 8)).unwrap();
        memory.write_obj(0xff_u8, GuestAddress(STATUS)).unwrap();
    }

    /// One request in these parts; its status, and how much was written.
    fn request(&mut self, kind: u32, sector: u64, parts: &[Part]) -> (u8, u32) {
        self.header(kind, sector);
        self.queue.add(parts);
        self.queue.ring();
        let (_, written) = self.queue.wait_used().expect("an answer");
        (self.memory.memory().read_obj(GuestAddress(STATUS)).unwrap(), written)
    }

    fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.memory.memory().write_slice(bytes, GuestAddress(DATA)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        self.request(1, sector, &[(HEADER, 16, false), (DATA, len, false), (STATUS, 1, true)]).0
    }

    fn read(&mut self, sector: u64, len: u32) -> (u8, Vec<u8>) {
        let (status, written) =
            self.request(0, sector, &[(HEADER, 16, false), (DATA, len, true), (STATUS, 1, true)]);
        assert_eq!(written, if status == 0 { len + 1 } else { 0 });
        let mut bytes = vec![0; len as usize];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
        (status, bytes)
    }

    /// Discard (11) or write zeroes (13).
    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let memory = self.memory.memory();
        for (place, (sector, count, flags)) in (0..).zip(ranges) {
            memory.write_obj(sector.to_le(), GuestAddress(DATA + place * 16)).unwrap();
            memory.write_obj(count.to_le(), GuestAddress(DATA + place * 16 + 8)).unwrap();
            memory.write_obj(flags.to_le(), GuestAddress(DATA + place * 16 + 12)).unwrap();
        }
        let len = u32::try_from(ranges.len() * 16).unwrap();
        self.request(kind, 0, &[(HEADER, 16, false), (DATA, len, false), (STATUS, 1, true)]).0
    }

    fn plain(&mut self, kind: u32) -> u8 {
        self.request(kind, 0, &[(HEADER, 16, false), (STATUS, 1, true)]).0
    }
}

fn config(device: &Block) -> [u8; 64] {
    let mut bytes = [0; 64];
    device.read_config(0, &mut bytes);
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

#[test]
fn requests_are_served_over_rings_of_every_form_and_images_of_every_kind() {
    for form in forms() {
        let images = [
            Some((Image::raw(4 * MIB), false)),
            Some((Image::raw(4 * MIB), true)),
            Image::qcow2("4M").map(|i| (i, false)),
        ];
        for (image, disable_io_uring) in images.into_iter().flatten() {
            let device = device(&image.spec(), BlockOptions { disable_io_uring, ..options() });
            let mut driver = Driver::new(&device, form, ALL);
            let bytes: Vec<u8> = (0..8192_u32).map(|i| (i / 5) as u8).collect();
            assert_eq!(driver.write(100, &bytes), 0);
            assert_eq!(driver.read(100, 8192), (0, bytes.clone()));
            assert_eq!(driver.read(99, 512), (0, vec![0; 512]));
            assert_eq!(driver.plain(4), 0, "flush");
            assert_eq!(driver.ranges(13, &[(101, 1, 0), (103, 1, 1)]), 0, "write zeroes");
            let (status, now) = driver.read(100, 2048);
            assert_eq!((status, &now[..512], &now[512..1024]), (0, &bytes[..512], &[0; 512][..]));
            assert_eq!((&now[1024..1536], &now[1536..]), (&bytes[1024..1536], &[0; 512][..]));
            assert_eq!(driver.ranges(11, &[(100, 16, 0)]), 0, "discard");
            assert!(driver.interrupts.seen().stopped.is_empty());
        }
    }
}

#[test]
fn a_request_may_be_cut_up_in_any_way() {
    let image = Image::raw(MIB);
    let device = device(&image.spec(), options());
    let mut driver = Driver::new(&device, SPLIT, ALL);
    let bytes: Vec<u8> = (0..1024_u32).map(|i| (i / 3) as u8).collect();
    driver.memory.memory().write_slice(&bytes, GuestAddress(HEADER + 16)).unwrap();
    // The header in three parts, and the data in the same buffer as its end.
    let parts = [
        (HEADER, 1, false),
        (HEADER + 1, 9, false),
        (HEADER + 10, 6 + 700, false),
        (HEADER + 716, 324, false),
        (STATUS, 1, true),
    ];
    assert_eq!(driver.request(1, 8, &parts).0, 0);
    // The status in the same buffer as the data.
    let parts = [(HEADER, 16, false), (DATA, 3, true), (DATA + 3, 1022, true)];
    driver.request(0, 8, &parts);
    let mut back = vec![0; 1025];
    driver.memory.memory().read_slice(&mut back, GuestAddress(DATA)).unwrap();
    assert_eq!((&back[..1024], back[1024]), (&bytes[..], 0));
}

#[test]
fn the_serial_number_is_the_users_or_the_files() {
    let image = Image::raw(MIB);
    for (serial, expected) in
        [(Some("boot-disk"), Some(&b"boot-disk\0\0\0\0\0\0\0\0\0\0\0"[..])), (None, None)]
    {
        let device = device(&image.spec(), BlockOptions { serial: serial.map(str::to_owned), ..options() });
        let mut driver = Driver::new(&device, SPLIT, ALL);
        let (status, written) =
            driver.request(8, 0, &[(HEADER, 16, false), (DATA, 20, true), (STATUS, 1, true)]);
        assert_eq!((status, written), (0, 21));
        let mut id = [0; 20];
        driver.memory.memory().read_slice(&mut id, GuestAddress(DATA)).unwrap();
        assert!(expected.is_none_or(|expected| id == expected), "{id:?}");
        assert!(id[0] != 0);
        let short = driver.request(8, 0, &[(HEADER, 16, false), (DATA, 4, true), (STATUS, 1, true)]);
        assert_eq!(short, (0, 5));
    }
}

#[test]
fn what_is_not_on_the_disk_or_not_possible_fails_and_the_device_goes_on() {
    let image = Image::raw(MIB);
    let device = device(&image.spec(), options());
    let mut driver = Driver::new(&device, SPLIT, ALL);
    for sector in [2048, 2047, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(driver.read(sector, 1024).0, 1, "sector {sector}");
        assert_eq!(driver.write(sector, &[1; 1024]), 1, "sector {sector}");
        assert_eq!(driver.ranges(11, &[(0, 1, 0), (sector, 2, 0)]), 1, "sector {sector}");
        assert_eq!(driver.ranges(13, &[(sector, 2, 0)]), 1, "sector {sector}");
    }
    assert_eq!(driver.read(0, 100).0, 1, "no whole sectors");
    assert_eq!(driver.ranges(13, &[(0, u32::MAX, 0)]), 1, "longer than allowed");
    assert_eq!(driver.ranges(11, &[(0, 1, 1)]), 2, "a discard has no flag");
    assert_eq!(driver.ranges(13, &[(0, 1, 2)]), 2, "a flag that there is not");
    assert_eq!(driver.ranges(11, &[(0, 1, 0); 33]), 1, "more ranges than allowed");
    assert_eq!(driver.plain(11), 1, "no range");
    for kind in [2, 3, 5, 14, u32::MAX] {
        assert_eq!(driver.plain(kind), 2, "type {kind}");
    }
    assert_eq!(driver.read(2046, 1024).0, 0);
    assert!(driver.interrupts.seen().stopped.is_empty());
}

#[test]
fn a_request_that_cannot_be_answered_stops_the_device() {
    for parts in [&[(HEADER, 16, false)][..], &[(HEADER, 15, false), (STATUS, 1, true)], &[(STATUS, 1, true)]]
    {
        let image = Image::raw(MIB);
        let device = device(&image.spec(), options());
        let mut driver = Driver::new(&device, SPLIT, ALL);
        driver.header(0, 0);
        driver.queue.add(parts);
        driver.queue.ring();
        let deadline = Instant::now() + Duration::from_secs(10);
        while driver.interrupts.seen().stopped.is_empty() {
            assert!(Instant::now() < deadline, "{parts:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(driver.interrupts.seen().stopped[0].starts_with("a request has no"));
    }
}

#[test]
fn a_disk_that_is_only_read_is_never_written() {
    let image = Image::raw(MIB);
    let device = device(&DiskSpec { readonly: true, ..image.spec() }, options());
    assert!(device.features() & F_RO != 0 && device.features() & (F_DISCARD | F_WRITE_ZEROES) == 0);
    let mut driver = Driver::new(&device, SPLIT, ALL);
    assert_eq!(driver.write(0, &[1; 512]), 1);
    assert_eq!(driver.ranges(11, &[(0, 8, 0)]), 1);
    assert_eq!(driver.ranges(13, &[(0, 8, 0)]), 1);
    assert_eq!((driver.plain(4), driver.read(0, 512)), (0, (0, vec![0; 512])));
    drop(driver);
    assert!(matches!(device.resize(2 * MIB), Err(ResizeError::ReadOnly { .. })));
    assert!(fs::read(&image.0).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn the_first_sector_of_a_disk_that_only_looks_raw_is_not_written() {
    let image = Image::raw(MIB);
    let device = device(&DiskSpec::new(&image.0), options());
    let mut driver = Driver::new(&device, SPLIT, ALL);
    assert_eq!(driver.write(0, b"QFI\xfb".repeat(128).as_slice()), 1);
    assert_eq!(driver.ranges(13, &[(0, 8, 0)]), 1);
    assert_eq!(driver.ranges(11, &[(0, 8, 0)]), 1);
    assert_eq!(driver.write(1, &[1; 512]), 0);
    assert_eq!(driver.read(0, 512), (0, vec![0; 512]));
}

#[test]
fn the_configuration_describes_the_disk_and_hears_of_a_new_size() {
    let images = [Some(Image::raw(MIB)), Image::qcow2("1M")];
    for image in images.into_iter().flatten() {
        let device =
            device(&image.spec(), BlockOptions { num_queues: 3, queue_size: 128, ..BlockOptions::default() });
        assert_eq!(device.queue_sizes(), [128; 3]);
        let bytes = config(&device);
        assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()), 2048);
        assert_eq!((u32_at(&bytes, 12), u32_at(&bytes, 20), bytes[24], bytes[34]), (126, 512, 3, 3));
        let mut driver = Driver::new(&device, SPLIT, ALL);
        assert_eq!(driver.read(2048, 512).0, 1);
        device.resize(3 * MIB).unwrap();
        assert_eq!(driver.interrupts.seen().config, 1);
        assert_eq!(u64::from_le_bytes(config(&device)[..8].try_into().unwrap()), 6144);
        assert_eq!(driver.write(6143, &[4; 512]), 0);
        device.resize(MIB).unwrap();
        assert_eq!(driver.read(2048, 512).0, 1, "cut off");
        assert!(device.resize(1000).unwrap_err().to_string().contains("whole number of sectors"));
        // What a driver reads behind the end, and in pieces.
        let mut byte = [7];
        device.read_config(1000, &mut byte);
        device.read_config(u64::MAX, &mut byte);
        device.read_config(34, &mut byte);
        assert_eq!(byte, [3]);
    }
}

#[test]
fn the_driver_chooses_the_cache_mode() {
    let image = Image::raw(MIB);
    let device = device(&image.spec(), options());
    assert_eq!(config(&device)[32], 1);
    device.write_config(32, &[0]);
    device.write_config(0, &[9; 8]);
    assert_eq!((config(&device)[32], config(&device)[0]), (0, 0));
    let mut driver = Driver::new(&device, SPLIT, ALL);
    assert!(device.shared.is_writethrough());
    assert_eq!(driver.write(3, &[1; 512]), 0);
    device.write_config(28, &[9, 9, 9, 9, 1]);
    assert!(!device.shared.is_writethrough());
    drop(driver);
    let mut driver = Driver::new(&device, SPLIT, F_RINGS);
    assert!(device.shared.is_writethrough(), "who knows no flush never has to wait for one");
    assert_eq!(driver.write(3, &[1; 512]), 0);
}

#[test]
fn what_is_counted_has_the_names_of_the_api() {
    let image = Image::raw(MIB);
    let device = device(&image.spec(), options());
    let count = |name: &str| device.counters().iter().find(|(known, _)| *known == name).unwrap().1;
    assert_eq!((count("read_latency_min"), count("write_latency_max")), (u64::MAX, u64::MAX));
    let mut driver = Driver::new(&device, SPLIT, ALL);
    driver.write(0, &[1; 1024]);
    driver.write(2, &[1; 512]);
    driver.read(0, 4096);
    driver.read(4096, 512);
    assert_eq!((count("write_ops"), count("write_bytes")), (2, 1536));
    assert_eq!((count("read_ops"), count("read_bytes")), (1, 4096), "what failed does not count");
    assert!(count("write_latency_min") <= count("write_latency_avg"));
    assert!(count("write_latency_avg") <= count("write_latency_max"));
}

#[test]
fn many_requests_at_a_time_are_each_answered_once() {
    for form in forms() {
        for direct in [false, true] {
            let image = Image::raw(MIB);
            let device = device(&DiskSpec { direct, ..image.spec() }, options());
            let mut driver = Driver::new(&device, form, ALL);
            let view = driver.memory.memory();
            for round in 0..10_u64 {
                for n in 0..20_u64 {
                    let (header, data, status) = (HEADER + n * 64, DATA + n * 4096, STATUS + n);
                    view.write_obj(1_u32.to_le(), GuestAddress(header)).unwrap();
                    view.write_obj((n * 8).to_le(), GuestAddress(header + 8)).unwrap();
                    view.write_slice(&[(round * 20 + n) as u8; 4096], GuestAddress(data)).unwrap();
                    view.write_obj(0xff_u8, GuestAddress(status)).unwrap();
                    driver.queue.add(&[(header, 16, false), (data, 4096, false), (status, 1, true)]);
                }
                driver.queue.ring();
                for _ in 0..20 {
                    assert_eq!(driver.queue.wait_used().expect("an answer").1, 1);
                }
                let mut all = [0xff; 20];
                view.read_slice(&mut all, GuestAddress(STATUS)).unwrap();
                assert_eq!(all, [0; 20]);
            }
            for n in 0..20_u64 {
                assert_eq!(driver.read(n * 8, 4096), (0, vec![(9 * 20 + n) as u8; 4096]));
            }
        }
    }
}

#[test]
fn a_pause_ends_what_has_begun_and_nothing_is_lost() {
    let image = Image::raw(MIB);
    let device = device(&image.spec(), options());
    let mut driver = Driver::new(&device, SPLIT, ALL);
    driver.header(1, 5);
    driver.queue.add(&[(HEADER, 16, false), (DATA, 4096, false), (STATUS, 1, true)]);
    driver.queue.ring();
    driver.active.as_ref().unwrap().pause();
    let before = driver.queue.used();
    driver.queue.add(&[(HEADER, 16, false), (DATA, 4096, false), (STATUS, 1, true)]);
    driver.queue.ring();
    std::thread::sleep(Duration::from_millis(50));
    assert!(before.is_none() || driver.queue.used().is_none(), "nothing is begun in a pause");
    driver.active.as_ref().unwrap().resume();
    for _ in 0..if before.is_some() { 1 } else { 2 } {
        assert!(driver.queue.wait_used().is_some());
    }
    driver.active.as_ref().unwrap().stop();
    assert!(driver.active.as_ref().unwrap().wait_stopped(Duration::from_secs(10)));
    driver.active = None;
    let mut driver = Driver::new(&device, forms()[3], ALL);
    assert_eq!(driver.read(5, 512).0, 0, "the driver after it finds it as new");
}

#[test]
fn a_limit_slows_the_disk_down_and_a_group_all_its_disks_together() {
    let bucket = Bucket { size: 10, one_time_burst: 0, refill_time: Duration::from_millis(500) };
    let limiter = || {
        let limit = RateLimit { bandwidth: None, ops: Some(bucket) };
        Limiter::new(&limit, Instant::now()).map(Arc::new)
    };
    let images = [Image::raw(MIB), Image::raw(MIB)];
    let run = |limiters: [Option<Arc<Limiter>>; 2]| {
        let disks = [0, 1]
            .map(|n| device(&images[n].spec(), BlockOptions { limiter: limiters[n].clone(), ..options() }));
        let mut drivers = disks.each_ref().map(|disk| Driver::new(disk, SPLIT, ALL));
        let start = Instant::now();
        for _ in 0..10 {
            for driver in &mut drivers {
                assert_eq!(driver.read(0, 512).0, 0);
            }
        }
        start.elapsed()
    };
    let group = limiter();
    // Ten are free, and the other ten are earned in half a second.
    let together = run([group.clone(), group]);
    assert!(together >= Duration::from_millis(400) && together < Duration::from_secs(8), "{together:?}");
}

#[test]
fn a_full_disk_is_an_error_of_the_guests() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can mount a small file system");
        return;
    }
    let place = std::env::temp_dir().join(format!("dormouse-full-{}", std::process::id()));
    fs::create_dir_all(&place).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=256k", "none"]).arg(&place).status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: a small file system cannot be mounted here");
        return;
    }
    for disable_io_uring in [false, true] {
        let path = place.join("disk");
        File::create(&path).unwrap().set_len(4 * MIB).unwrap();
        let spec = DiskSpec { image_type: ImageType::Raw, ..DiskSpec::new(&path) };
        let device = device(&spec, BlockOptions { disable_io_uring, ..options() });
        let mut driver = Driver::new(&device, SPLIT, ALL);
        let results: Vec<u8> = (0..8).map(|n| driver.write(n * 256, &[1; 128 * 1024])).collect();
        assert!(results[0] == 0 && results[7] == 1, "{results:?}");
        assert_eq!(driver.ranges(11, &[(0, 2048, 0)]), 0, "room is given back");
        assert_eq!(driver.write(2048, &[2; 65536]), 0, "and can be used again");
        assert!(driver.interrupts.seen().stopped.is_empty());
        drop(driver);
        drop(device);
        fs::remove_file(&path).unwrap();
    }
    assert!(Command::new("umount").arg(&place).status().unwrap().success());
    let _ = fs::remove_dir(&place);
}

#[test]
fn threads_are_named_after_their_queues_and_run_where_they_are_told() {
    let image = Image::raw(MIB);
    let affinity = vec![(0, vec![0])];
    let device = device(&image.spec(), BlockOptions { affinity, ..options() });
    let mut driver = Driver::new(&device, SPLIT, ALL);
    assert_eq!(driver.read(0, 512).0, 0);
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    let found = tasks.map(|task| task.path()).find(|task: &PathBuf| {
        let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
        let status = fs::read_to_string(task.join("status")).unwrap_or_default();
        name.trim() == "_disk0_q0" && status.lines().any(|line| line == "Cpus_allowed_list:\t0")
    });
    assert!(found.is_some());
}

/// Identifiers of this process's threads of a name.
fn threads(name: &str) -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    let called =
        tasks.filter(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|n| n.trim() == name));
    called.map(|task| task.file_name().into_string().unwrap()).collect()
}

#[test]
fn a_queue_that_falls_idle_gets_a_thread_without_workers_of_the_kernel_and_goes_on() {
    let image = Image::raw(MIB);
    let device = Block::new("_idledisk", Disk::open(&image.spec()).unwrap(), options());
    let mut driver = Driver::new(&device, SPLIT, ALL);
    let parts = [(HEADER, 16, false), (DATA, 512, false), (STATUS, 1, true)];
    let mut seen = Vec::new();
    for round in 0..3 {
        // A flush is what the kernel has no way to do at once.
        for _ in 0..3 {
            assert_eq!(driver.request(1, round, &parts).0, 0);
            assert_eq!(driver.request(4, 0, &[(HEADER, 16, false), (STATUS, 1, true)]).0, 0);
        }
        let [before] = threads("_idledisk_q0").try_into().unwrap();
        assert!(!seen.contains(&before), "round {round}");
        let deadline = Instant::now() + Duration::from_secs(20);
        while threads("_idledisk_q0").contains(&before) {
            assert!(Instant::now() < deadline, "round {round}: the thread stays");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(threads(&format!("iou-wrk-{before}")), [""; 0], "round {round}");
        seen.push(before);
    }
    drop(driver);
    assert_eq!(threads("_idledisk_q0"), [""; 0], "after the reset");
}
