//! What the host still does with a function that is to be taken from it: file systems and swap space on its disks, and what
//! is built on them (device mapper, RAID).
//!
//! Follows Linux `Documentation/ABI/stable/sysfs-block` and `Documentation/ABI/testing/sysfs-block`, proc_pid_mountinfo(5)
//! and proc_swaps(5). Only sysfs and procfs are read, which does not touch the disks. A mount in another mount namespace
//! (a container's) is not seen unless something else gives it away.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::host::{HostFunction, Sysfs};

/// One use of a disk by the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Use {
    /// A mounted file system.
    Mount {
        /// The block device, or what the kernel calls the source.
        device: String,
        /// Where it is mounted.
        point: String,
    },
    /// Swap space.
    Swap {
        /// The block device.
        device: String,
    },
    /// A file system that spans several disks, mounted somewhere.
    Btrfs {
        /// The block device.
        device: String,
        /// The file system's own name.
        uuid: String,
    },
    /// Another block device that is built on this one.
    Holder {
        /// The block device.
        device: String,
        /// The one built on it.
        holder: String,
    },
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mount { device, point } => write!(f, "{device} is mounted on '{point}'"),
            Self::Swap { device } => write!(f, "{device} is swap space"),
            Self::Btrfs { device, uuid } => write!(f, "{device} is part of the mounted btrfs {uuid}"),
            Self::Holder { device, holder } => write!(f, "{holder} is built on {device}"),
        }
    }
}

/// Looks for uses, over a sysfs, a `/dev` and a procfs.
#[derive(Clone, Debug)]
pub struct HostUses {
    sysfs: Sysfs,
    dev: PathBuf,
    proc: PathBuf,
}

impl HostUses {
    /// Looks there.
    pub fn new(sysfs: Sysfs, dev: PathBuf, proc: PathBuf) -> Self {
        Self { sysfs, dev, proc }
    }

    /// The uses of a function's disks; none for a function without any.
    ///
    /// # Errors
    /// There are disks, and what is mounted cannot be read.
    pub fn of(&self, function: &HostFunction) -> io::Result<Vec<Use>> {
        let mut disks = Disks::default();
        for (name, dir) in self.blocks_of(function) {
            disks.add(&name, &dir);
        }
        if disks.names.is_empty() {
            return Ok(Vec::new());
        }
        let mut uses = self.mounts(&disks)?;
        uses.extend(self.swaps(&disks)?);
        if uses.is_empty() {
            uses.extend(self.btrfs(&disks));
        }
        // What is mounted through a holder has been found above, under the holder's name.
        if uses.is_empty() {
            uses = disks.holders;
        }
        Ok(uses)
    }

    /// The disks and partitions that the function's driver has found, with their directories.
    fn blocks_of(&self, function: &HostFunction) -> Vec<(String, PathBuf)> {
        let Ok(function_dir) = fs::canonicalize(&function.dir) else { return Vec::new() };
        let below = |path: &Path| path.starts_with(&function_dir);
        let mut blocks = Vec::new();
        for (name, link) in entries(&self.sysfs.block_devices()) {
            let Ok(dir) = fs::canonicalize(&link) else { continue };
            // A multipath NVMe disk stands below its subsystem, which has links to the controllers.
            let of_subsystem = || {
                let subsystem = dir.ancestors().find(|path| {
                    path.parent().and_then(Path::file_name).is_some_and(|name| name == "nvme-subsystem")
                });
                subsystem.is_some_and(|subsystem| {
                    entries(subsystem).iter().any(|(name, link)| {
                        name.starts_with("nvme")
                            && link.is_symlink()
                            && fs::canonicalize(link).is_ok_and(|at| below(&at))
                    })
                })
            };
            if below(&dir) || of_subsystem() {
                blocks.push((name, dir));
            }
        }
        blocks
    }

    fn mounts(&self, disks: &Disks) -> io::Result<Vec<Use>> {
        let text = fs::read_to_string(self.proc.join("self/mountinfo"))?;
        let mounts = text.lines().filter_map(Mount::parse);
        let ours = mounts.filter(|mount| {
            disks.numbers.contains(&mount.number)
                || self.block_name(&mount.source).is_some_and(|name| disks.has(&name))
        });
        Ok(ours.map(|mount| Use::Mount { device: mount.source, point: mount.point }).collect())
    }

    fn swaps(&self, disks: &Disks) -> io::Result<Vec<Use>> {
        let text = match fs::read_to_string(self.proc.join("swaps")) {
            // A kernel without swap.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            result => result?,
        };
        let areas = text.lines().skip(1).filter_map(|line| line.split_whitespace().next()).map(unescape);
        let ours = areas.filter(|area| self.block_name(area).is_some_and(|name| disks.has(&name)));
        Ok(ours.map(|device| Use::Swap { device }).collect())
    }

    /// A btrfs has a number of its own, and names one of its disks as the source of its mount: the kernel lists the others.
    fn btrfs(&self, disks: &Disks) -> Vec<Use> {
        let mut uses = Vec::new();
        for (uuid, dir) in entries(&self.sysfs.btrfs()) {
            for (device, _) in entries(&dir.join("devices")) {
                if disks.has(&device) {
                    uses.push(Use::Btrfs { device, uuid: uuid.clone() });
                }
            }
        }
        uses
    }

    /// The kernel's name of the block device that a path such as `/dev/mapper/home` leads to.
    fn block_name(&self, path: &str) -> Option<String> {
        let node = self.dev.join(Path::new(path).strip_prefix("/dev").ok()?);
        let real = fs::canonicalize(&node).unwrap_or(node);
        Some(real.file_name()?.to_str()?.to_owned())
    }
}

/// Block devices of a function and what is built on them, by their numbers (`MAJOR:MINOR`).
#[derive(Debug, Default)]
struct Disks {
    numbers: BTreeSet<String>,
    names: BTreeSet<String>,
    holders: Vec<Use>,
}

impl Disks {
    fn has(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// Takes a block device in, and all that is built on it.
    fn add(&mut self, name: &str, dir: &Path) {
        if !self.names.insert(name.to_owned()) {
            return;
        }
        if let Ok(number) = fs::read_to_string(dir.join("dev")) {
            self.numbers.insert(number.trim().to_owned());
        }
        for (holder, link) in entries(&dir.join("holders")) {
            self.holders.push(Use::Holder { device: name.to_owned(), holder: holder.clone() });
            self.add(&holder, &link);
        }
    }
}

/// A line of `mountinfo`.
struct Mount {
    number: String,
    point: String,
    source: String,
}

impl Mount {
    fn parse(line: &str) -> Option<Self> {
        let (head, tail) = line.split_once(" - ")?;
        let mut head = head.split(' ');
        let (number, point) = (head.nth(2)?, head.nth(1)?);
        let source = tail.split(' ').nth(1)?;
        Some(Self { number: number.to_owned(), point: unescape(point), source: unescape(source) })
    }
}

/// Blanks and backslashes stand as `\` and three octal digits.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        match part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                bytes.extend_from_slice(&part.as_bytes()[3..]);
            }
            None => bytes.extend([b"\\", part.as_bytes()].concat()),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Names and paths in a directory, sorted; none if it is absent.
fn entries(dir: &Path) -> Vec<(String, PathBuf)> {
    let Ok(found) = fs::read_dir(dir) else { return Vec::new() };
    let mut entries: Vec<_> =
        found.flatten().filter_map(|e| Some((e.file_name().into_string().ok()?, e.path()))).collect();
    entries.sort();
    entries
}

#[cfg(test)]
mod tests;
