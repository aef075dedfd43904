//! A hostile guest: random accesses to everything that its root user reaches of assigned functions, for as long as it is told.
//!
//! What it does not do is harm to itself, which would prove nothing: it leaves bus mastering off, since a device that has random bytes
//! in its registers would write to random places of the guest's memory.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use super::{Mapping, PAGE, map_bars, number, sysfs};

/// The power notification device (docs/power.md): the page, its REQUEST registers, and how many of them are likely to be in use.
const NOTIFICATION: i64 = 0xfed1_0000;
const REQUESTS: usize = 0x100;
const RESOURCES: u64 = 8;
/// Command register, and the bit of it that is left off: bus mastering.
const COMMAND: u64 = 4;
const BUS_MASTER: u32 = 4;
/// Bridge Control, and its bit that resets the bus below.
const BRIDGE_CONTROL: u64 = 0x3e;
const SECONDARY_RESET: u16 = 1 << 6;
/// Of so many steps one resets a bus: each takes the host 100 ms.
const STEPS_TO_A_RESET: u64 = 3000;
/// Steps between two looks at the clock.
const BATCH: u64 = 256;

/// Random numbers by the xorshift of Marsaglia (2003): good enough, and the same again for the same seed.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    pub(super) fn index(&mut self, limit: usize) -> usize {
        usize::try_from(self.below(u64::try_from(limit).unwrap_or(u64::MAX))).unwrap_or(0)
    }

    pub(super) fn half(&mut self) -> u32 {
        u32::try_from(self.next() >> 32).unwrap_or_default()
    }
}

/// One function within reach.
struct Target {
    config: File,
    port: Option<File>,
    bars: Vec<Mapping>,
}

/// Does its worst to the functions `bdfs` for `seconds`; prints how many steps that were.
pub fn run(seconds: &str, seed: &str, bdfs: &[&str]) -> io::Result<()> {
    let until = Instant::now() + Duration::from_secs(number(seconds)?);
    let mut random = Random(number(seed)?.max(1));
    let memory = OpenOptions::new().read(true).write(true).open("/dev/mem")?;
    let notification = Mapping::at(&memory, PAGE, NOTIFICATION)?;
    let targets = bdfs.iter().map(|bdf| reach(bdf)).collect::<io::Result<Vec<_>>>()?;
    let mut steps = 0_u64;
    while Instant::now() < until {
        for _ in 0..BATCH {
            let target = &targets[random.index(targets.len())];
            match random.below(8) {
                0..3 => power(&notification, &mut random),
                3..5 => configuration(&target.config, &mut random),
                5 => port(target, &mut random),
                _ => bar(target, &mut random),
            }
        }
        steps += BATCH;
    }
    println!("{steps} steps");
    Ok(())
}

fn reach(bdf: &str) -> io::Result<Target> {
    let open = |path: String| OpenOptions::new().read(true).write(true).open(path);
    let directory = fs::canonicalize(sysfs(bdf, ""))?;
    let port = directory.parent().map(|port| port.join("config")).filter(|config| config.exists());
    Ok(Target {
        config: open(sysfs(bdf, "config"))?,
        port: port.map(|config| open(config.display().to_string())).transpose()?,
        bars: map_bars(bdf)?.into_iter().map(|(_, bar)| bar).collect(),
    })
}

/// `_ON` and `_OFF` without AML, and anything else at any place of the page.
fn power(page: &Mapping, random: &mut Random) {
    let resource = REQUESTS + 8 * usize::try_from(random.below(RESOURCES)).unwrap_or(0);
    match random.below(6) {
        0 | 1 => page.write::<u32>(resource, 0),
        2 | 3 => page.write::<u32>(resource, 1),
        4 => drop(page.read::<u32>(resource + 4)),
        _ => access(page, random),
    }
}

/// A read or a write of any width at any place.
fn access(mapping: &Mapping, random: &mut Random) {
    let at = random.index(mapping.length());
    let value = random.next();
    let bytes = value.to_le_bytes();
    match random.below(8) {
        0 => drop(mapping.read::<u8>(at)),
        1 => drop(mapping.read::<u16>(at & !1)),
        2 | 3 => drop(mapping.read::<u32>(at & !3)),
        4 => drop(mapping.read::<u64>(at & !7)),
        5 => mapping.write::<u8>(at, bytes[0]),
        6 => mapping.write::<u32>(at & !3, random.half()),
        _ => mapping.write::<u64>(at & !7, value),
    }
}

fn bar(target: &Target, random: &mut Random) {
    if !target.bars.is_empty() {
        access(&target.bars[random.index(target.bars.len())], random);
    }
}

/// Configuration space: what the header and the capabilities hold, by the kernel, which splits nothing that is aligned.
fn configuration(config: &File, random: &mut Random) {
    let at = random.below(0x100) & !3;
    let mut bytes = [0; 4];
    if random.below(2) == 0 {
        let _ = config.read_at(&mut bytes, at);
        return;
    }
    let mut value = random.half();
    if at == COMMAND {
        value &= 0xffff & !BUS_MASTER;
    }
    let bytes = value.to_le_bytes();
    let _ = match random.below(3) {
        0 => config.write_at(&bytes, at),
        1 => config.write_at(&bytes[..2], at),
        // The low byte of COMMAND has the bit; the others of its dword are free.
        _ => config.write_at(&bytes[..1], at),
    };
}

/// The port above: its power state and, now and then, a reset of the bus below.
fn port(target: &Target, random: &mut Random) {
    let Some(config) = &target.port else { return };
    if random.below(STEPS_TO_A_RESET / 8) == 0 {
        let mut control = [0; 2];
        let _ = config.read_at(&mut control, BRIDGE_CONTROL);
        let value = u16::from_le_bytes(control);
        let _ = config.write_at(&(value | SECONDARY_RESET).to_le_bytes(), BRIDGE_CONTROL);
        let _ = config.write_at(&(value & !SECONDARY_RESET).to_le_bytes(), BRIDGE_CONTROL);
        return;
    }
    // Whatever lies behind the header: capabilities are small models, and every one must stand it.
    let at = 0x40 + (random.below(0xc0) & !1);
    let value = u16::try_from(random.next() & 0xffff).unwrap_or_default();
    let _ = config.write_at(&value.to_le_bytes(), at);
}
