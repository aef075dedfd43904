//! Images of both forms against a model, and against `qemu-img`.
#![allow(clippy::cast_possible_truncation)] // Patterns of bytes.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap, Permissions};

use super::raw::Way;
use super::uring::{Operation, Uring};
use super::*;
use crate::virtio::chain::Buffer;
use crate::virtio::{Memory, MemoryView};

const MIB: u64 = 1 << 20;

/// A directory that goes when the test ends.
struct Place(PathBuf);

impl Place {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("dormouse-block-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, size: u64) -> PathBuf {
        let path = self.0.join(name);
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    /// An image made by `qemu-img`; `None` if that is not there.
    fn qcow2(&self, name: &str, options: &[&str], size: &str) -> Option<PathBuf> {
        let path = self.0.join(name);
        let made =
            qemu_img(&[&["create", "-q", "-f", "qcow2"], options, &[path.to_str().unwrap(), size]].concat())?;
        assert!(made.0, "{}", made.1);
        Some(path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Whether it went well, and what it said.
fn qemu_img(arguments: &[&str]) -> Option<(bool, String)> {
    match Command::new("qemu-img").args(arguments).output() {
        Ok(output) => {
            let text = [output.stdout, output.stderr].concat();
            Some((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
        }
        Err(e) if e.kind() == ErrorKind::NotFound => {
            eprintln!("SKIPPED: qemu-img is not installed (Debian package qemu-utils)");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

fn spec(path: &Path, image_type: ImageType) -> DiskSpec {
    DiskSpec { image_type, ..DiskSpec::new(path) }
}

fn open(path: &Path, image_type: ImageType) -> Disk {
    Disk::open(&spec(path, image_type)).unwrap()
}

fn refusal(spec: &DiskSpec) -> String {
    Disk::open(spec).unwrap_err().to_string()
}

/// Memory with `bytes` in pieces here and there, and those pieces.
struct Pieces {
    view: MemoryView,
    buffers: Vec<Buffer>,
}

impl Pieces {
    /// In pieces of at most `piece` bytes, `odd` bytes off a page.
    fn of(len: usize, piece: usize, odd: u64) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
        let view = Memory::new(memory).memory();
        let (mut left, mut buffers, mut at) = (len, Vec::new(), 0x10_0000 + odd);
        while left > 0 {
            let count = left.min(piece);
            buffers.push(Buffer { address: GuestAddress(at), len: u32::try_from(count).unwrap() });
            at += (piece as u64).next_multiple_of(4096) + 4096;
            left -= count;
        }
        Self { view, buffers }
    }

    fn put(&self, bytes: &[u8]) {
        let mut rest = bytes;
        for buffer in &self.buffers {
            let (now, later) = rest.split_at(buffer.len as usize);
            self.view.write_slice(now, buffer.address).unwrap();
            rest = later;
        }
    }

    fn get(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for buffer in &self.buffers {
            let mut bytes = vec![0; buffer.len as usize];
            self.view.read_slice(&mut bytes, buffer.address).unwrap();
            all.extend(bytes);
        }
        all
    }

    fn buffers(&self) -> Buffers {
        Buffers::new(&self.view, self.buffers.iter().copied(), Permissions::ReadWrite).unwrap()
    }
}

fn write(image: &Image, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let pieces = Pieces::of(bytes.len(), 5000, 0);
    pieces.put(bytes);
    image.write(&mut pieces.buffers(), offset, false)
}

fn read(image: &Image, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let pieces = Pieces::of(len, 3000, 0);
    image.read(&mut pieces.buffers(), offset)?;
    Ok(pieces.get())
}

/// Numbers that are the same in every run (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// What an image must be after random accesses, kept beside it in plain memory.
fn random_accesses(image: &Image, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut model = vec![0_u8; usize::try_from(image.size()).unwrap()];
    for step in 0..300 {
        let sectors = model.len() as u64 / SECTOR;
        let at = random.next(sectors);
        let count = (1 + random.next(200)).min(sectors - at);
        let (offset, len) = (at * SECTOR, count * SECTOR);
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
        match random.next(8) {
            0..=2 => {
                let byte = u8::try_from(random.next(255)).unwrap() + 1;
                let bytes: Vec<u8> = (0..len).map(|i| byte.wrapping_add((i / 7) as u8)).collect();
                write(image, offset, &bytes).unwrap();
                model[range].copy_from_slice(&bytes);
            }
            3 => {
                image.write_zeroes(offset, len, random.next(2) == 0).unwrap();
                model[range].fill(0);
            }
            4 => {
                image.discard(offset, len).unwrap();
                // Anything can be there now, but it stays so.
                let now = read(image, offset, usize::try_from(len).unwrap()).unwrap();
                model[range].copy_from_slice(&now);
            }
            5 => image.flush().unwrap(),
            6 if step % 10 == 0 => {
                let size = model.len() + 128 * 1024;
                image.resize(size as u64).unwrap();
                model.resize(size, 0);
            }
            _ => {
                let now = read(image, offset, usize::try_from(len).unwrap()).unwrap();
                assert_eq!(now, model[range], "step {step}, bytes {offset} to {}", offset + len);
            }
        }
    }
    image.flush().unwrap();
    model
}

#[test]
fn a_raw_image_is_what_was_written_to_it() {
    let place = Place::new();
    for (seed, direct) in [(1, false), (2, true), (3, false)] {
        let path = place.file("raw", 2 * MIB);
        let model = {
            let disk = Disk::open(&DiskSpec { direct, ..spec(&path, ImageType::Raw) }).unwrap();
            random_accesses(&disk.image, seed)
        };
        assert!(fs::read(&path).unwrap() == model, "seed {seed}, direct {direct}");
    }
}

#[test]
fn a_qcow2_image_is_what_was_written_to_it_as_qemu_reads_it() {
    let place = Place::new();
    let forms: [&[&str]; 4] = [
        &[],
        &["-o", "compat=0.10"],
        &["-o", "cluster_size=4096"],
        &["-o", "lazy_refcounts=on,refcount_bits=64"],
    ];
    for (seed, options) in (5..).zip(forms) {
        let Some(path) = place.qcow2("q", options, "2M") else { return };
        let model = {
            let disk = open(&path, ImageType::Unknown);
            assert!(matches!(disk.image, Image::Qcow2(_)) && !disk.protected);
            random_accesses(&disk.image, seed)
        };
        let disk = open(&path, ImageType::Qcow2);
        assert!(read(&disk.image, 0, model.len()).unwrap() == model, "{options:?}, opened again");
        drop(disk);
        let raw = place.0.join("converted");
        let (from, to) = (path.to_str().unwrap(), raw.to_str().unwrap());
        let (good, text) = qemu_img(&["check", from]).unwrap();
        assert!(good && text.contains("No errors"), "{options:?}: {text}");
        let (good, text) = qemu_img(&["convert", "-f", "qcow2", "-O", "raw", from, to]).unwrap();
        assert!(good, "{text}");
        assert!(fs::read(&raw).unwrap() == model, "{options:?}, as qemu-img reads it");
    }
}

#[test]
fn compressed_clusters_are_read_and_can_be_overwritten() {
    let place = Place::new();
    let bytes: Vec<u8> = (0..MIB).map(|i| (i / 999) as u8).collect();
    let raw = place.0.join("raw");
    fs::write(&raw, &bytes).unwrap();
    let path = place.0.join("compressed");
    let convert =
        ["convert", "-c", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), path.to_str().unwrap()];
    let Some((good, text)) = qemu_img(&convert) else { return };
    assert!(good, "{text}");
    let disk = open(&path, ImageType::Qcow2);
    assert!(read(&disk.image, 0, bytes.len()).unwrap() == bytes);
    write(&disk.image, 70_000, b"changed").unwrap();
    assert_eq!(read(&disk.image, 69_999, 9).unwrap()[1..8], *b"changed");
    assert_eq!(read(&disk.image, 300_000, 100).unwrap(), bytes[300_000..300_100]);
}

#[test]
fn a_backing_file_is_opened_only_if_the_user_says_so() {
    let place = Place::new();
    let base = place.0.join("base");
    fs::write(&base, vec![7; 1 << 20]).unwrap();
    let on_base = ["-F", "raw", "-b", base.to_str().unwrap()];
    let Some(path) = place.qcow2("top", &on_base, "1M") else { return };
    let plain = spec(&path, ImageType::Qcow2);
    let error = refusal(&plain);
    assert!(error.contains(base.to_str().unwrap()) && error.contains("backing_files=on"), "{error}");
    let disk = Disk::open(&DiskSpec { backing_files: true, ..plain }).unwrap();
    assert_eq!(read(&disk.image, 5000, 3).unwrap(), [7; 3]);
    write(&disk.image, 5001, b"x").unwrap();
    assert_eq!(read(&disk.image, 5000, 3).unwrap(), [7, b'x', 7]);
    disk.image.flush().unwrap();
    assert!(fs::read(&base).unwrap().iter().all(|byte| *byte == 7), "the backing file is not written");
}

#[test]
fn an_image_with_its_data_elsewhere_is_refused() {
    let place = Place::new();
    let data = place.file("data", MIB);
    let option = format!("data_file={}", data.display());
    let Some(path) = place.qcow2("q", &["-o", &option], "1M") else { return };
    let spec = DiskSpec { backing_files: true, ..spec(&path, ImageType::Qcow2) };
    assert!(refusal(&spec).contains("keeps its data in another file"));
}

#[test]
fn a_file_is_what_the_user_says_and_else_what_it_looks_like() {
    let place = Place::new();
    let path = place.file("disk", MIB);
    assert!(open(&path, ImageType::Unknown).protected, "nobody has said that it is raw");
    assert!(!open(&path, ImageType::Raw).protected);
    let readonly = DiskSpec { readonly: true, ..DiskSpec::new(&path) };
    assert!(!Disk::open(&readonly).unwrap().protected, "nothing is written anyway");
    // A guest of a raw disk can write what it likes.
    write(&open(&path, ImageType::Raw).image, 0, b"QFI\xfb\0\0\0\x03").unwrap();
    assert!(matches!(open(&path, ImageType::Raw).image, Image::Raw(_)));
    assert!(refusal(&DiskSpec::new(&path)).contains("not usable as qcow2"));
    for (at, magic, name) in [
        (0, &b"vhdxfile"[..], "vhdx"),
        (0, b"KDMV", "vmdk"),
        (MIB - 512, b"conectix", "vhd"),
        (0, b"conectix", "vhd"),
    ] {
        let path = place.file("other", MIB);
        write(&open(&path, ImageType::Raw).image, at, magic).unwrap();
        let error = refusal(&DiskSpec::new(&path));
        assert!(error.contains(&format!("images of type {name} are not")), "{error}");
    }
}

#[test]
fn what_is_no_disk_is_refused_with_what_to_do() {
    let place = Place::new();
    for (path, expected) in [
        (place.0.join("none"), "qemu-img create"),
        (place.0.clone(), "not a directory"),
        ("/dev/null".into(), "neither a file"),
    ] {
        let error = refusal(&DiskSpec::new(&path));
        assert!(error.contains(path.to_str().unwrap()) && error.contains(expected), "{error}");
    }
}

#[test]
fn a_disk_that_is_written_is_nobody_elses_and_one_that_is_read_is_for_all_who_read() {
    let place = Place::new();
    for granularity in [Granularity::ByteRange, Granularity::Full] {
        let path = place.file("disk", MIB);
        let writer = DiskSpec { granularity, ..spec(&path, ImageType::Raw) };
        let reader = DiskSpec { readonly: true, ..writer.clone() };
        let first = Disk::open(&writer).unwrap();
        for second in [&writer, &reader] {
            let error = refusal(second);
            assert!(error.contains("in use by another disk of this machine"), "{error}");
            assert!(error.contains(path.to_str().unwrap()) && error.contains("readonly=on"), "{error}");
        }
        drop(first);
        let readers = [Disk::open(&reader).unwrap(), Disk::open(&reader).unwrap()];
        assert!(refusal(&writer).contains("locked for writing"));
        drop(readers);
        Disk::open(&writer).unwrap();
    }
}

#[test]
fn a_lock_is_kept_past_the_cache_and_in_qcow2_too() {
    let place = Place::new();
    let path = place.file("raw", MIB);
    let direct = DiskSpec { direct: true, ..spec(&path, ImageType::Raw) };
    let first = Disk::open(&direct).unwrap();
    assert!(refusal(&direct).contains("in use"));
    drop(first);
    let Some(path) = place.qcow2("q", &[], "1M") else { return };
    for direct in [false, true] {
        let spec = DiskSpec { direct, ..spec(&path, ImageType::Qcow2) };
        let first = Disk::open(&spec).unwrap();
        assert!(refusal(&spec).contains("in use"), "direct {direct}");
        drop(first);
    }
}

fn room(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn a_discard_gives_room_back_to_the_host() {
    let place = Place::new();
    let paths = [
        Some((place.file("raw", 4 * MIB), ImageType::Raw)),
        place.qcow2("q", &[], "4M").map(|p| (p, ImageType::Qcow2)),
    ];
    for (path, image_type) in paths.into_iter().flatten() {
        let disk = open(&path, image_type);
        for at in 0..4 {
            write(&disk.image, at * MIB, &vec![9; 1 << 20]).unwrap();
        }
        disk.image.flush().unwrap();
        let before = room(&path);
        disk.image.discard(MIB, 2 * MIB).unwrap();
        disk.image.flush().unwrap();
        let after = room(&path);
        assert!(after + 2 * MIB <= before + 300_000, "{image_type:?}: {before} bytes before, {after} after");
        assert_eq!(read(&disk.image, 3 * MIB, 5).unwrap(), [9; 5]);
        assert_eq!(read(&disk.image, MIB - 5, 5).unwrap(), [9; 5]);
    }
}

#[test]
fn a_disk_that_is_not_sparse_takes_its_room_at_once() {
    let place = Place::new();
    let path = place.file("raw", 4 * MIB);
    assert_eq!(room(&path), 0);
    drop(Disk::open(&DiskSpec { sparse: false, ..spec(&path, ImageType::Raw) }).unwrap());
    assert!(room(&path) >= 4 * MIB);
}

#[test]
fn past_the_cache_memory_may_lie_anywhere() {
    let place = Place::new();
    let path = place.file("raw", MIB);
    let disk = Disk::open(&DiskSpec { direct: true, ..spec(&path, ImageType::Raw) }).unwrap();
    for (odd, piece) in [(0, 4096), (1, 4096), (0, 5000), (512, 512), (3, 77)] {
        let pieces = Pieces::of(16384, piece, odd);
        let bytes: Vec<u8> = (0..16384_u32).map(|i| (i / 3) as u8 ^ odd as u8).collect();
        pieces.put(&bytes);
        disk.image.write(&mut pieces.buffers(), 8192, true).unwrap();
        let back = Pieces::of(16384, piece, odd);
        disk.image.read(&mut back.buffers(), 8192).unwrap();
        assert!(back.get() == bytes, "{odd} {piece}");
    }
}

#[test]
fn behind_the_end_of_a_file_that_was_cut_off_there_is_an_error() {
    let place = Place::new();
    let path = place.file("raw", MIB);
    let disk = open(&path, ImageType::Raw);
    File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
    assert_eq!(read(&disk.image, 8192, 512).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    assert!(read(&disk.image, 0, 4096).is_ok());
}

#[test]
fn many_operations_at_a_time_all_finish_with_the_right_bytes() {
    let place = Place::new();
    let path = place.file("raw", 4 * MIB);
    let disk = open(&path, ImageType::Raw);
    let Image::Raw(raw) = &disk.image else { panic!() };
    let mut ring = match Uring::new(32) {
        Ok(ring) => ring,
        Err(e) => {
            eprintln!("SKIPPED: this host has no io_uring: {e}");
            return;
        }
    };
    // More pieces than one call takes, too.
    let all: Vec<_> =
        (0..32_u64).map(|n| (n, Pieces::of(24_000, if n == 7 { 10 } else { 4096 }, n))).collect();
    for write in [true, false] {
        for (n, pieces) in &all {
            let byte = u8::try_from(*n).unwrap() + 1;
            pieces.put(&vec![if write { byte } else { 0 }; 24_000]);
            let (buffers, offset) = (pieces.buffers(), n * 128 * 1024);
            let Way::Straight(fd) = raw.way(&buffers, offset) else { panic!() };
            let operation = if write {
                Operation::Write { fd, buffers, offset, through: n % 2 == 0 }
            } else {
                Operation::Read { fd, buffers, offset }
            };
            ring.begin(*n, operation).unwrap();
        }
        assert!(ring.is_full() && ring.begin(99, Operation::Flush { fd: raw.flush_fd() }).is_err());
        let mut seen = Vec::new();
        while !ring.is_idle() {
            ring.wait().unwrap();
            while let Some((n, result)) = ring.finished() {
                result.unwrap();
                seen.push(n);
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..32).collect::<Vec<_>>());
    }
    for (n, pieces) in &all {
        assert!(pieces.get().iter().all(|byte| u64::from(*byte) == n + 1), "operation {n}");
    }
    let beyond = Pieces::of(512, 512, 0);
    ring.begin(1, Operation::Read { fd: raw.flush_fd(), buffers: beyond.buffers(), offset: 8 * MIB })
        .unwrap();
    ring.wait().unwrap();
    let (_, result) = ring.finished().unwrap();
    assert_eq!(result.unwrap_err().kind(), ErrorKind::UnexpectedEof);
}
