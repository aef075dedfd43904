//! Stock Debian kernels, unpacked into the cache without being installed, and the parts of them that images need.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::{capture, capture_text};
use crate::error::{Error, Result, file_error};
use crate::packages;
use crate::paths;
use crate::spec::Kernel;

/// A kernel in the cache.
#[derive(Debug, Clone)]
pub struct KernelFiles {
    /// The compressed image, as the bootloader takes it.
    pub vmlinuz: PathBuf,
    /// The uncompressed ELF with a PVH entry, taken out of `vmlinuz` where that is in a format we can unpack.
    pub vmlinux: Option<PathBuf>,
    /// `uname -r`.
    pub release: String,
    /// The directory of its modules.
    pub modules: PathBuf,
}

/// Finds `kernel` in the cache, or downloads the newest one the apt lists know.
pub fn obtain(kernel: Kernel) -> Result<KernelFiles> {
    let dir = paths::cache()?.join("kernels").join(kernel.name());
    if !dir.join("complete").exists() {
        download(kernel, &dir)?;
    }
    let boot = dir.join("root/boot");
    let release = fs::read_dir(&boot)
        .map_err(file_error("list", &boot))?
        .flatten()
        .find_map(|entry| entry.file_name().to_string_lossy().strip_prefix("vmlinuz-").map(str::to_owned))
        .ok_or_else(|| Error::Missing {
            what: format!("vmlinuz in {}", boot.display()),
            how: format!("rm -r {} and prepare again", dir.display()),
        })?;
    Ok(KernelFiles {
        vmlinuz: boot.join(format!("vmlinuz-{release}")),
        vmlinux: Some(dir.join("vmlinux")).filter(|path| path.is_file()),
        modules: dir.join("root/lib/modules").join(&release),
        release,
    })
}

fn download(kernel: Kernel, dir: &Path) -> Result<()> {
    let mut candidates = candidates(kernel)?;
    if candidates.is_empty() || (series(kernel).starts_with("6.12") && !in_lists("6.12.")?) {
        packages::ensure_kernel_suites()?;
        candidates = self::candidates(kernel)?;
    }
    let work = dir.with_extension("new");
    let _ = fs::remove_dir_all(&work);
    let root = work.join("root");
    fs::create_dir_all(&root).map_err(file_error("create", &root))?;
    // The lists may name a package that the mirror no longer has: then the next newest one serves.
    let mut last = Error::Missing {
        what: format!("a Debian package of Linux {kernel}"),
        how: "apt-get update, with the backports suite among the sources".to_owned(),
    };
    for package in candidates.iter().take(4) {
        eprintln!("testbed: downloading {package}");
        match capture(Command::new("apt-get").current_dir(&work).args(["download", package])) {
            Ok(_) => return unpack(&work, dir),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn unpack(work: &Path, dir: &Path) -> Result<()> {
    let archive = fs::read_dir(work)
        .map_err(file_error("list", work))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or_else(|| Error::Check(format!("apt-get download left no package in {}", work.display())))?;
    let root = work.join("root");
    capture(Command::new("dpkg").arg("-x").arg(&archive).arg(&root))?;
    let _ = fs::remove_file(&archive);
    let modules = root.join("lib/modules");
    let release = fs::read_dir(&modules)
        .map_err(file_error("list", &modules))?
        .flatten()
        .map(|entry| entry.file_name())
        .next()
        .ok_or_else(|| Error::Check(format!("no modules in {}", archive.display())))?;
    capture(Command::new("/sbin/depmod").arg("-b").arg(&root).arg(&release))?;
    let vmlinuz = root.join("boot").join(format!("vmlinuz-{}", release.to_string_lossy()));
    let image = fs::read(&vmlinuz).map_err(file_error("read", &vmlinuz))?;
    let vmlinux = work.join("vmlinux");
    extract_vmlinux(&image, &vmlinux)?;
    let complete = work.join("complete");
    fs::write(&complete, "").map_err(file_error("write", &complete))?;
    let _ = fs::remove_dir_all(dir);
    fs::rename(work, dir).map_err(file_error("rename", work))
}

/// Takes the kernel proper out of a bzImage: `payload_offset` and `payload_length` of the x86 boot protocol.
fn extract_vmlinux(image: &[u8], to: &Path) -> Result<()> {
    let bad = || Error::Check("the kernel package's vmlinuz is no bzImage".to_owned());
    let word = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).and_then(|b| b.try_into().ok()).ok_or_else(bad)?;
        usize::try_from(u32::from_le_bytes(bytes)).map_err(|_| bad())
    };
    let setup_sectors = match image.get(0x1f1) {
        Some(0) => 4,
        Some(sectors) => usize::from(*sectors),
        None => return Err(bad()),
    };
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    let payload = image.get(start..start + word(0x24c)?).ok_or_else(bad)?;
    let (program, extension) = match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", "zst"),
        [0xfd, b'7', b'z', b'X', ..] => ("xz", "xz"),
        // Debian's 6.1 cloud kernel is compressed with LZ4. Nothing needs its ELF.
        _ => return Ok(()),
    };
    // The payload ends in its uncompressed size, which the programs would report as trailing rubbish.
    let stream = to.with_extension(extension);
    fs::write(&stream, &payload[..payload.len().saturating_sub(4)]).map_err(file_error("write", &stream))?;
    let out = capture(Command::new(program).arg("-dc").arg(&stream));
    let _ = fs::remove_file(&stream);
    fs::write(to, out?).map_err(file_error("write", to))
}

