//! Accesses to a disk past the guest's cache, for measuring: so many of one size, by so many threads at a time, in a row or anywhere.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::thread;
use std::time::Instant;

/// What O_DIRECT asks of memory.
const ALIGN: usize = 4096;

/// `disk PATH read|write BYTES THREADS COUNT random|row SPAN`: prints the nanoseconds that COUNT accesses within the first SPAN bytes took in all.
pub fn run(words: &[&str]) -> io::Result<String> {
    let &[path, direction, bytes, threads, count, order, span] = words else {
        return Err(io::Error::other("it takes PATH read|write BYTES THREADS COUNT random|row SPAN"));
    };
    let number =
        |text: &str| text.parse::<u64>().map_err(|_| io::Error::other(format!("{text} is no number")));
    let (bytes, threads, count, span) =
        (number(bytes)?, number(threads)?.max(1), number(count)?, number(span)?);
    let writes = direction == "write";
    let file = OpenOptions::new().read(true).write(writes).custom_flags(libc::O_DIRECT).open(path)?;
    let places = (span / bytes.max(1)).max(1);
    let (share, random) = (count / threads, order == "random");
    let start = Instant::now();
    thread::scope(|scope| {
        let all: Vec<_> = (0..threads)
            .map(|thread| {
                let file = &file;
                scope.spawn(move || accesses(file, writes, bytes, (thread, share), places, random))
            })
            .collect();
        all.into_iter()
            .try_for_each(|one| one.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked"))))
    })?;
    Ok(start.elapsed().as_nanos().to_string())
}

fn accesses(
    file: &File,
    writes: bool,
    bytes: u64,
    (thread, count): (u64, u64),
    places: u64,
    random: bool,
) -> io::Result<()> {
    let len = usize::try_from(bytes).map_err(io::Error::other)?;
    let mut memory = vec![1_u8; len + ALIGN];
    let skip = memory.as_ptr().align_offset(ALIGN);
    let buffer = &mut memory[skip..skip + len];
    // Xorshift: the same places in every run.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ (thread + 1);
    for n in 0..count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let place = if random { state } else { thread * count + n } % places;
        if writes {
            file.write_all_at(buffer, place * bytes)?;
        } else {
            file.read_exact_at(buffer, place * bytes)?;
        }
    }
    Ok(())
}
