//! A file that is mapped, becomes shorter, and has no room.

use std::fs;
use std::io::Read;

use super::*;

/// A file of the test's own, which goes away with it.
#[derive(Debug)]
pub struct Scratch(pub PathBuf);

impl Scratch {
    /// With `size` bytes of 7.
    pub fn new(name: &str, size: usize) -> Self {
        let path = std::env::temp_dir().join(format!("dormouse-pmem-{}-{name}", std::process::id()));
        fs::write(&path, vec![7; size]).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

const MIB: usize = 1 << 20;

/// Reads and writes as a vCPU would: by the kernel, which says EFAULT where there is no page.
fn read(file: &MappedFile, offset: u64) -> io::Result<u8> {
    let mut byte = [0];
    let mut pipe = pipe();
    // SAFETY: the mapping is alive; the kernel checks the rest.
    let slice = unsafe { std::slice::from_raw_parts((file.host_address() + offset) as *const u8, 1) };
    rustix::io::write(&pipe.1, slice)?;
    pipe.0.read_exact(&mut byte)?;
    Ok(byte[0])
}

fn write(file: &MappedFile, offset: u64, value: u8) -> io::Result<()> {
    let pipe = pipe();
    rustix::io::write(&pipe.1, &[value])?;
    // SAFETY: the mapping is alive and writable, and nobody else looks at it; the kernel checks the rest.
    let slice = unsafe { std::slice::from_raw_parts_mut((file.host_address() + offset) as *mut u8, 1) };
    rustix::io::read(&pipe.0, slice)?;
    Ok(())
}

fn pipe() -> (fs::File, fs::File) {
    let (from, to) = rustix::pipe::pipe().unwrap();
    (from.into(), to.into())
}

#[test]
fn what_is_written_is_in_the_file_unless_writes_are_discarded() {
    let scratch = Scratch::new("writes", 4 * MIB);
    for discard in [true, false] {
        let file = MappedFile::open(&scratch.0, None, discard).unwrap();
        assert_eq!((file.size(), read(&file, 0).unwrap()), (4 << 20, 7));
        write(&file, 4096, 8).unwrap();
        file.flush().unwrap();
        assert_eq!(read(&file, 4096).unwrap(), 8);
        drop(file);
        assert_eq!(fs::read(&scratch.0).unwrap()[4096], if discard { 7 } else { 8 });
    }
}

#[test]
fn part_of_a_file_and_a_file_without_a_name_can_be_mapped() {
    let scratch = Scratch::new("part", 5 * MIB);
    assert_eq!(MappedFile::open(&scratch.0, Some(2 << 20), false).unwrap().size(), 2 << 20);
    let nameless = MappedFile::open(&std::env::temp_dir(), Some(2 << 20), false).unwrap();
    write(&nameless, 0, 9).unwrap();
    assert_eq!(read(&nameless, 0).unwrap(), 9);
}

#[test]
fn what_cannot_be_is_refused_with_the_remedy() {
    let scratch = Scratch::new("odd", 3 * MIB);
    let none = scratch.0.with_extension("none");
    let empty = Scratch::new("empty", 0);
    for (path, size, words) in [
        (&none, None, "truncate"),
        (&scratch.0, None, "2 MiB"),
        (&empty.0, None, "above 0"),
        (&scratch.0, Some(4 << 20), "truncate -s 4194304"),
        (&std::env::temp_dir(), None, "size=SIZE"),
    ] {
        let error = MappedFile::open(path, size, false).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("--pmem file=/"), "{error}");
    }
}

#[test]
fn a_file_that_becomes_shorter_reads_as_zeroes_behind_its_end_and_flushes_fail() {
    let scratch = Scratch::new("shorter", 4 * MIB);
    let file = MappedFile::open(&scratch.0, None, false).unwrap();
    assert!(!file.mend());
    file.flush().unwrap();
    fs::File::options().write(true).open(&scratch.0).unwrap().set_len(1 << 20).unwrap();
    assert_eq!(read(&file, 2 << 20).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    assert!(file.mend() && !file.mend());
    assert_eq!((read(&file, 0).unwrap(), read(&file, 2 << 20).unwrap()), (7, 0));
    write(&file, 2 << 20, 5).unwrap();
    assert_eq!(file.flush().unwrap_err().raw_os_error(), Some(libc::EIO));
}

#[test]
fn without_room_for_it_writes_stay_in_memory_and_flushes_fail() {
    let scratch = Scratch::new("full", 4 * MIB);
    let file = MappedFile::open(&scratch.0, None, false).unwrap();
    write(&file, 0, 1).unwrap();
    assert!(file.give_up(false) && !file.give_up(false));
    assert_eq!(read(&file, 0).unwrap(), 1);
    write(&file, 1, 2).unwrap();
    assert_eq!(fs::read(&scratch.0).unwrap()[..2], [1, 7]);
    assert!(file.flush().is_err());
    assert!(file.give_up(true) && !file.give_up(true));
    assert_eq!(read(&file, 0).unwrap(), 0);
}

#[test]
fn holes_of_a_file_that_is_given_up_take_no_more_of_its_file_system() {
    let scratch = Scratch::new("given-up", 4096);
    let sparse = fs::File::options().write(true).open(&scratch.0).unwrap();
    sparse.set_len(4 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, &[6; 8192], 1 << 20).unwrap();
    let file = MappedFile::open(&scratch.0, None, false).unwrap();
    let before = file.room().unwrap();
    assert!(!before.is_none() && file.give_up(false));
    let bytes: Vec<u8> =
        [0, 4096, 1 << 20, (1 << 20) + 8192, 3 << 20].map(|at| read(&file, at).unwrap()).into();
    assert_eq!(bytes, [7, 0, 6, 0, 0]);
    for at in [0, 4096, 1 << 20, 3 << 20] {
        write(&file, at, 9).unwrap();
        assert_eq!(read(&file, at).unwrap(), 9);
    }
    assert_eq!(sparse.metadata().unwrap().blocks(), before.blocks);
    assert_eq!(fs::read(&scratch.0).unwrap()[1 << 20], 6);
}
