//! Hosts in a temporary directory whose disks are in use in one way or another.

use std::os::unix::fs::symlink;

use super::super::host::fake::Tree;
use super::*;

const DRIVE: &str = "0000:04:00.0";
const NVME: u32 = 0x01_08_02;

/// A host with an NVMe drive of two partitions (259:1, 259:2), and a mounted root file system elsewhere.
struct Host(Tree);

impl Host {
    fn new() -> Self {
        let host = Self(Tree::new());
        host.0.add(DRIVE, NVME, Some("nvme"), Some(9));
        let drive = host.0.dir(DRIVE).canonicalize().unwrap();
        host.block(&drive.join("nvme/nvme0/nvme0n1"), "259:0");
        host.block(&drive.join("nvme/nvme0/nvme0n1/nvme0n1p1"), "259:1");
        host.block(&drive.join("nvme/nvme0/nvme0n1/nvme0n1p2"), "259:2");
        host.block(&host.root().join("sys/devices/virtual/block/dm-0"), "253:0");
        host.proc(
            "self/mountinfo",
            "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n23 22 0:21 / /proc rw - proc proc rw\n",
        );
        host.proc("swaps", "Filename\tType\tSize\tUsed\tPriority\n");
        host
    }

    fn root(&self) -> &Path {
        self.0.root()
    }

    fn block(&self, dir: &Path, number: &str) {
        fs::create_dir_all(dir.join("holders")).unwrap();
        fs::write(dir.join("dev"), format!("{number}\n")).unwrap();
        let class = self.root().join("sys/class/block");
        fs::create_dir_all(&class).unwrap();
        symlink(dir, class.join(dir.file_name().unwrap())).unwrap();
        fs::write(self.0.dev().join(dir.file_name().unwrap()), "").unwrap();
    }

    /// Puts dm-0 on a partition.
    fn map(&self, partition: &str) {
        let class = self.root().join("sys/class/block");
        symlink(class.join("dm-0"), class.join(partition).join("holders/dm-0")).unwrap();
    }

    fn proc(&self, name: &str, text: &str) {
        let path = self.root().join("proc").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let before = fs::read_to_string(&path).unwrap_or_default();
        fs::write(path, before + text).unwrap();
    }

    fn uses(&self) -> Vec<String> {
        let function = HostFunction::read(&self.0.sysfs(), DRIVE.parse().unwrap()).unwrap();
        let uses = HostUses::new(self.0.sysfs(), self.0.dev(), self.root().join("proc"));
        uses.of(&function).unwrap().iter().map(Use::to_string).collect()
    }
}

#[test]
fn a_drive_with_nothing_mounted_is_free() {
    assert_eq!(Host::new().uses(), Vec::<String>::new());
}

#[test]
fn a_mounted_partition_is_found_by_its_number_and_named_with_its_mount() {
    let host = Host::new();
    host.proc(
        "self/mountinfo",
        "40 22 259:2 / /srv/my\\040data rw,relatime shared:1 - xfs /dev/nvme0n1p2 rw\n",
    );
    assert_eq!(host.uses(), ["/dev/nvme0n1p2 is mounted on '/srv/my data'"]);
}

#[test]
fn a_mount_through_the_device_mapper_is_found() {
    let host = Host::new();
    host.map("nvme0n1p1");
    assert_eq!(host.uses(), ["dm-0 is built on nvme0n1p1"], "also when nothing is mounted");
    host.proc("self/mountinfo", "40 22 253:0 / /home rw - ext4 /dev/mapper/home rw\n");
    assert_eq!(host.uses(), ["/dev/mapper/home is mounted on '/home'"]);
}

#[test]
fn a_btrfs_is_found_by_the_source_of_its_mount_or_by_its_list_of_disks() {
    let host = Host::new();
    let devices = host.root().join("sys/fs/btrfs/0123-4567/devices");
    fs::create_dir_all(&devices).unwrap();
    symlink(host.root().join("sys/class/block/nvme0n1p1"), devices.join("nvme0n1p1")).unwrap();
    assert_eq!(host.uses(), ["nvme0n1p1 is part of the mounted btrfs 0123-4567"]);
    host.proc("self/mountinfo", "40 22 0:45 / /data rw - btrfs /dev/nvme0n1p1 rw\n");
    assert_eq!(host.uses(), ["/dev/nvme0n1p1 is mounted on '/data'"]);
}

#[test]
fn swap_space_is_found_also_by_another_name() {
    let host = Host::new();
    host.map("nvme0n1p2");
    fs::create_dir(host.0.dev().join("mapper")).unwrap();
    symlink("../dm-0", host.0.dev().join("mapper/swap")).unwrap();
    host.proc("swaps", "/dev/nvme0n1p1 partition 1 0 -2\n/dev/mapper/swap partition 1 0 -3\n");
    assert_eq!(host.uses(), ["/dev/nvme0n1p1 is swap space", "/dev/mapper/swap is swap space"]);
}

#[test]
fn a_multipath_drive_is_found_through_its_subsystem() {
    let host = Host::new();
    let subsystem = host.root().join("sys/devices/virtual/nvme-subsystem/nvme-subsys1");
    host.block(&subsystem.join("nvme1n1"), "259:7");
    host.proc("self/mountinfo", "40 22 259:7 / /mnt rw - ext4 /dev/nvme1n1 rw\n");
    assert_eq!(host.uses(), Vec::<String>::new());
    symlink(host.0.dir(DRIVE).join("nvme/nvme0"), subsystem.join("nvme1")).unwrap();
    assert_eq!(host.uses(), ["/dev/nvme1n1 is mounted on '/mnt'"]);
}

#[test]
fn what_cannot_be_read_is_an_error_only_where_there_are_disks() {
    let host = Host::new();
    host.0.add("0000:05:00.0", 0x02_00_00, None, None);
    fs::remove_file(host.root().join("proc/self/mountinfo")).unwrap();
    let uses = HostUses::new(host.0.sysfs(), host.0.dev(), host.root().join("proc"));
    let read = |bdf: &str| HostFunction::read(&host.0.sysfs(), bdf.parse().unwrap()).unwrap();
    assert!(uses.of(&read(DRIVE)).is_err());
    assert_eq!(uses.of(&read("0000:05:00.0")).unwrap(), []);
}

#[test]
fn escapes_are_undone_and_broken_ones_kept() {
    for (text, plain) in
        [("a\\040b\\134c", "a b\\c"), ("\\04", "\\04"), ("\\é00", "\\é00"), ("plain", "plain")]
    {
        assert_eq!(unescape(text), plain);
    }
}
