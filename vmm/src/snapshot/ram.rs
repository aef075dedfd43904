//! Guest RAM in a snapshot: one file with the content of each range after the other, in which what is zero takes no room on the disk.
//!
//! RAM that is a file of the user's, and shared, stays in that file: it is not in the snapshot, as in Cloud Hypervisor.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use serde::{Deserialize, Serialize};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
};

use crate::memory::GuestRam;

/// Bytes that are moved at once.
const PIECE: usize = 1 << 20;
/// What is looked at whether it is all zero.
const BLOCK: usize = 64 << 10;
const PAGE: u64 = 4096;

/// A range of RAM and where its content is in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedRange {
    /// First address in the guest.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Offset in the file.
    pub offset: u64,
}

/// Where in the file the content of RAM at `start` is, if all of it is there in one piece.
pub fn offset_of(ranges: &[SavedRange], start: u64, len: u64) -> Option<u64> {
    let holds = |at: u64| ranges.iter().find(|range| (range.start..range.start + range.len).contains(&at));
    let first = holds(start)?;
    let offset = first.offset + (start - first.start);
    let mut at = start;
    while at < start.checked_add(len)? {
        let range = holds(at)?;
        if range.offset + (at - range.start) != offset + (at - start) {
            return None;
        }
        at = range.start + range.len;
    }
    Some(offset)
}

/// The ranges that are in a snapshot of this RAM.
pub fn ranges(ram: &GuestRam) -> Vec<SavedRange> {
    let memory = ram.now();
    let mut offset = 0;
    let mut ranges = Vec::new();
    for region in memory.iter() {
        let (start, len) = (region.start_addr().0, region.len());
        if ram.is_users_file(start) {
            continue;
        }
        ranges.push(SavedRange { start, len, offset });
        offset += len;
    }
    ranges
}

/// Writes the content of `ranges` to an empty file.
pub fn write(ram: &GuestRam, ranges: &[SavedRange], file: &File) -> io::Result<()> {
    let memory = ram.now();
    let total: u64 = ranges.iter().map(|range| range.len).sum();
    file.set_len(total)?;
    let mut buffer = vec![0; PIECE];
    for range in ranges {
        let touched = touched(&memory, range);
        for (from, to) in touched {
            let mut at = from;
            while at < to {
                let len = usize::try_from(to - at).unwrap_or(PIECE).min(PIECE);
                let piece = &mut buffer[..len];
                memory.read_slice(piece, GuestAddress(range.start + at)).map_err(outside)?;
                for (number, block) in (0_u64..).zip(piece.chunks(BLOCK)) {
                    if block.iter().any(|byte| *byte != 0) {
                        let offset = range.offset + at + number * BLOCK as u64;
                        file.write_all_at(block, offset)?;
                    }
                }
                at += len as u64;
            }
        }
    }
    file.sync_all()
}

/// Fills new RAM with the content of `ranges`. `blank` says of a range's start whether the RAM there is all zero.
pub fn read(
    memory: &GuestMemoryMmap,
    ranges: &[SavedRange],
    file: &File,
    blank: impl Fn(u64) -> bool,
) -> io::Result<()> {
    let needs = ranges.iter().map(|range| range.offset.saturating_add(range.len)).max().unwrap_or(0);
    let has = file.metadata()?.len();
    if has < needs {
        return Err(io::Error::other(format!("it has {has} bytes and should have {needs}: it is not whole")));
    }
    for range in ranges {
        let mut at = 0;
        while at < range.len {
            let data = next(file, range, at, SeekFrom::Data)?.unwrap_or(range.len);
            if !blank(range.start) {
                fill_with_zeros(memory, range.start + at, data - at)?;
            }
            if data == range.len {
                break;
            }
            let hole = next(file, range, data, SeekFrom::Hole)?.unwrap_or(range.len);
            copy(memory, range, file, data, hole)?;
            at = hole;
        }
    }
    Ok(())
}

