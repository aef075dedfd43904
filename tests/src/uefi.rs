//! UEFI in the guest: EDK II as Debian builds it for Cloud Hypervisor, and a drive that it can boot Debian's kernel from.
//!
//! The firmware is a package of Debian's unstable suite only. It is downloaded with lists of its own, so that the machine's apt never hears of that
//! suite, and unpacked, never installed. The drive is one FAT file system (UEFI 2.10, section 13.3) with systemd-boot on it.

use std::fs;
use std::io::{Cursor, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};

use crate::artifacts::Artifacts;
use crate::command::capture;
use crate::cpio::Archive;
use crate::error::{Error, Result, file_error};
use crate::image;
use crate::kernel;
use crate::packages;
use crate::paths;
use crate::spec::Kernel;

/// The firmware on a host that was asked to have it.
pub const FIRMWARE: &str = "/firmware/CLOUDHV.fd";
/// The bootable drive's image on a host that also has Debian.
pub const DISK: &str = "/firmware/boot.img";
/// The bootable drive's image, in the directory of the host's other files.
pub const DRIVE: &str = "uefi.img";
const DRIVE_BYTES: usize = 48 << 20;

/// Package, its suite if that is not the machine's own, and the file of it that is wanted.
struct Wanted {
    package: &'static str,
    suite: Option<&'static str>,
    file: &'static str,
}

const CLOUDHV: Wanted = Wanted {
    package: "cloudhv-efi-x86-64",
    suite: Some("sid"),
    file: "usr/share/cloudhv-efi-x86-64/CLOUDHV.fd",
};
const BOOT_LOADER: Wanted =
    Wanted { package: "systemd-boot-efi", suite: None, file: "usr/lib/systemd/boot/efi/systemd-bootx64.efi" };

/// Puts the firmware at the end of a host's initramfs, and the drive's image, which boots `guest`, into `dir`. With `debian`, the image is on the host
/// too, and boots to the Debian on the second virtio disk.
pub fn add(artifacts: &Artifacts, guest: Kernel, debian: bool, initramfs: &Path, dir: &Path) -> Result<()> {
    let mut archive = Archive::new();
    archive.copy(FIRMWARE.trim_start_matches('/'), &obtain(&CLOUDHV)?)?;
    let drive = dir.join(DRIVE);
    fs::write(&drive, drive_image(artifacts, guest, debian)?).map_err(file_error("write", &drive))?;
    if debian {
        archive.copy(DISK.trim_start_matches('/'), &drive)?;
    }
    let failed = || file_error("write", initramfs);
    let mut file = fs::OpenOptions::new().append(true).open(initramfs).map_err(failed())?;
    file.write_all(&archive.finish()).map_err(failed())
}

/// What the kernel is told by its boot loader: as the test bed tells it without one.
fn entry(debian: bool) -> String {
    let words = if debian {
        format!("bed.mode=disk bed.root=/dev/vdb {}", crate::debian::WORDS)
    } else {
        "bed.modules=virtio_pci,nvme,pvpanic_pci".to_owned()
    };
    format!("title Debian\nlinux /vmlinuz\ninitrd /initrd\noptions console=ttyS0 quiet panic=-1 {words}\n")
}

fn drive_image(artifacts: &Artifacts, guest: Kernel, debian: bool) -> Result<Vec<u8>> {
    let read = |path: &Path| fs::read(path).map_err(file_error("read", path));
    let files = kernel::obtain(guest)?;
    let content = [
        ("EFI/BOOT/BOOTX64.EFI", read(&obtain(&BOOT_LOADER)?)?),
        ("loader/loader.conf", b"timeout 0\ndefault debian.conf\n".to_vec()),
        ("loader/entries/debian.conf", entry(debian).into_bytes()),
        ("vmlinuz", read(&files.vmlinuz)?),
        ("initrd", image::build_guest(artifacts, guest)?),
    ];
    let mut bytes = vec![0; DRIVE_BYTES];
    fill(&mut bytes, &content).map_err(|source| Error::File {
        what: "write the file system of",
        path: DRIVE.into(),
        source,
    })?;
    Ok(bytes)
}

