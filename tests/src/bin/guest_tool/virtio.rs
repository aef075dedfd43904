//! A virtio driver in user space (VIRTIO 1.2, sections 2.7, 3.1 and 4.1), for what no driver of a kernel does: breaking a ring on purpose, and giving
//! Cloud Hypervisor's watchdog, for which Linux has no driver, its signs of life.
//!
//! The function must have no driver, and its BARs must be mappable (`iomem=relaxed`).

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::thread;
use std::time::{Duration, Instant};

use super::{Mapping, PAGE, map_bars, number, sysfs};

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;
/// VIRTIO_F_VERSION_1 and VIRTIO_F_RING_PACKED, as bits of the upper half.
const VERSION_1: u32 = 1;
const RING_PACKED: u32 = 4;
/// Flags of a packed descriptor that the driver has made available in the first turn.
const AVAILABLE: u16 = 1 << 7;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Memory decode and bus mastering, in the command register.
const COMMAND: u64 = 4;
const DECODE: u16 = 6;
/// An address with no memory behind it: that of the local APICs.
const NOWHERE: u64 = 0xfee0_0000;
/// Longer than the VMM waits for another process that does not answer, twice.
const PATIENCE: Duration = Duration::from_secs(20);

/// A page that stays where it is.
struct Page {
    mapping: Mapping,
    physical: u64,
}

impl Page {
    fn new() -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let address = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_LOCKED | libc::MAP_POPULATE;
            libc::mmap(ptr::null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mapping = Mapping { address: address.cast(), length: PAGE };
        mapping.write::<u64>(0, 0);
        // One entry for each page; the frame's number is in bits 0 to 54 (Documentation/admin-guide/mm/pagemap.rst).
        let mut entry = [0; 8];
        let place = address as u64 / PAGE as u64 * 8;
        File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, place)?;
        let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
        if frame == 0 {
            return Err(io::Error::other("the kernel does not say where a page is"));
        }
        Ok(Self { mapping, physical: frame * PAGE as u64 })
    }
}

/// The function's registers.
struct Device {
    bars: Vec<(usize, Mapping)>,
    common: (usize, usize),
    notify: (usize, usize, usize),
}

