//! Whether a disk keeps what was flushed: the guest writes numbered records and says after each flush how many there are; the
//! host looks for them in the image, after the VMM was killed, say.
//!
//! - `guest_tool records write DISK`: writes records without end, [`BATCH`] at a time, each batch ended by fdatasync(2), after
//!   which it prints `flushed DISK N`: the records 0 to N-1 are to be there from now on.
//! - `guest_tool records check IMAGE N`: each of the records 0 to N-1 is in the image, or a later one that went to the same
//!   place; and no record is damaged.
//!
//! Records are all over the disk in an order that looks random: an image that grows allocates a cluster for nearly each of
//! them, and the metadata of the image has to be as safe as the data.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt;

/// Size of a record. Aligned to it, so that a page cache writes it whole.
const RECORD: usize = 4096;
/// Places for records: 64 MiB of them. A prime, so that the steps below reach all.
const PLACES: u64 = 16381;
/// From one record's place to the next one's.
const STEP: u64 = 6151;
/// Records between two flushes.
const BATCH: u64 = 16;

/// Writes until it is killed, or the disk fails.
pub fn write(disk: &str) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(disk)?;
    let mut out = io::stdout().lock();
    for batch in 0.. {
        for number in batch * BATCH..(batch + 1) * BATCH {
            file.write_all_at(&record(number), place(number))?;
        }
        file.sync_data()?;
        // In one piece, since another writer may print to the same terminal.
        out.write_all(format!("flushed {disk} {}\n", (batch + 1) * BATCH).as_bytes())?;
        out.flush()?;
    }
    Ok(())
}

/// Looks at every place of the image.
pub fn check(image: &str, flushed: &str) -> io::Result<()> {
    let flushed: u64 = flushed.parse().map_err(|_| io::Error::other(format!("{flushed} is no number")))?;
    let file = File::open(image)?;
    // The last record for each place that was flushed.
    let mut expected = vec![None; usize::try_from(PLACES).map_err(io::Error::other)?];
    for number in 0..flushed {
        if let Some(last) = index(number).and_then(|index| expected.get_mut(index)) {
            *last = Some(number);
        }
    }
    let mut later = 0;
    for (index, last) in (0_u64..).zip(&expected) {
        let mut bytes = [0; RECORD];
        file.read_exact_at(&mut bytes, index * RECORD as u64)?;
        let found = found(&bytes, index)?;
        if found < *last {
            let what = found.map_or("nothing".to_owned(), |number| format!("record {number}"));
            return Err(io::Error::other(format!(
                "at {:#x} is {what} instead of record {}, which was flushed",
                index * RECORD as u64,
                last.unwrap_or_default()
            )));
        }
        later += u64::from(found > *last);
    }
    println!("all of {flushed} records, and {later} that were not flushed yet");
    Ok(())
}

/// The number of the record in `bytes`; none if nothing was ever written there. Anything else is damage.
fn found(bytes: &[u8; RECORD], index: u64) -> io::Result<Option<u64>> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let number = bytes.first_chunk().map(|first| u64::from_le_bytes(*first).wrapping_sub(1));
    match number {
        Some(number) if place(number) == index * RECORD as u64 && *bytes == record(number) => {
            Ok(Some(number))
        }
        _ => Err(io::Error::other(format!("at {:#x} is a damaged record", index * RECORD as u64))),
    }
}

/// What is written for `number`: words that all differ, from it alone. No record is all zeros.
fn record(number: u64) -> [u8; RECORD] {
    let mut bytes = [0; RECORD];
    let mut word = number.wrapping_add(1);
    for chunk in bytes.chunks_exact_mut(8) {
        chunk.copy_from_slice(&word.to_le_bytes());
        word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
    }
    bytes
}

fn place(number: u64) -> u64 {
    number.wrapping_mul(STEP) % PLACES * RECORD as u64
}

fn index(number: u64) -> Option<usize> {
    usize::try_from(place(number) / RECORD as u64).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(name: &str, records: u64) -> (std::path::PathBuf, File) {
        let path = std::env::temp_dir().join(format!("records-{name}-{}", std::process::id()));
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        file.set_len(PLACES * RECORD as u64).unwrap();
        for number in 0..records {
            file.write_all_at(&record(number), place(number)).unwrap();
        }
        (path, file)
    }

    #[test]
    fn an_image_with_all_flushed_records_and_some_more_is_good() {
        let (path, _) = image("good", 40);
        let verdict = check(path.to_str().unwrap(), "32");
        std::fs::remove_file(&path).unwrap();
        verdict.unwrap();
    }

    #[test]
    fn one_lost_or_damaged_record_is_found() {
        let (path, file) = image("bad", 32);
        file.write_all_at(&[0; RECORD], place(17)).unwrap();
        let lost = check(path.to_str().unwrap(), "32").unwrap_err().to_string();
        file.write_all_at(&record(17)[..100], place(17)).unwrap();
        let damaged = check(path.to_str().unwrap(), "32").unwrap_err().to_string();
        std::fs::remove_file(&path).unwrap();
        assert!(lost.contains("nothing instead of record 17"), "{lost}");
        assert!(damaged.contains("damaged"), "{damaged}");
    }

    #[test]
    fn an_older_record_in_a_place_that_was_flushed_anew_is_found() {
        let (path, file) = image("old", PLACES + 5);
        file.write_all_at(&record(3), place(3)).unwrap();
        let old = check(path.to_str().unwrap(), &(PLACES + 5).to_string()).unwrap_err().to_string();
        std::fs::remove_file(&path).unwrap();
        assert!(old.contains("record 3 instead of record 16384"), "{old}");
    }
}
