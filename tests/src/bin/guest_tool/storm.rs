//! A hostile guest at one block of registers: reads and writes of all widths and values, behind its kernel's back.

use std::fs::OpenOptions;
use std::io;
use std::time::{Duration, Instant};

use super::abuse::Random;
use super::{Mapping, PAGE, number};

/// Steps between two looks at the clock.
const BATCH: u64 = 256;

/// Does it for `seconds` to `length` bytes at `address`; prints how many steps that were.
pub fn run(seconds: &str, seed: &str, address: &str, length: &str) -> io::Result<()> {
    let (address, length) = (number(address)?, number(length)?);
    let memory = OpenOptions::new().read(true).write(true).open("/dev/mem")?;
    let offset = i64::try_from(address).map_err(io::Error::other)?;
    let registers = Mapping::at(&memory, PAGE, offset)?;
    let end = Instant::now() + Duration::from_secs(number(seconds)?);
    let (mut random, mut steps) = (Random(number(seed)? | 1), 0_u64);
    while Instant::now() < end {
        for _ in 0..BATCH {
            step(&registers, &mut random, length);
        }
        steps += BATCH;
    }
    println!("{steps} steps");
    Ok(())
}

fn step(registers: &Mapping, random: &mut Random, length: u64) {
    let at = random.index(usize::try_from(length).unwrap_or(PAGE));
    // Half of the values are small: numbers of things that are there.
    let value = if random.below(2) == 0 { random.below(8) } else { random.next() };
    let [low, ..] = value.to_le_bytes();
    let half = u32::try_from(value & 0xffff_ffff).unwrap_or_default();
    match random.below(10) {
        0 => registers.write(at, low),
        1 => registers.write(at & !1, u16::from(low) << 3),
        2..=5 => registers.write(at & !3, half),
        6 => registers.write(at & !7, value),
        7 => drop(registers.read::<u8>(at)),
        8 => drop(registers.read::<u32>(at & !3)),
        _ => drop(registers.read::<u64>(at & !7)),
    }
}
