//! The two initramfs images: the emulated host's and the guest's.
//!
//! The host's is a chain of uncompressed archives (the kernel accepts archives joined end to end): a base per host
//! kernel, the programs under test, and one payload per guest kernel. Uncompressed, because in an emulated machine
//! unpacking costs more than copying.

use std::collections::BTreeSet;
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::artifacts::{Artifacts, libraries};
use crate::command::capture_text;
use crate::cpio::Archive;
use crate::error::{Error, Result, file_error};
use crate::kernel::{self, KernelFiles};
use crate::paths;
use crate::spec::Kernel;

/// Serves commands on a console.
pub const AGENT: &str = include_str!("image/agent.sh");
const DISK_ROOT: &str = include_str!("image/disk-root.sh");
const PEERS: &str = include_str!("image/peers.sh");
const HOST_INIT: &str = include_str!("image/host-init.sh");
const GUEST_INIT: &str = include_str!("image/guest-init.sh");
const HOST_MODULES: &[&str] = &[
    "kvm_amd",
    "vfio_pci",
    "vfio_iommu_type1",
    "uio_pci_generic",
    // The disks with Debian, and what disks and networks of VMs are made of.
    "virtio_blk",
    "ext4",
    "loop",
    "dm_mod",
    "dm_flakey",
    "tun",
    "bridge",
    "vhost_net",
    "vhost_vsock",
    "nbd",
];
/// So that a scenario can run the VMM as somebody without rights.
const USERS: &str = "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n";
const GUEST_MODULES: &[&str] = &[
    "e1000e",
    "igb",
    "virtio_pci",
    "virtio_gpu",
    "virtio_rng",
    "virtio_balloon",
    "nvme",
    "button",
    "evdev",
    "virtio_blk",
    "virtio_net",
    "virtiofs",
    "virtio_console",
    "vmw_vsock_virtio_transport",
    "pvpanic_pci",
    "virtio_pmem",
    "nd_pmem",
    "virtio_mem",
    "ext4",
    "crc32c_generic",
];
const MOTD: &str = "\n\
    This is the emulated host: root, no password, everything in RAM. Ctrl-A X leaves.\n\
    Guest kernels are in /guest, the VMM is /bin/dormouse. For example:\n\n\
    dormouse --kernel /guest/6.12/vmlinuz --initramfs /guest/6.12/initramfs \\\n\
    \x20 --cmdline 'console=ttyS0 bed.mode=shell bed.modules=virtio_pci,virtio_gpu' \\\n\
    \x20 --cpus boot=1 --memory size=512M --serial tty --console off \\\n\
    \x20 --device path=/sys/bus/pci/devices/0000:01:00.0\n\n\
    cat /sys/bus/pci/devices/0000:01:00.0/power_state\n\n";

/// Path of a guest kernel's file inside the host; `file` is `vmlinuz`, `vmlinux` or `initramfs`.
pub fn guest_path(kernel: Kernel, file: &str) -> String {
    format!("/guest/{}/{file}", kernel.name())
}

/// Writes the host's initramfs for `host`, able to boot each of `guests`, to `path`.
pub fn build_host(artifacts: &Artifacts, host: Kernel, guests: &[Kernel], path: &Path) -> Result<()> {
    let mut out = fs::File::create(path).map_err(file_error("create", path))?;
    let mut append = |part: &[u8]| out.write_all(part).map_err(file_error("write", path));
    append(&cached(&host_base(host)?)?)?;
    let curl = find(&["/usr/bin/curl", "/bin/curl"], "curl", "curl")?;
    let mkfs = find(&["/sbin/mkfs.ext4", "/usr/sbin/mkfs.ext4"], "mkfs.ext4", "e2fsprogs")?;
    let socat = find(&["/usr/bin/socat", "/bin/socat"], "socat", "socat")?;
    append(&programs(&[
        ("curl", &curl),
        ("socat", &socat),
        ("mkfs.ext4", &mkfs),
        ("dormouse", &artifacts.dormouse),
        ("vfio_probe", &artifacts.vfio_probe),
        ("api_client", &artifacts.api_client),
        ("guest_tool", &artifacts.guest_tool),
    ])?)?;
    for guest in guests {
        append(&guest_payload(artifacts, *guest)?)?;
    }
    Ok(())
}

/// The guest's initramfs.
pub fn build_guest(artifacts: &Artifacts, guest: Kernel) -> Result<Vec<u8>> {
    let mut image = cached(&Base {
        name: format!("guest-{guest}"),
        kernel: kernel::obtain(guest)?,
        modules: GUEST_MODULES,
        init: GUEST_INIT,
        motd: "",
    })?;
    image.extend(programs(&[("guest_tool", &artifacts.guest_tool)])?);
    Ok(image)
}