/// Makes a file system in `bytes` with these files.
fn fill(bytes: &mut [u8], files: &[(&str, Vec<u8>)]) -> std::io::Result<()> {
    let mut disk = Cursor::new(bytes);
    fatfs::format_volume(&mut disk, FormatVolumeOptions::new())?;
    let file_system = FileSystem::new(disk, FsOptions::new())?;
    for (path, content) in files {
        let mut directory = file_system.root_dir();
        let mut parts: Vec<&str> = path.split('/').collect();
        let name = parts.pop().unwrap_or(path);
        for part in parts {
            directory = directory.create_dir(part)?;
        }
        directory.create_file(name)?.write_all(content)?;
    }
    file_system.unmount()
}

/// The file of a package, from the cache or downloaded.
fn obtain(wanted: &Wanted) -> Result<PathBuf> {
    let dir = paths::cache()?.join("packages").join(wanted.package);
    let file = dir.join(wanted.file);
    if file.is_file() {
        return Ok(file);
    }
    eprintln!("testbed: downloading {}", wanted.package);
    let work = dir.with_extension(format!("{}.new", std::process::id()));
    let _ = fs::remove_dir_all(&work);
    let result = download(wanted, &work).and_then(|()| {
        if work.join(wanted.file).is_file() {
            let _ = fs::remove_dir_all(&dir);
            return fs::rename(&work, &dir).map_err(file_error("rename", &work));
        }
        Err(Error::Check(format!("Debian's package {} has no {}", wanted.package, wanted.file)))
    });
    let _ = fs::remove_dir_all(&work);
    result.map(|()| file)
}

fn download(wanted: &Wanted, work: &Path) -> Result<()> {
    for part in ["lists/partial", "cache/archives/partial"] {
        let dir = work.join(part);
        fs::create_dir_all(&dir).map_err(file_error("create", &dir))?;
    }
    let sources = work.join("sources.list");
    fs::write(&sources, packages::source_line(wanted.suite)?).map_err(file_error("write", &sources))?;
    let option = |name: &str, value: &Path| format!("{name}={}", value.display());
    let apt = |words: &[&str]| {
        let mut command = Command::new("apt-get");
        command.current_dir(work).args(["-q", "-o", "Dir::Etc::sourceparts=-", "-o", "APT::Sandbox::User="]);
        for (name, part) in [
            ("Dir::Etc::sourcelist", "sources.list"),
            ("Dir::State::lists", "lists"),
            ("Dir::Cache", "cache"),
        ] {
            command.args(["-o", &option(name, &work.join(part))]);
        }
        capture(command.args(words)).map(drop)
    };
    apt(&["update"])?;
    apt(&["download", wanted.package])?;
    for part in ["lists", "cache"] {
        let _ = fs::remove_dir_all(work.join(part));
    }
    let archive = fs::read_dir(work)
        .map_err(file_error("list", work))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or_else(|| Error::Check(format!("apt-get download left no package in {}", work.display())))?;
    capture(Command::new("dpkg").arg("-x").arg(&archive).arg(work))?;
    fs::remove_file(&archive).map_err(file_error("remove", &archive))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn files_of_a_drive_are_where_they_were_put() {
        let mut bytes = vec![0; 4 << 20];
        let files = [("EFI/BOOT/BOOTX64.EFI", vec![7; 70_000]), ("debian.conf", b"title".to_vec())];
        fill(&mut bytes, &files).unwrap();
        let file_system = FileSystem::new(Cursor::new(&mut bytes), FsOptions::new()).unwrap();
        for (path, content) in files {
            let mut read = Vec::new();
            file_system.root_dir().open_file(path).unwrap().read_to_end(&mut read).unwrap();
            assert_eq!(read, content, "{path}");
        }
        // As they were spelled, not only as eight capitals and three.
        let names: Vec<String> =
            file_system.root_dir().iter().flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(names, ["EFI", "debian.conf"]);
    }
}
