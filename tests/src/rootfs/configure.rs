//! What is laid over the Debian system: the guest kernel's modules, and configuration.
//!
//! The configuration is what an administrator would write: a network that asks for its address, passwords that are empty,
//! and units masked that only cost time in an emulated machine. The system that boots is Debian's.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use crate::command::capture;
use crate::debian::KERNEL;
use crate::error::{Result, file_error};
use crate::image::AGENT;
use crate::kernel::{self, KernelFiles};

/// Drivers of what the VMM emulates and of what is assigned, file systems, and `autofs4`, which systemd asks for.
const MODULES: [&str; 31] = [
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_balloon",
    "virtio_rng",
    "virtio_pmem",
    "virtio_mem",
    "virtio_gpu",
    "virtio_input",
    "virtiofs",
    "vmw_vsock_virtio_transport",
    "vsock_loopback",
    "nd_pmem",
    "device_dax",
    "pvpanic_pci",
    "e1000e",
    "igb",
    "nvme",
    "ext4",
    "fuse",
    "overlay",
    "loop",
    "tun",
    "bridge",
    "dm_mod",
    "autofs4",
    "configfs",
    "evdev",
    "button",
    "rtc_cmos",
    "crc32c_generic",
];
const LOGIN_SHELL: &str = include_str!("bed-login.sh");
const NETWORK: &str = include_str!("virtio.network");
const JOURNAL: &str = include_str!("journald.conf");
/// Units that only cost time here: apt's and file systems' housekeeping, what measures a boot into a TPM, consoles that are absent.
const MASKED: [&str; 25] = [
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "systemd-tmpfiles-clean.timer",
    "getty@tty1.service",
    "getty-static.service",
    "ldconfig.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-update-done.service",
    "systemd-firstboot.service",
    "systemd-pcrmachine.service",
    "systemd-pcrphase.service",
    "systemd-pcrphase-sysinit.service",
    "systemd-tpm2-setup.service",
    "systemd-tpm2-setup-early.service",
    "systemd-random-seed.service",
    "systemd-binfmt.service",
    "proc-sys-fs-binfmt_misc.automount",
    "systemd-modules-load.service",
    "systemd-networkd-persistent-storage.service",
    "modprobe@efi_pstore.service",
];
/// Two users without a password: root for people, and one whose shell is the test bed's agent.
const USERS: [(&str, &str, &str); 2] =
    [("root", "/root", "/bin/bash"), ("bed", "/root", "/usr/local/sbin/bed-login")];

/// All of it.
#[derive(Debug)]
pub struct Layers {
    kernel: KernelFiles,
}

impl Layers {
    /// With the modules of [`KERNEL`].
    pub fn new() -> Result<Self> {
        Ok(Self { kernel: kernel::obtain(KERNEL)? })
    }

    /// Stands for all that is laid over, and what it is laid over.
    pub fn key(&self, below: impl Hash) -> u64 {
        let mut hasher = DefaultHasher::new();
        (below, &self.kernel.release, MODULES, AGENT, LOGIN_SHELL, NETWORK, JOURNAL, MASKED, USERS)
            .hash(&mut hasher);
        hasher.finish()
    }

    /// Does it to the system in the directory `tree`.
    pub fn lay_over(&self, tree: &Path) -> Result<()> {
        self.modules(tree)?;
        users(tree)?;
        write(tree, "etc/agent", AGENT, 0o755)?;
        write(tree, "usr/local/sbin/bed-login", LOGIN_SHELL, 0o755)?;
        write(tree, "etc/systemd/network/10-virtio.network", NETWORK, 0o644)?;
        write(tree, "etc/systemd/journald.conf.d/bed.conf", JOURNAL, 0o644)?;
        write(tree, "etc/hostname", "bed\n", 0o644)?;
        // A system with an identity is one that has booted before: nothing is to be set up first.
        write(tree, "etc/machine-id", "64656269616e20696e2061206d6f7573\n", 0o444)?;
        write(tree, "etc/fstab", "", 0o644)?;
        write(tree, "root/.hushlogin", "", 0o644)?;
        let units = tree.join("etc/systemd/system");
        for unit in MASKED {
            link("/dev/null", &units.join(unit))?;
        }
        let networkd = "systemd-networkd.service";
        let wants = units.join("multi-user.target.wants").join(networkd);
        link(&format!("/usr/lib/systemd/system/{networkd}"), &wants)?;
        // Where the emulated host mounts what is its own (image/peers.sh).
        let images = tree.join("images");
        fs::create_dir_all(&images).map_err(file_error("create", &images))
    }

    fn modules(&self, tree: &Path) -> Result<()> {
        let dir = tree.join("usr/lib/modules").join(&self.kernel.release);
        fs::create_dir_all(dir.join("kernel")).map_err(file_error("create", &dir))?;
        for module in self.kernel.modules(&MODULES)? {
            let path = dir.join(format!("kernel/{}.ko", module.name));
            fs::write(&path, module.content()?).map_err(file_error("write", &path))?;
        }
        for name in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
            let from = self.kernel.modules.join(name);
            fs::copy(&from, dir.join(name)).map_err(file_error("copy", &from))?;
        }
        capture(Command::new("/sbin/depmod").arg("-b").arg(tree).arg(&self.kernel.release)).map(drop)
    }
}

fn users(tree: &Path) -> Result<()> {
    for (file, line) in [
        ("etc/passwd", (|(name, home, shell)| format!("{name}:x:0:0:{name}:{home}:{shell}")) as fn(_) -> _),
        ("etc/shadow", |(name, _, _)| format!("{name}::20000:0:99999:7:::")),
    ] {
        let path = tree.join(file);
        let text = fs::read_to_string(&path).map_err(file_error("read", &path))?;
        let others = text
            .lines()
            .filter(|line| line.split(':').next().is_none_or(|name| USERS.iter().all(|user| user.0 != name)));
        let lines: Vec<String> = USERS.into_iter().map(line).chain(others.map(str::to_owned)).collect();
        fs::write(&path, lines.join("\n") + "\n").map_err(file_error("write", &path))?;
    }
    Ok(())
}

fn write(tree: &Path, path: &str, text: &str, mode: u32) -> Result<()> {
    let path = tree.join(path);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(file_error("create", parent))?;
    }
    let _ = fs::remove_file(&path);
    fs::write(&path, text).map_err(file_error("write", &path))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(file_error("change", &path))
}

fn link(target: &str, path: &Path) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(file_error("create", parent))?;
    }
    let _ = fs::remove_file(path);
    symlink(target, path).map_err(file_error("create", path))
}
