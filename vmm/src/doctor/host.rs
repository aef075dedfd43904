//! The host as the doctor reads it: sysfs, procfs, `/dev`, the modules on disk, and this process's limits.
//!
//! Only what the kernel answers from memory is read (`Documentation/ABI/testing/sysfs-bus-pci`, `sysfs-devices-power`,
//! `sysfs-firmware-acpi`): see [`WAKING`]. Configuration space has one door, [`Host::config_if_awake`]. Every root can be another
//! directory, so that tests have hosts of their own.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use devices::vfio::check::LockLimit;
use devices::vfio::host::Sysfs;
use pci::Bdf;
use rustix::fs::{Access, OFlags, access};

use super::finding::Reading;

/// Attributes of a PCI device that resume it when they are read, or (the last) run methods of the firmware. Never read here.
pub const WAKING: [&str; 10] = [
    "config",
    "vpd",
    "rom",
    "current_link_speed",
    "current_link_width",
    "max_link_speed",
    "max_link_width",
    "secondary_bus_number",
    "subordinate_bus_number",
    "real_power_state",
];
/// Configuration space that every function has.
const CONFIG_BYTES: u64 = 256;
/// The longest record of the kernel's log.
const LOG_RECORD: usize = 8192;

/// Where things are.
#[derive(Debug)]
pub struct Host {
    /// Normally `/sys`.
    pub sysfs: PathBuf,
    /// Normally `/proc`.
    pub proc: PathBuf,
    /// Normally `/dev`.
    pub dev: PathBuf,
    /// Normally `/lib/modules`.
    pub modules: PathBuf,
    /// How much memory this process may lock.
    pub lock_limit: LockLimit,
    /// Whether this process may open a node for reading and writing, found out without opening it.
    pub may_open: fn(&Path) -> io::Result<()>,
    log: OnceLock<String>,
}

impl Default for Host {
    fn default() -> Self {
        let mut host = Self::at(Path::new("/"));
        host.modules = "/lib/modules".into();
        host.lock_limit = LockLimit::of_this_process();
        host
    }
}

impl Host {
    /// A host below another root, with no limit on locked memory.
    pub fn at(root: &Path) -> Self {
        Self {
            sysfs: root.join("sys"),
            proc: root.join("proc"),
            dev: root.join("dev"),
            modules: root.join("lib/modules"),
            lock_limit: LockLimit { bytes: None, used: 0 },
            may_open: |path| Ok(access(path, Access::READ_OK | Access::WRITE_OK)?),
            log: OnceLock::new(),
        }
    }

    /// The same sysfs, for those who look up functions and groups.
    pub fn functions(&self) -> Sysfs {
        Sysfs::new(&self.sysfs)
    }

    /// The path of an attribute of a PCI device.
    pub fn attribute(&self, bdf: Bdf, name: &str) -> PathBuf {
        self.sysfs.join("bus/pci/devices").join(bdf.to_string()).join(name)
    }

    /// Reads an attribute of a PCI device.
    pub fn device(&self, bdf: Bdf, name: &str) -> Reading {
        self.text(self.attribute(bdf, name))
    }

    /// Reads a file, without the white space around it.
    pub fn text(&self, path: PathBuf) -> Reading {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        debug_assert!(!WAKING.contains(&name), "{name} wakes the device");
        let value = fs::read_to_string(&path).ok().map(|text| text.trim().to_owned());
        Reading { path, value }
    }

    /// Whether a file or directory is there. Its content is not read.
    pub fn presence(&self, path: PathBuf) -> Reading {
        let value = path.exists().then(|| "present".to_owned());
        Reading { path, value }
    }

    /// The kernel's release, such as `6.12.95-amd64`.
    pub fn release(&self) -> Reading {
        self.text(self.proc.join("sys/kernel/osrelease"))
    }

    /// The words of the kernel's command line that are about a topic: those with `part` in them.
    pub fn command_line(&self, part: &str) -> Reading {
        let mut line = self.text(self.proc.join("cmdline"));
        line.value = line.value.map(|line| {
            let words: Vec<_> = line.split_whitespace().filter(|word| word.contains(part)).collect();
            if words.is_empty() { format!("nothing with {part}") } else { words.join(" ") }
        });
        line
    }

    /// Whether the kernel's command line has a word.
    pub fn is_booted_with(&self, word: &str) -> bool {
        let line = self.text(self.proc.join("cmdline")).value;
        line.is_some_and(|line| line.split_whitespace().any(|w| w == word))
    }

    /// The first bytes of a device's configuration space, if the kernel has the device powered and active anyway: then reading them
    /// changes nothing. None otherwise, and for whoever may not read that far (it takes `CAP_SYS_ADMIN`).
    pub fn config_if_awake(&self, bdf: Bdf) -> Option<Vec<u8>> {
        if !self.device(bdf, "power/runtime_status").is("active") {
            return None;
        }
        let mut bytes = Vec::new();
        let file = File::open(self.attribute(bdf, "config")).ok()?;
        file.take(CONFIG_BYTES).read_to_end(&mut bytes).ok()?;
        // Others than root get 64 bytes, which do not reach the capabilities.
        (bytes.len() as u64 == CONFIG_BYTES).then_some(bytes)
    }

    /// What the kernel's log has on a device's PME, as `D0 D3hot D3cold`.
    pub fn logged_pme(&self, bdf: Bdf) -> Option<String> {
        let marker = format!("{bdf}: PME# supported from ");
        let log = self.log.get_or_init(|| read_log(&self.log_path()));
        log.lines().find_map(|line| Some(line.split_once(&marker)?.1.trim().to_owned()))
    }

    /// The kernel's log.
    pub fn log_path(&self) -> PathBuf {
        self.dev.join("kmsg")
    }
}

/// The records of the kernel's log on PME (`Documentation/ABI/testing/dev-kmsg`); empty for whoever may not read it.
fn read_log(path: &Path) -> String {
    let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    let Ok(mut file) = OpenOptions::new().read(true).custom_flags(nonblocking).open(path) else {
        return String::new();
    };
    let mut text = String::new();
    let mut record = vec![0; LOG_RECORD];
    loop {
        match file.read(&mut record) {
            Ok(0) => return text,
            Ok(count) => {
                let lines = String::from_utf8_lossy(&record[..count]);
                for line in lines.lines().filter(|line| line.contains("PME# supported from")) {
                    text.push_str(line);
                    text.push('\n');
                }
            }
            // The oldest records have been overwritten meanwhile: the next read goes on behind them.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return text,
        }
    }
}
