//! The Debian system itself, by `debootstrap`, as an archive in the cache.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::capture;
use crate::error::{Error, Result, file_error};
use crate::packages;

/// Debian 13: the release whose own kernel is the 6.12 that guests boot, and the first with a `passt` that speaks vhost-user.
const SUITE: &str = "trixie";
/// Beside the minimal system: what makes it boot, what tests run in the guest, and what VMs are tried against on the host.
const PACKAGES: &str = "systemd-sysv,udev,dbus,kmod,iproute2,iputils-ping,ethtool,e2fsprogs,dmsetup,\
    fio,iperf3,socat,virtiofsd,passt,qemu-utils";
/// What no program reads, and what only apt does.
const UNREAD: [&str; 8] = [
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "var/cache/apt",
    "var/lib/apt/lists",
    "usr/lib/udev/hwdb.bin",
    "usr/lib/udev/hwdb.d",
];

/// Stands for all the system is made of.
pub fn key() -> u64 {
    let mut hasher = DefaultHasher::new();
    ("1", SUITE, PACKAGES, UNREAD).hash(&mut hasher);
    hasher.finish()
}

/// The archive in the directory `cache`; made if it is absent.
pub fn obtain(cache: &Path) -> Result<PathBuf> {
    let archive = cache.join(format!("{SUITE}-{:016x}.tar", key()));
    if archive.is_file() {
        return Ok(archive);
    }
    if !packages::is_root()? {
        return Err(Error::Missing {
            what: format!("the Debian system {}", archive.display()),
            how: "run `cargo testbed prepare` once as root: debootstrap needs it".to_owned(),
        });
    }
    eprintln!("testbed: making a Debian system with debootstrap: one to three minutes");
    let tree = archive.with_extension("tree");
    let _ = fs::remove_dir_all(&tree);
    let made = make(&tree, &archive);
    let _ = fs::remove_dir_all(&tree);
    made.map(|()| archive)
}

fn make(tree: &Path, archive: &Path) -> Result<()> {
    let mut command = Command::new("debootstrap");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["--variant=minbase", "--arch=amd64"]);
    command.arg(format!("--include={PACKAGES}")).arg(SUITE).arg(tree).arg(packages::mirror()?);
    capture(&mut command)?;
    for path in UNREAD.map(|path| tree.join(path)) {
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(file_error("remove", &path))?;
    }
    let new = archive.with_extension("new");
    let mut tar = Command::new("tar");
    capture(tar.args(["--numeric-owner", "-cpf"]).arg(&new).arg("-C").arg(tree).arg("."))?;
    fs::rename(&new, archive).map_err(file_error("rename", &new))
}