/// Package names of `kernel` in the apt lists, newest first.
fn candidates(kernel: Kernel) -> Result<Vec<String>> {
    let prefix = format!("linux-image-{}", series(kernel));
    let suffix = if is_cloud(kernel) { "-cloud-amd64" } else { "-amd64" };
    let text = capture_text(Command::new("apt-cache").args(["pkgnames", &prefix]))?;
    let mut found: Vec<(Vec<u32>, String)> = text
        .lines()
        .filter_map(|name| {
            let middle = name.strip_prefix(&prefix)?.strip_suffix(suffix)?;
            let version = middle.split('+').next()?;
            // Anything but a bare version is another flavour (rt, cloud) or a meta-package.
            version.chars().all(|c| c.is_ascii_digit() || c == '.' || c == '-').then_some(())?;
            let debian =
                middle.split_once('+').is_none_or(|(_, rest)| rest.starts_with("deb") && !rest.contains('-'));
            let numbers = version.split(['.', '-']).filter_map(|n| n.parse().ok()).collect();
            debian.then(|| (numbers, name.to_owned()))
        })
        .collect();
    found.sort();
    Ok(found.into_iter().rev().map(|(_, name)| name).collect())
}

fn in_lists(series: &str) -> Result<bool> {
    let names = capture_text(Command::new("apt-cache").args(["pkgnames", &format!("linux-image-{series}")]))?;
    Ok(!names.trim().is_empty())
}

fn series(kernel: Kernel) -> &'static str {
    match kernel {
        Kernel::Cloud6_12 | Kernel::Generic6_12 => "6.12.",
        Kernel::Cloud6_1 | Kernel::Generic6_1 => "6.1.0-",
    }
}

fn is_cloud(kernel: Kernel) -> bool {
    matches!(kernel, Kernel::Cloud6_12 | Kernel::Cloud6_1)
}

/// One module of an image.
#[derive(Debug, Clone)]
pub struct Module {
    /// Name as `modprobe` takes it, with underscores.
    pub name: String,
    /// The (possibly compressed) file.
    pub path: PathBuf,
    /// Names of the modules it needs.
    pub needs: Vec<String>,
}

impl Module {
    /// The module's uncompressed content.
    pub fn content(&self) -> Result<Vec<u8>> {
        if self.path.extension().is_some_and(|extension| extension == "xz") {
            return capture(Command::new("xz").arg("-dc").arg(&self.path));
        }
        fs::read(&self.path).map_err(file_error("read", &self.path))
    }
}

impl KernelFiles {
    /// The modules `wanted` and all they need. Names that are built into the kernel are left out.
    pub fn modules(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        let index = self.modules.join("modules.dep");
        let text = fs::read_to_string(&index).map_err(file_error("read", &index))?;
        let mut all: BTreeMap<String, (PathBuf, Vec<String>)> = BTreeMap::new();
        for line in text.lines() {
            let Some((path, needs)) = line.split_once(':') else { continue };
            let needs = needs.split_whitespace().map(module_name).collect();
            all.insert(module_name(path), (self.modules.join(path), needs));
        }
        let mut chosen = BTreeSet::new();
        let mut open: Vec<String> = wanted.iter().map(|name| module_name(name)).collect();
        while let Some(name) = open.pop() {
            if let Some((_, needs)) = all.get(&name)
                && chosen.insert(name)
            {
                open.extend(needs.iter().cloned());
            }
        }
        Ok(chosen
            .into_iter()
            .filter_map(|name| {
                let (path, needs) = all.remove(&name)?;
                Some(Module { name, path, needs })
            })
            .collect())
    }
}

fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}
