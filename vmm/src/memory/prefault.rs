//! All pages of a mapping at once (`MADV_POPULATE_WRITE`, Linux 5.14): by one thread for each processor that this process may use, because
//! clearing memory is what takes the time.

use std::io;
use std::thread;

use rustix::io::Errno;
use rustix::mm::{Advice, madvise};
use vm_memory::MmapRegion;

/// The least that is worth a thread.
const SHARE: usize = 64 << 20;

/// The kernel has no page for some of it.
#[derive(Debug, thiserror::Error)]
#[error("{cause}; {}", advice(*errno))]
pub struct PrefaultError {
    cause: io::Error,
    errno: Errno,
}

fn advice(errno: Errno) -> &'static str {
    match errno {
        Errno::NOMEM => "free memory on the host, or give the guest less",
        Errno::FAULT => {
            "the file behind it is full or too short, or there is no huge page left: give it more room"
        }
        Errno::HWPOISON => {
            "some of the host's memory, or of the file, is broken: see the host's kernel log (dmesg)"
        }
        Errno::INVAL => "the host's kernel is older than 5.14: leave prefault out",
        _ => "the host's kernel log (dmesg) may say more",
    }
}

/// Allocates all pages, which are of `huge` bytes if they are huge.
pub fn populate(region: &MmapRegion, huge: u64) -> Result<(), PrefaultError> {
    let start = region.as_ptr() as usize;
    let shares = shares(region.size(), usize::try_from(huge).unwrap_or(0), processors());
    let result = thread::scope(|scope| {
        let (first, others) = shares.split_first().unwrap_or((&(0, 0), &[]));
        let mut threads = Vec::new();
        let mut result = Ok(());
        for &(offset, length) in others {
            let work = move || populate_range(start + offset, length);
            match thread::Builder::new().name("prefault".to_owned()).spawn_scoped(scope, work) {
                Ok(thread) => threads.push(thread),
                // Without a thread for it, here and now.
                Err(_) => result = result.and(populate_range(start + offset, length)),
            }
        }
        result = result.and(populate_range(start + first.0, first.1));
        for thread in threads {
            result = result.and(thread.join().unwrap_or(Err(Errno::FAULT)));
        }
        result
    });
    result.map_err(|errno| PrefaultError { cause: errno.into(), errno })
}

fn processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Offsets and lengths for `threads` threads at most: whole huge pages, and enough for each to be worth it.
fn shares(size: usize, huge: usize, threads: usize) -> Vec<(usize, usize)> {
    let share = size.div_ceil(threads.max(1)).max(SHARE);
    // Transparent huge pages too are cleared in whole.
    let share = share.checked_next_multiple_of(huge.max(2 << 20)).unwrap_or(size).max(1);
    (0..size).step_by(share).map(|offset| (offset, share.min(size - offset))).collect()
}

#[allow(unsafe_code)] // madvise takes an address.
fn populate_range(start: usize, length: usize) -> Result<(), Errno> {
    if length == 0 {
        return Ok(());
    }
    loop {
        // SAFETY: the range is part of a mapping that `populate` has borrowed; its pages get allocated and keep what they hold.
        match unsafe { madvise(start as *mut _, length, Advice::LinuxPopulateWrite) } {
            Err(Errno::AGAIN | Errno::INTR) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_share_whole_pages_and_there_are_no_more_of_them_than_processors() {
        const GIB: usize = 1 << 30;
        assert_eq!(shares(SHARE, 0, 8), [(0, SHARE)]);
        assert_eq!(shares(SHARE + 4096, 0, 8), [(0, SHARE), (SHARE, 4096)]);
        assert_eq!(shares(4 * GIB, 0, 2), [(0, 2 * GIB), (2 * GIB, 2 * GIB)]);
        assert_eq!(shares(3 * GIB, GIB, 8), [(0, GIB), (GIB, GIB), (2 * GIB, GIB)]);
        for (size, huge, threads) in [(5 * GIB, GIB, 3), (GIB + 4096, 0, 7), (4096, 0, 1)] {
            let shares = shares(size, huge, threads);
            assert!(shares.len() <= threads, "{shares:?}");
            assert_eq!(shares.iter().map(|(_, length)| length).sum::<usize>(), size);
        }
    }

    #[test]
    fn every_page_is_there_afterwards() {
        let region: MmapRegion = MmapRegion::new(3 * SHARE).unwrap();
        populate(&region, 0).unwrap();
        let mapped = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let head = format!("{:x}-", region.as_ptr() as usize);
        let entry = mapped.split(&head).nth(1).unwrap();
        let resident: usize = entry
            .lines()
            .find_map(|line| line.strip_prefix("Rss:"))
            .unwrap()
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap();
        assert!(resident >= 3 * (SHARE >> 10), "{resident} KiB");
    }
}
