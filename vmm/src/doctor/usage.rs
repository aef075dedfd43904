//! Who uses a device: the process that has it open through VFIO, and the host itself through its own driver.
//!
//! Nothing is opened to find out. A group's node can be open once only, so a doctor who tried it could be in the way of a VM that
//! starts at that moment.

use std::fs;
use std::path::{Path, PathBuf};

use devices::vfio::host::HostFunction;
use devices::vfio::usage::{HostUses, Use};

use super::finding::Reading;
use super::host::Host;

/// `IFF_UP` of an interface's flags (netdevice(7)).
const IFF_UP: u32 = 1;

/// A process that has a device open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// Its number.
    pub pid: u32,
    /// Its name.
    pub name: String,
    /// Where it was seen.
    pub read: Reading,
}

/// The nodes through which VFIO hands out a function.
pub fn nodes(host: &Host, function: &HostFunction) -> Vec<PathBuf> {
    let vfio = host.dev.join("vfio");
    let group = function.iommu_group.map(|group| vfio.join(group.to_string()));
    let own = function.vfio_device.as_ref().map(|name| vfio.join("devices").join(name));
    group.into_iter().chain(own).collect()
}

/// The first process that has one of the function's nodes open, as far as this user may see (root sees all).
pub fn owner(host: &Host, function: &HostFunction) -> Option<Owner> {
    if !function.is_bound_to_vfio() {
        return None;
    }
    let nodes = nodes(host, function);
    let mut pids: Vec<u32> = fs::read_dir(&host.proc)
        .ok()?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    pids.into_iter().find_map(|pid| {
        let directory = host.proc.join(pid.to_string());
        let descriptors = fs::read_dir(directory.join("fd")).ok()?;
        let (path, target) = descriptors.flatten().find_map(|entry| {
            let target = fs::read_link(entry.path()).ok()?;
            nodes.contains(&target).then(|| (entry.path(), target))
        })?;
        let name = host.text(directory.join("comm")).value.unwrap_or_default();
        Some(Owner { pid, name, read: Reading::new(path, Some(target.to_string_lossy())) })
    })
}

/// What the host itself does with a function right now, in words, with what was read.
pub fn by_host(host: &Host, function: &HostFunction) -> Vec<(String, Reading)> {
    let mut uses = Vec::new();
    for interface in below(&host.sysfs.join("class/net"), &function.dir) {
        let flags = host.text(host.sysfs.join("class/net").join(&interface).join("flags"));
        let bits = flags.value.as_deref().map(|text| u32::from_str_radix(text.trim_start_matches("0x"), 16));
        if bits.is_some_and(|bits| bits.is_ok_and(|bits| bits & IFF_UP != 0)) {
            uses.push((format!("its network interface {interface} is up"), flags));
        }
    }
    let console = host.device(function.bdf, "boot_vga");
    if console.is("1") && !function.is_bound_to_vfio() && function.driver.is_some() {
        uses.push(("it is the GPU of the host's console".to_owned(), console));
    }
    let of_disks = HostUses::new(host.functions(), host.dev.clone(), host.proc.clone()).of(function);
    uses.extend(of_disks.unwrap_or_default().into_iter().map(|usage| of_disk(host, usage)));
    uses
}

/// One use of a function's disk in words, with what was read.
fn of_disk(host: &Host, usage: Use) -> (String, Reading) {
    match usage {
        Use::Mount { device, point } => {
            let text = format!("{device} on it is mounted on '{point}'");
            (text, Reading::new(host.proc.join("self/mountinfo"), Some(format!("{device} {point}"))))
        }
        Use::Swap { device } => {
            (format!("{device} on it is swap space"), Reading::new(host.proc.join("swaps"), Some(device)))
        }
        Use::Btrfs { device, uuid } => {
            let text = format!("/dev/{device} on it is part of the mounted btrfs {uuid}");
            (text, Reading::new(host.sysfs.join("fs/btrfs").join(uuid).join("devices"), Some(device)))
        }
        Use::Holder { device, holder } => {
            let text = format!("/dev/{device} on it is part of {holder}");
            (text, Reading::new(host.sysfs.join("class/block").join(device).join("holders"), Some(holder)))
        }
    }
}

/// The members of a class of devices that belong to a function, such as its interfaces.
fn below(class: &Path, directory: &Path) -> Vec<String> {
    let Ok(directory) = fs::canonicalize(directory) else { return Vec::new() };
    let below =
        |name: &String| fs::canonicalize(class.join(name)).is_ok_and(|path| path.starts_with(&directory));
    names(class).into_iter().filter(below).collect()
}

fn names(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}
