//! A Debian root file system for guests, made of Debian's own packages, and the disks that bring it to the emulated host.
//!
//! Three steps, each kept in the cache under a name that says what it was made of:
//!
//! 1. `debootstrap` makes a small system ([`tree`]), about a minute. This is the only step that needs the network, and root.
//! 2. The guest kernel's modules and a few files of configuration are laid over it ([`configure`]), and `mkfs.ext4 -d` makes
//!    the file system: no loop devices, no mounts. About ten seconds.
//! 3. The file system, as raw image and as qcow2, goes into a second file system: the emulated host's `/images`.
//!
//! The host mounts the first file system as well, read-only: the same packages have the programs that VMs are tried against
//! there (`virtiofsd`, `socat`, `iperf3`, `passt`, `qemu-storage-daemon`). See `image/peers.sh`.

mod configure;
mod tree;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::capture;
use crate::error::{Result, file_error};
use crate::paths;

/// Size of the guest's file system, of which it fills a quarter. Sparse.
const ROOT_SIZE: &str = "1G";
/// Size of the file system with the images; what is left is room for scenarios. Sparse.
const IMAGES_SIZE: &str = "4G";
/// Counts up when this file changes what it makes.
const REVISION: u32 = 1;

/// The disks of an emulated host.
#[derive(Debug, Clone)]
pub struct Disks {
    /// Debian's root file system, whole and without partitions.
    pub root: PathBuf,
    /// A file system with the images `debian.raw` and `debian.qcow2` of it.
    pub images: PathBuf,
}

/// Finds the disks in the cache, or makes them.
pub fn obtain() -> Result<Disks> {
    let cache = paths::cache()?.join("debian");
    fs::create_dir_all(&cache).map_err(file_error("create", &cache))?;
    let layers = configure::Layers::new()?;
    let dir = cache.join(format!("disks-{:016x}", layers.key((tree::key(), REVISION))));
    let disks = Disks { root: dir.join("root.raw"), images: dir.join("images.raw") };
    if dir.is_dir() {
        return Ok(disks);
    }
    // One test bed at a time makes them, and others wait: it is too much to do twice.
    let path = cache.join("lock");
    let lock = fs::File::create(&path).map_err(file_error("create", &path))?;
    lock.lock().map_err(file_error("lock", &path))?;
    if !dir.is_dir() {
        let archive = tree::obtain(&cache)?;
        eprintln!("testbed: making the Debian disk images");
        make(&archive, &layers, &dir)?;
    }
    Ok(disks)
}

fn make(archive: &Path, layers: &configure::Layers, dir: &Path) -> Result<()> {
    let work = dir.with_extension("new");
    let _ = fs::remove_dir_all(&work);
    let (tree, inside) = (work.join("tree"), work.join("inside"));
    for path in [&tree, &inside] {
        fs::create_dir_all(path).map_err(file_error("create", path))?;
    }
    capture(Command::new("tar").args(["--numeric-owner", "-xpf"]).arg(archive).arg("-C").arg(&tree))?;
    layers.lay_over(&tree)?;
    let root = work.join("root.raw");
    file_system(&tree, &root, ROOT_SIZE, "debian")?;
    capture(Command::new("cp").arg("--sparse=always").arg(&root).arg(inside.join("debian.raw")))?;
    let convert = ["convert", "-f", "raw", "-O", "qcow2"];
    capture(Command::new("qemu-img").args(convert).arg(&root).arg(inside.join("debian.qcow2")))?;
    file_system(&inside, &work.join("images.raw"), IMAGES_SIZE, "images")?;
    for path in [&tree, &inside] {
        fs::remove_dir_all(path).map_err(file_error("remove", path))?;
    }
    fs::rename(&work, dir).map_err(file_error("rename", work))
}

/// Makes an ext4 file system of `size` with what is in `from`, in the new file `to`.
fn file_system(from: &Path, to: &Path, size: &str, label: &str) -> Result<()> {
    // Without its tables zeroed it needs no writes at its first mount, and with few inodes it has few tables.
    let options = ["-q", "-F", "-m", "0", "-N", "32768", "-E", "lazy_itable_init=0,root_owner=0:0"];
    let mut command = Command::new("/sbin/mkfs.ext4");
    capture(command.args(options).args(["-L", label, "-d"]).arg(from).arg(to).arg(size)).map(drop)
}