fn guest_payload(artifacts: &Artifacts, guest: Kernel) -> Result<Vec<u8>> {
    let files = kernel::obtain(guest)?;
    let mut archive = Archive::new();
    let inside = |file: &str| guest_path(guest, file).trim_start_matches('/').to_owned();
    archive.copy(&inside("vmlinuz"), &files.vmlinuz)?;
    if let (Kernel::Cloud6_12, Some(vmlinux)) = (guest, &files.vmlinux) {
        archive.copy(&inside("vmlinux"), vmlinux)?;
    }
    archive.file(&inside("initramfs"), &build_guest(artifacts, guest)?);
    Ok(archive.finish())
}

/// What a base image is made of.
struct Base {
    name: String,
    kernel: KernelFiles,
    modules: &'static [&'static str],
    init: &'static str,
    motd: &'static str,
}

fn host_base(kernel: Kernel) -> Result<Base> {
    Ok(Base {
        name: format!("host-{kernel}"),
        kernel: kernel::obtain(kernel)?,
        modules: HOST_MODULES,
        init: HOST_INIT,
        motd: MOTD,
    })
}

/// The base image, from the cache when nothing it is made of has changed.
fn cached(base: &Base) -> Result<Vec<u8>> {
    let mut hasher = DefaultHasher::new();
    (
        "2",
        &base.name,
        &base.kernel.release,
        base.modules,
        base.init,
        base.motd,
        AGENT,
        USERS,
        DISK_ROOT,
        PEERS,
    )
        .hash(&mut hasher);
    fs::metadata(busybox()?).map(|m| m.len()).unwrap_or_default().hash(&mut hasher);
    let dir = paths::cache()?.join("images");
    fs::create_dir_all(&dir).map_err(file_error("create", &dir))?;
    let path = dir.join(format!("{}-{:016x}.cpio", base.name, hasher.finish()));
    if let Ok(bytes) = fs::read(&path) {
        return Ok(bytes);
    }
    let bytes = build_base(base)?;
    // Two hosts that boot at once may both build it; each has its own file until it is whole.
    static BUILT: AtomicU32 = AtomicU32::new(0);
    let unique = BUILT.fetch_add(1, Ordering::Relaxed);
    let new = path.with_extension(format!("{}-{unique}.new", std::process::id()));
    fs::write(&new, &bytes).map_err(file_error("write", &new))?;
    fs::rename(&new, &path).map_err(file_error("rename", &new))?;
    Ok(bytes)
}

fn build_base(base: &Base) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for dir in ["bin", "dev", "proc", "sys", "run", "tmp", "etc"] {
        archive.directory(dir);
    }
    archive.character("dev/console", 5, 1);
    let busybox = busybox()?;
    archive.copy("bin/busybox", &busybox)?;
    for applet in capture_text(Command::new(&busybox).arg("--list"))?.lines().filter(|a| *a != "busybox") {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    let modules = base.kernel.modules(base.modules)?;
    let dir = format!("lib/modules/{}", base.kernel.release);
    let mut index = String::new();
    for module in &modules {
        archive.file(&format!("{dir}/{}.ko", module.name), &module.content()?);
        let needs: Vec<String> = module.needs.iter().map(|name| format!("{name}.ko")).collect();
        index.push_str(&format!("{}.ko: {}\n", module.name, needs.join(" ")));
    }
    archive.file(&format!("{dir}/modules.dep"), index.as_bytes());
    // So that `modprobe` of what is built into this kernel, and a module of another one, is no error.
    archive.copy(&format!("{dir}/modules.builtin"), &base.kernel.modules.join("modules.builtin"))?;
    archive.file("init", base.init.as_bytes());
    archive.file("etc/agent", AGENT.as_bytes());
    archive.file("etc/disk-root", DISK_ROOT.as_bytes());
    archive.file("etc/peers", PEERS.as_bytes());
    archive.file("etc/passwd", USERS.as_bytes());
    archive.file("etc/motd", base.motd.as_bytes());
    Ok(archive.finish())
}

/// An archive with `programs` in `/bin` and the libraries they need.
fn programs(programs: &[(&str, &Path)]) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    let mut needed = BTreeSet::new();
    for (name, path) in programs {
        archive.copy(&format!("bin/{name}"), path)?;
        needed.extend(libraries(path)?);
    }
    for library in needed {
        archive.copy(library.to_string_lossy().trim_start_matches('/'), &library)?;
    }
    Ok(archive.finish())
}

fn busybox() -> Result<PathBuf> {
    find(&["/usr/bin/busybox", "/bin/busybox"], "busybox", "busybox-static")
}

fn find(paths: &[&str], what: &str, package: &str) -> Result<PathBuf> {
    paths
        .iter()
        .map(PathBuf::from)
        .find(|path| path.is_file())
        .ok_or_else(|| Error::Missing { what: what.to_owned(), how: format!("apt-get install {package}") })
}