/// Where in the range data or a hole begins, at `at` or later; `None` if in it there is none.
fn next(file: &File, range: &SavedRange, at: u64, what: fn(u64) -> SeekFrom) -> io::Result<Option<u64>> {
    match seek(file, what(range.offset + at)) {
        Ok(found) => Ok(Some(found.saturating_sub(range.offset)).filter(|found| *found < range.len)),
        // Nothing but a hole until the end.
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

fn copy(memory: &GuestMemoryMmap, range: &SavedRange, file: &File, from: u64, to: u64) -> io::Result<()> {
    let mut file = file;
    seek(file, SeekFrom::Start(range.offset + from))?;
    let mut at = from;
    while at < to {
        let len = usize::try_from(to - at).unwrap_or(PIECE).min(PIECE);
        memory.read_exact_volatile_from(GuestAddress(range.start + at), &mut file, len).map_err(outside)?;
        at += len as u64;
    }
    Ok(())
}

fn fill_with_zeros(memory: &GuestMemoryMmap, start: u64, len: u64) -> io::Result<()> {
    let zeros = vec![0; PIECE];
    let mut at = 0;
    while at < len {
        let piece = usize::try_from(len - at).unwrap_or(PIECE).min(PIECE);
        memory.write_slice(&zeros[..piece], GuestAddress(start + at)).map_err(outside)?;
        at += piece as u64;
    }
    Ok(())
}

fn outside(error: GuestMemoryError) -> io::Error {
    match error {
        GuestMemoryError::IOError(error) => error,
        error => io::Error::other(error),
    }
}

/// Parts of a range that may hold something, as offsets in it: those pages that the host has ever given. To read the others would be to take memory
/// for nothing.
fn touched(memory: &GuestMemoryMmap, range: &SavedRange) -> Vec<(u64, u64)> {
    let whole = || vec![(0, range.len)];
    let Some(region) = memory.find_region(GuestAddress(range.start)) else { return whole() };
    let found = match region.file_offset() {
        None => given_pages(region.as_ptr() as u64, range.len),
        Some(file) if region.flags() & libc::MAP_SHARED != 0 => {
            pieces(file.file(), &SavedRange { offset: file.start(), ..*range })
        }
        // What has not been written to is as in the file.
        Some(_) => return whole(),
    };
    found.unwrap_or_else(|_| whole())
}

/// Parts of a range of a file that are no holes.
fn pieces(file: &File, range: &SavedRange) -> io::Result<Vec<(u64, u64)>> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while let Some(data) = next(file, range, at, SeekFrom::Data)? {
        at = next(file, range, data, SeekFrom::Hole)?.unwrap_or(range.len);
        pieces.push((data, at));
        if at == range.len {
            break;
        }
    }
    Ok(pieces)
}

/// Runs of pages at host address `start` that are in memory or swapped out (Linux `Documentation/admin-guide/mm/pagemap.rst`).
fn given_pages(start: u64, len: u64) -> io::Result<Vec<(u64, u64)>> {
    const ENTRY: u64 = 8;
    /// Present, or swapped.
    const GIVEN: u64 = 1 << 63 | 1 << 62;
    let map = File::open("/proc/self/pagemap")?;
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    let mut at = 0;
    while at < len {
        let bytes =
            usize::try_from((len - at).div_ceil(PAGE) * ENTRY).unwrap_or(usize::MAX).min(buffer.len());
        map.read_exact_at(&mut buffer[..bytes], (start + at) / PAGE * ENTRY)?;
        for entry in buffer[..bytes].chunks_exact(8) {
            let given = <[u8; 8]>::try_from(entry).is_ok_and(|entry| u64::from_ne_bytes(entry) & GIVEN != 0);
            if given {
                match runs.last_mut().filter(|(_, end)| *end == at) {
                    Some((_, end)) => *end = at + PAGE,
                    None => runs.push((at, at + PAGE)),
                }
            }
            at += PAGE;
        }
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 8 << 20;

    fn memory() -> GuestMemoryMmap {
        let ranges = [(GuestAddress(0), 4 << 20), (GuestAddress(16 << 20), 4 << 20)];
        GuestMemoryMmap::from_ranges(&ranges).unwrap()
    }

    fn saved() -> [SavedRange; 2] {
        [
            SavedRange { start: 0, len: SIZE / 2, offset: 0 },
            SavedRange { start: 16 << 20, len: SIZE / 2, offset: SIZE / 2 },
        ]
    }

    fn file() -> File {
        let memory = rustix::fs::memfd_create("saved", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(memory);
        file.set_len(SIZE).unwrap();
        file
    }

    #[test]
    fn content_comes_back_where_it_was_and_holes_are_zeros() {
        let file = file();
        file.write_all_at(b"first", 0x1000).unwrap();
        file.write_all_at(b"last", SIZE - 4).unwrap();
        for blank in [true, false] {
            let memory = memory();
            if !blank {
                memory.write_slice(&[0xa5; 64], GuestAddress(0x1_0000)).unwrap();
                memory.write_slice(&[0xa5; 64], GuestAddress((20 << 20) - 64)).unwrap();
            }
            read(&memory, &saved(), &file, |_| blank).unwrap();
            let at = |address, len| {
                let mut data = vec![0; len];
                memory.read_slice(&mut data, GuestAddress(address)).unwrap();
                data
            };
            assert_eq!(at(0x1000, 6), b"first\0");
            assert_eq!(at((20 << 20) - 8, 8), b"\0\0\0\0last");
            assert_eq!(at(0x1_0000, 64), [0; 64]);
        }
    }

    #[test]
    fn ranges_that_follow_each_other_are_one_piece_and_others_are_not() {
        let at = |start, offset| SavedRange { start, len: 0x1000, offset };
        let ranges = [at(0, 0), at(0x1000, 0x1000), at(0x4000, 0x2000)];
        assert_eq!(offset_of(&ranges, 0, 0x2000), Some(0));
        assert_eq!(offset_of(&ranges, 0x1800, 0x800), Some(0x1800));
        assert_eq!(offset_of(&ranges, 0x4000, 0x1000), Some(0x2000));
        assert_eq!(offset_of(&ranges, 0, 0x3000), None, "not all of it");
        assert_eq!(offset_of(&ranges, 0x2000, 1), None);
    }

    #[test]
    fn pages_that_nobody_has_touched_are_not_looked_at() {
        let memory = memory();
        memory.write_slice(&[1], GuestAddress(0x30_0000)).unwrap();
        let runs = touched(&memory, &saved()[0]);
        let pages: u64 = runs.iter().map(|(from, to)| (to - from) / PAGE).sum();
        assert!(runs.iter().any(|(from, to)| (*from..*to).contains(&0x30_0000)), "{runs:?}");
        assert!(pages <= 512, "{pages} pages for one byte");
        assert!(touched(&memory, &saved()[1]).is_empty());
    }

    #[test]
    fn a_file_that_ends_too_early_is_an_error_and_no_zeros() {
        let file = file();
        file.set_len(SIZE - 2048).unwrap();
        let error = read(&memory(), &saved(), &file, |_| true).unwrap_err().to_string();
        assert!(error.contains("8386560 bytes"), "{error}");
    }
}
