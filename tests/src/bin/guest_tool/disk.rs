//! Accesses to a disk past the guest's cache, for measuring: so many of one size, a number of them at a time, in a row or anywhere. One thread begins
//! all of them by io_uring, as programs that care for speed do.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use io_uring::types::Fd;
use io_uring::{IoUring, opcode};

/// Memory that starts here is one huge page: what is given to the disk is in one piece in each run, not in more or fewer by chance.
const ALIGN: usize = 2 << 20;

/// `disk PATH read|write BYTES DEPTH COUNT random|row SPAN`: says `ready`, waits for a line, and makes COUNT accesses within the first SPAN bytes.
pub fn run(words: &[&str]) -> io::Result<()> {
    let &[path, direction, bytes, depth, count, order, span] = words else {
        return Err(io::Error::other("it takes PATH read|write BYTES DEPTH COUNT random|row SPAN"));
    };
    let (bytes, depth): (u32, u32) = (number(bytes)?, number(depth)?);
    let (count, span): (u64, u64) = (number(count)?, number(span)?);
    let writes = direction == "write";
    let file = OpenOptions::new().read(true).write(writes).custom_flags(libc::O_DIRECT).open(path)?;
    let size = usize::try_from(bytes).map_err(io::Error::other)?;
    let slots = usize::try_from(depth).map_err(io::Error::other)?;
    // Never given back: the kernel may still be at work on it after an error.
    let memory = vec![1_u8; (size * slots).next_multiple_of(ALIGN) + ALIGN].leak();
    let skip = memory.as_ptr().align_offset(ALIGN);
    let mut ring = IoUring::new(depth)?;
    let mut places = Places {
        random: order == "random",
        step: u64::from(bytes),
        count: span / u64::from(bytes.max(1)),
        state: 0,
    };

    // Whoever measures gives the word when all is there.
    println!("ready");
    io::stdin().read_line(&mut String::new())?;
    let mut free: Vec<usize> = (0..slots).collect();
    let (mut begun, mut done) = (0, 0);
    while done < count {
        while let Some(slot) = free.pop_if(|_| begun < count) {
            let buffer = memory[skip + slot * size..].as_mut_ptr();
            let place = places.next();
            let entry = if writes {
                opcode::Write::new(Fd(file.as_raw_fd()), buffer, bytes).offset(place).build()
            } else {
                opcode::Read::new(Fd(file.as_raw_fd()), buffer, bytes).offset(place).build()
            };
            // SAFETY: the buffer is a slot of `memory`, which lives forever, and no other access uses it now.
            unsafe { ring.submission().push(&entry.user_data(slot as u64)) }.map_err(io::Error::other)?;
            begun += 1;
        }
        ring.submit_and_wait(1)?;
        for end in ring.completion() {
            if end.result() != bytes.cast_signed() {
                return Err(io::Error::other(format!("an access ended with {}", end.result())));
            }
            free.push(usize::try_from(end.user_data()).map_err(io::Error::other)?);
            done += 1;
        }
    }
    Ok(())
}

fn number<T: std::str::FromStr>(text: &str) -> io::Result<T> {
    text.parse().map_err(|_| io::Error::other(format!("{text} is no number")))
}

/// Where the accesses go: the same places in every run.
struct Places {
    random: bool,
    step: u64,
    count: u64,
    state: u64,
}

impl Places {
    fn next(&mut self) -> u64 {
        self.state = if self.random {
            // Of Knuth's MMIX: its upper bits are what is random.
            self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407)
        } else {
            self.state + 1
        };
        let number = if self.random { self.state >> 33 } else { self.state - 1 };
        number % self.count.max(1) * self.step
    }
}