impl Device {
    fn open(bdf: &str) -> io::Result<Self> {
        let config = fs::read(sysfs(bdf, "config"))?;
        let file = File::options().write(true).open(sysfs(bdf, "config"))?;
        file.write_all_at(&DECODE.to_le_bytes(), COMMAND)?;
        let dword = |at: usize| {
            let bytes = config.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, |bytes| usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(0))
        };
        let (mut common, mut notify) = (None, None);
        let mut at = usize::from(config[0x34]);
        for _ in 0..48 {
            if at == 0 {
                break;
            }
            if config[at] == 9 {
                let place = (usize::from(config[at + 4]), dword(at + 8));
                match config[at + 3] {
                    1 => common = Some(place),
                    2 => notify = Some((place.0, place.1, dword(at + 16))),
                    _ => {}
                }
            }
            at = usize::from(config[at + 1]);
        }
        let missing = || io::Error::other("no virtio capabilities");
        Ok(Self {
            bars: map_bars(bdf)?,
            common: common.ok_or_else(missing)?,
            notify: notify.ok_or_else(missing)?,
        })
    }

    fn bar(&self, index: usize) -> &Mapping {
        self.bars.iter().find(|(number, _)| *number == index).map_or(&self.bars[0].1, |(_, bar)| bar)
    }

    fn get<T: Copy + Default>(&self, at: usize) -> T {
        self.bar(self.common.0).read(self.common.1 + at)
    }

    fn set<T>(&self, at: usize, value: T) {
        self.bar(self.common.0).write(self.common.1 + at, value);
    }

    fn status(&self) -> u8 {
        self.get(20)
    }

    fn reset(&self) -> io::Result<()> {
        self.set(20, 0_u8);
        wait(|| self.status() == 0, "the device does not end its reset")
    }

    /// Whether there are packed rings.
    fn has_packed(&self) -> bool {
        self.set(0, 1_u32);
        self.get::<u32>(4) & RING_PACKED != 0
    }

    fn negotiate(&self) -> io::Result<()> {
        self.negotiate_with(VERSION_1)
    }

    fn negotiate_with(&self, upper: u32) -> io::Result<()> {
        self.reset()?;
        self.set(20, ACKNOWLEDGE);
        self.set(20, ACKNOWLEDGE | DRIVER);
        for (half, bits) in [(0_u32, 0_u32), (1, upper)] {
            self.set(8, half);
            self.set(12, bits);
        }
        self.set(20, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if self.status() & FEATURES_OK == 0 {
            return Err(io::Error::other(
                "the device does not agree to VERSION_1 and, if asked, packed rings",
            ));
        }
        Ok(())
    }

    fn ready(&self) {
        self.set(20, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    fn ring(&self, queue: u16) {
        let (bar, offset, step) = self.notify;
        self.bar(bar).write(offset + usize::from(queue) * step, queue);
    }
}

fn wait(done: impl Fn() -> bool, what: &str) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        if Instant::now() > deadline {
            return Err(io::Error::other(what.to_owned()));
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// One split queue of few descriptors, in pages of its own.
struct Queue {
    number: u16,
    size: u16,
    table: Page,
    driver: Page,
    device: Page,
    data: Page,
    available: u16,
}

impl Queue {
    fn new(number: u16) -> io::Result<Self> {
        let page = Page::new;
        Ok(Self {
            number,
            size: 8,
            table: page()?,
            driver: page()?,
            device: page()?,
            data: page()?,
            available: 0,
        })
    }

    /// Sets the queue up in the device, and all others of the device with it, so that devices with several start to work.
    fn enable(&self, device: &Device) -> io::Result<Vec<Self>> {
        self.enable_one(device);
        let mut others = Vec::new();
        for number in (0..device.get::<u16>(18)).filter(|number| *number != self.number) {
            let queue = Self::new(number)?;
            queue.enable_one(device);
            others.push(queue);
        }
        Ok(others)
    }

    fn enable_one(&self, device: &Device) {
        device.set(22, self.number);
        device.set(24, self.size);
        for (at, page) in [(32, &self.table), (40, &self.driver), (48, &self.device)] {
            let low = u32::try_from(page.physical & u64::from(u32::MAX)).unwrap_or(0);
            device.set(at, low);
            device.set(at + 4, u32::try_from(page.physical >> 32).unwrap_or(0));
        }
        device.set(28, 1_u16);
    }

    fn describe(&self, place: usize, address: u64, len: u32, flags: u16, next: u16) {
        let table = &self.table.mapping;
        table.write(place * 16, address);
        table.write(place * 16 + 8, len);
        table.write(place * 16 + 12, flags);
        table.write(place * 16 + 14, next);
    }

    fn offer(&mut self, head: u16) {
        let entry = 4 + usize::from(self.available % self.size) * 2;
        self.driver.mapping.write(entry, head);
        self.available = self.available.wrapping_add(1);
        self.driver.mapping.write(2, self.available);
    }

    /// A descriptor of a packed ring, for the device to take.
    fn describe_packed(&self, place: usize, address: u64, len: u32, id: u16, flags: u16) {
        self.describe(place, address, len, id, flags | AVAILABLE);
    }

    fn used(&self) -> u16 {
        self.device.mapping.read(2)
    }
}

type Offence = fn(&Device, &mut Queue);

/// What a driver must not do; each leaves the device to notice.
const OFFENCES: &[(&str, Offence)] = &[
    ("loop", |_, queue| {
        queue.describe(0, queue.data.physical, 8, NEXT | WRITE, 1);
        queue.describe(1, queue.data.physical, 8, NEXT | WRITE, 0);
        queue.offer(0);
    }),
    ("self-loop", |_, queue| {
        queue.describe(0, queue.data.physical, 8, NEXT | WRITE, 0);
        queue.offer(0);
    }),
    ("next-past-the-table", |_, queue| {
        queue.describe(0, queue.data.physical, 8, NEXT | WRITE, 8);
        queue.offer(0);
    }),
    ("head-past-the-table", |_, queue| queue.offer(0xfff0)),
    ("index-jump", |_, queue| queue.driver.mapping.write(2, 0x4000_u16)),
    ("index-back", |_, queue| queue.driver.mapping.write(2, 0xffff_u16)),
    ("chain-longer-than-the-queue", |_, queue| {
        for (place, next) in (0..8_usize).zip([1_u16, 2, 3, 4, 5, 6, 7, 0]) {
            queue.describe(place, queue.data.physical, 8, NEXT | WRITE, next);
        }
        queue.offer(0);
    }),
    ("duplicate-head", |_, queue| {
        queue.describe(0, queue.data.physical, 512, WRITE, 0);
        queue.driver.mapping.write(4, 0_u16);
        queue.driver.mapping.write(6, 0_u16);
        queue.driver.mapping.write(2, 2_u16);
    }),
    ("buffer-nowhere", |_, queue| {
        queue.describe(0, NOWHERE, 8, WRITE, 0);
        queue.offer(0);
    }),
    ("buffer-past-the-address-space", |_, queue| {
        queue.describe(0, u64::MAX - 3, 8, WRITE, 0);
        queue.offer(0);
    }),
    ("buffer-too-long", |_, queue| {
        queue.describe(0, queue.data.physical, u32::MAX, WRITE, 0);
        queue.offer(0);
    }),
    ("readable-behind-writable", |_, queue| {
        queue.describe(0, queue.data.physical, 8, NEXT | WRITE, 1);
        queue.describe(1, queue.data.physical, 8, 0, 0);
        queue.offer(0);
    }),
    ("indirect-not-agreed", |_, queue| {
        queue.describe(0, queue.data.physical, 16, INDIRECT, 0);
        queue.offer(0);
    }),
    ("size-in-use", |device, queue| {
        device.set(22, queue.number);
        device.set(24, 4_u16);
    }),
    ("address-in-use", |device, queue| {
        device.set(22, queue.number);
        device.set(32, 0_u32);
    }),
    ("queue-that-is-not-there", |device, _| {
        device.set(22, 0xffff_u16);
        device.set(28, 1_u16);
    }),
];

/// What a driver must not put into a packed ring.
const PACKED_OFFENCES: &[(&str, Offence)] = &[
    ("packed-endless-chain", |_, queue| {
        (1..8).for_each(|place| queue.describe_packed(place, queue.data.physical, 8, 0, NEXT | WRITE));
        queue.describe_packed(0, queue.data.physical, 8, 0, NEXT | WRITE);
    }),
    ("packed-unfinished-chain", |_, queue| {
        queue.describe_packed(0, queue.data.physical, 8, 0, NEXT | WRITE);
    }),
    ("packed-id-past-the-table", |_, queue| {
        queue.describe_packed(0, queue.data.physical, 8, 0xfff0, WRITE);
    }),
    ("packed-buffer-nowhere", |_, queue| queue.describe_packed(0, NOWHERE, 8, 0, WRITE)),
    ("packed-buffer-past-the-address-space", |_, queue| queue.describe_packed(0, u64::MAX - 3, 8, 0, WRITE)),
    ("packed-buffer-too-long", |_, queue| {
        queue.describe_packed(0, queue.data.physical, u32::MAX, 0, WRITE);
    }),
    ("packed-readable-behind-writable", |_, queue| {
        queue.describe_packed(1, queue.data.physical, 8, 0, 0);
        queue.describe_packed(0, queue.data.physical, 8, 0, NEXT | WRITE);
    }),
    ("packed-indirect-not-agreed", |_, queue| {
        queue.describe_packed(0, queue.data.physical, 16, 0, INDIRECT);
    }),
    ("packed-size-in-use", |device, queue| {
        device.set(22, queue.number);
        device.set(24, 4_u16);
    }),
];

/// What makes a device that cannot start.
const BAD_STARTS: &[(&str, Offence)] = &[
    ("ring-nowhere", |device, _| {
        device.set(40, 0xfee0_0000_u32);
        device.set(44, 0_u32);
    }),
    ("ring-misaligned", |device, queue| {
        device.set(32, u32::try_from((queue.table.physical + 1) & u64::from(u32::MAX)).unwrap_or(1));
    }),
    ("size-zero", |device, _| device.set(24, 0_u16)),
    ("size-not-a-power-of-two", |device, _| device.set(24, 7_u16)),
    ("size-huge", |device, _| device.set(24, 0x8000_u16)),
];

/// Breaks queue `queue` of the device in every way there is; after each one the device must want a reset, and work again after it. With `survive` it
/// need not: somebody else than the VMM serves its rings.
pub fn break_rings(bdf: &str, queue: &str, survive: bool) -> io::Result<()> {
    let number = u16::try_from(number(queue)?).map_err(io::Error::other)?;
    let device = Device::open(bdf)?;
    let stopped = || device.status() & NEEDS_RESET != 0;
    let packed = if device.has_packed() { PACKED_OFFENCES } else { &[] };
    let split = OFFENCES.iter().map(|offence| (VERSION_1, offence));
    for (features, (name, offence)) in split.chain(packed.iter().map(|o| (VERSION_1 | RING_PACKED, o))) {
        device.negotiate_with(features)?;
        let mut queue = Queue::new(number)?;
        let _others = queue.enable(&device)?;
        device.ready();
        if stopped() && !survive {
            return Err(io::Error::other(format!(
                "{name}: the device has stopped before anything was wrong"
            )));
        }
        offence(&device, &mut queue);
        device.ring(number);
        if survive {
            thread::sleep(Duration::from_millis(100));
            println!("{name}: {}", if stopped() { "stopped" } else { "goes on" });
        } else {
            wait(stopped, &format!("{name}: the device goes on"))?;
            println!("{name}: stopped");
        }
        device.reset()?;
    }
    for (name, offence) in BAD_STARTS {
        device.negotiate()?;
        let mut queue = Queue::new(number)?;
        // The last one to be set up is the one selected, and not enabled yet.
        for other in (0..device.get::<u16>(18)).filter(|other| *other != number) {
            Queue::new(other)?.enable_one(&device);
        }
        queue.enable_one_with(&device, *offence);
        device.ready();
        wait(stopped, &format!("{name}: the device has started"))?;
        println!("{name}: stopped");
        device.reset()?;
    }
    // Resets in the middle of work. Another process than the VMM takes its time for each.
    let resets = if survive { 10 } else { 50 };
    for _ in 0..resets {
        device.negotiate()?;
        let mut queue = Queue::new(number)?;
        let _others = queue.enable(&device)?;
        device.ready();
        for place in 0..8 {
            queue.describe(usize::from(place), queue.data.physical, 512, WRITE, 0);
            queue.offer(place);
        }
        device.ring(number);
        device.reset()?;
    }
    println!("reset {resets} times at work");
    Ok(())
}

impl Queue {
    fn enable_one_with(&mut self, device: &Device, change: Offence) {
        device.set(22, self.number);
        device.set(24, self.size);
        for (at, physical) in
            [(32, self.table.physical), (40, self.driver.physical), (48, self.device.physical)]
        {
            device.set(at, u32::try_from(physical & u64::from(u32::MAX)).unwrap_or(0));
            device.set(at + 4, u32::try_from(physical >> 32).unwrap_or(0));
        }
        change(device, self);
        device.set(28, 1_u16);
    }
}

/// Breaks queue `queue` in one way and leaves it so for `seconds`; then the device is reset.
pub fn hold_broken(bdf: &str, queue: &str, way: &str, seconds: &str) -> io::Result<()> {
    let number = u16::try_from(number(queue)?).map_err(io::Error::other)?;
    let (_, offence) = OFFENCES
        .iter()
        .find(|(name, _)| *name == way)
        .ok_or_else(|| io::Error::other(format!("{way} is none of the ways to break a ring")))?;
    let device = Device::open(bdf)?;
    device.negotiate()?;
    let mut queue = Queue::new(number)?;
    let _others = queue.enable(&device)?;
    device.ready();
    offence(&device, &mut queue);
    device.ring(number);
    println!("broken");
    thread::sleep(Duration::from_secs(super::number(seconds)?));
    device.reset()?;
    println!("reset");
    Ok(())
}

/// Gives the watchdog a sign of life every second, `count` times, and none after that.
pub fn watchdog(bdf: &str, count: &str) -> io::Result<()> {
    let device = Device::open(bdf)?;
    device.negotiate()?;
    let mut queue = Queue::new(0)?;
    queue.enable_one(&device);
    device.ready();
    for sign in 1..=number(count)? {
        queue.describe(0, queue.data.physical, 1, WRITE, 0);
        queue.offer(0);
        device.ring(0);
        wait(|| u64::from(queue.used()) == sign & 0xffff, "the watchdog does not answer")?;
        thread::sleep(Duration::from_secs(1));
    }
    println!("silent");
    // The rings stay where they are for as long as the device may look at them.
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}
