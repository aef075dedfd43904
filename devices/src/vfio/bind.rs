//! Binding a device of the host to `vfio-pci` with its whole IOMMU group, and giving it back to its own driver.
//!
//! By `driver_override` (Documentation/ABI/testing/sysfs-bus-pci), which touches no other device of the same model. Bridges
//! stay with their drivers: they carry the group, and the kernel lets them. What has been done is undone when a later step
//! fails. Nothing opens a device; the kernel wakes one when it changes its driver.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use pci::Bdf;

use super::host::{HostError, HostFunction, IommuGroup, Sysfs};
use super::usage::HostUses;

/// The driver that devices are bound to.
pub const VFIO_PCI: &str = "vfio-pci";

/// Binding or unbinding has failed. Unless the message says otherwise, every device has the driver that it had before.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The device or its group cannot be read.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A bridge cannot be assigned.
    #[error("{bdf} is a bridge (class {class:06x}); bridges stay with the host, name the device behind it")]
    Bridge {
        /// The bridge.
        bdf: Bdf,
        /// Its class code.
        class: u32,
    },
    /// There is no IOMMU.
    #[error(
        "{bdf} is in no IOMMU group; switch the IOMMU on in the firmware (VT-d, AMD-Vi), and boot Linux with intel_iommu=on on Intel"
    )]
    NoIommu {
        /// The device.
        bdf: Bdf,
    },
    /// There is no `vfio-pci`.
    #[error(
        "the kernel has no driver vfio-pci; install the module (CONFIG_VFIO_PCI), then run `modprobe vfio-pci`"
    )]
    NoDriver(#[source] Option<io::Error>),
    /// Somebody uses the group.
    #[error(
        "{bdf} is in use: '{node}' is held open by another process; stop the VM that uses the device first"
    )]
    InUse {
        /// The device asked for.
        bdf: Bdf,
        /// The group's node.
        node: PathBuf,
    },
    /// The host's own file systems are on it.
    #[error(
        "{bdf} is in use by this host: {uses}; end that first (umount, swapoff, ...), or add --force to take the device \
         away all the same"
    )]
    UsedByHost {
        /// The function.
        bdf: Bdf,
        /// By what.
        uses: String,
    },
    /// Whether the host uses it cannot be found out.
    #[error(
        "cannot tell whether a disk of {bdf} is mounted; mount /proc, or add --force to bind it all the same"
    )]
    UnknownUse {
        /// The function.
        bdf: Bdf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel does not accept a write.
    #[error(
        "the kernel refuses to write '{text}' to '{path}' for {bdf}; run as root, with /sys mounted read-write"
    )]
    Refused {
        /// The device it was for.
        bdf: Bdf,
        /// The file.
        path: PathBuf,
        /// What was written.
        text: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The driver has not taken the device.
    #[error("{bdf} was offered to {wanted}, but has {got} now; `dmesg` says why")]
    NotTaken {
        /// The device.
        bdf: Bdf,
        /// The driver it was meant for.
        wanted: String,
        /// The driver it has.
        got: String,
    },
}

/// What has been done to one function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rebound {
    /// The function.
    pub bdf: Bdf,
    /// The driver it had.
    pub before: Option<String>,
    /// The driver it has.
    pub after: Option<String>,
    /// It belongs to the host's topology and was left alone.
    pub bridge: bool,
}

impl fmt::Display for Rebound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |driver: &Option<String>| driver.clone().unwrap_or_else(|| "no driver".to_owned());
        write!(f, "{}: ", self.bdf)?;
        match (self.bridge, self.before == self.after) {
            (true, _) => write!(f, "{} (bridge, left alone)", name(&self.after)),
            (false, true) => write!(f, "{} (unchanged)", name(&self.after)),
            (false, false) => write!(f, "{} -> {}", name(&self.before), name(&self.after)),
        }
    }
}

/// What has been done to a group, one line for each function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Number of the IOMMU group.
    pub group: u32,
    /// Its functions, by address.
    pub functions: Vec<Rebound>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IOMMU group {}:", self.group)?;
        self.functions.iter().try_for_each(|function| write!(f, "\n  {function}"))
    }
}

/// What is done to the kernel; the tests put their own in its place.
pub trait Kernel: fmt::Debug {
    /// Writes `text` to a sysfs attribute, in one write.
    ///
    /// # Errors
    /// The kernel's answer.
    fn write(&self, path: &Path, text: &str) -> io::Result<()>;
    /// Loads a module by name or alias.
    ///
    /// # Errors
    /// `modprobe` is absent or fails.
    fn modprobe(&self, module: &str) -> io::Result<()>;
}

/// The kernel that we run on.
#[derive(Debug, Clone, Copy, Default)]
pub struct ThisKernel;

impl Kernel for ThisKernel {
    fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
    }

    fn modprobe(&self, module: &str) -> io::Result<()> {
        let output = Command::new("modprobe").arg("--").arg(module).output()?;
        if output.status.success() {
            return Ok(());
        }
        Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ")))
    }
}

/// Binds and unbinds devices.
#[derive(Debug)]
pub struct Binder<K = ThisKernel> {
    sysfs: Sysfs,
    dev: PathBuf,
    uses: HostUses,
    force: bool,
    kernel: K,
}

impl Default for Binder {
    fn default() -> Self {
        Self::new(Sysfs::default(), "/dev".into(), "/proc".into(), ThisKernel)
    }
}

impl<K: Kernel> Binder<K> {
    /// A binder over a sysfs, a `/dev` and a procfs.
    pub fn new(sysfs: Sysfs, dev: PathBuf, proc: PathBuf, kernel: K) -> Self {
        let uses = HostUses::new(sysfs.clone(), dev.clone(), proc);
        Self { sysfs, dev, uses, force: false, kernel }
    }

    /// Whether [`bind`](Self::bind) takes a device from the host that still has a mounted file system or swap space on it.
    #[must_use]
    pub fn force(self, force: bool) -> Self {
        Self { force, ..self }
    }

    /// Binds a device and the whole of its IOMMU group to `vfio-pci`. Functions that a VFIO driver has already stay with it.
    ///
    /// # Errors
    /// See [`BindError`]; what was done is undone.
    pub fn bind(&self, bdf: Bdf) -> Result<Report, BindError> {
        let group = self.group(bdf)?;
        let wanted = |function: &HostFunction| !function.is_topology() && !function.is_bound_to_vfio();
        if !self.force {
            group
                .members
                .iter()
                .filter(|member| wanted(member))
                .try_for_each(|member| self.refuse_if_used(member))?;
        }
        if group.members.iter().any(wanted) {
            self.need_vfio_pci()?;
        }
        self.for_each(&group, wanted, |function| self.to_vfio(function))
    }

    /// Gives a device and the whole of its IOMMU group back to the drivers that the kernel finds for them.
    ///
    /// # Errors
    /// See [`BindError`]; what was done is undone.
    pub fn unbind(&self, bdf: Bdf) -> Result<Report, BindError> {
        let group = self.group(bdf)?;
        self.refuse_if_in_use(bdf, group.number)?;
        let wanted = |function: &HostFunction| {
            !function.is_topology()
                && (function.is_bound_to_vfio() || function.driver_override.as_deref() == Some(VFIO_PCI))
        };
        self.for_each(&group, wanted, |function| self.to_host(function))
    }

    /// Binds as [`Binder::bind`] does, for as long as the loan lives. Then every function gets back the driver, the override and the
    /// `power/control` that it had.
    ///
    /// # Errors
    /// See [`BindError`]; what was done is undone.
    pub fn lend(&self, bdf: Bdf) -> Result<Loan<'_, K>, BindError> {
        let group = self.group(bdf)?;
        let lent: Vec<Lent> = group
            .members
            .into_iter()
            .filter(|function| !function.is_topology() && !function.is_bound_to_vfio())
            .map(|function| Lent { control: control(&function), function })
            .collect();
        if !lent.is_empty()
            && let Err(error) = self.bind(bdf)
        {
            self.give_back_controls(&lent);
            return Err(error);
        }
        Ok(Loan { binder: self, lent })
    }

    /// vfio-pci leaves `on` behind, and the next driver may change it too.
    fn give_back_controls(&self, lent: &[Lent]) {
        for Lent { function, control: before } in lent {
            if let Some(before) = before
                && control(function).as_ref() != Some(before)
                && let Err(error) = self.write(function, &control_path(function), before)
            {
                log::error!("{error}");
            }
        }
    }

    fn group(&self, bdf: Bdf) -> Result<IommuGroup, BindError> {
        let function = HostFunction::read(&self.sysfs, bdf)?;
        if function.is_bridge() {
            return Err(BindError::Bridge { bdf, class: function.class });
        }
        IommuGroup::of(&self.sysfs, &function)?.ok_or(BindError::NoIommu { bdf })
    }

    fn refuse_if_used(&self, function: &HostFunction) -> Result<(), BindError> {
        let bdf = function.bdf;
        let uses = self.uses.of(function).map_err(|source| BindError::UnknownUse { bdf, source })?;
        if uses.is_empty() {
            return Ok(());
        }
        let uses: Vec<_> = uses.iter().map(ToString::to_string).collect();
        Err(BindError::UsedByHost { bdf, uses: uses.join(", ") })
    }

    fn need_vfio_pci(&self) -> Result<(), BindError> {
        let present = || self.sysfs.driver_dir(VFIO_PCI).is_dir();
        if present() {
            return Ok(());
        }
        let result = self.kernel.modprobe(VFIO_PCI);
        if present() { Ok(()) } else { Err(BindError::NoDriver(result.err())) }
    }

    /// Unbinding waits for as long as a VM has the device, so it is not even begun then. A group's node can be opened once,
    /// and opening it does not touch the device.
    fn refuse_if_in_use(&self, bdf: Bdf, group: u32) -> Result<(), BindError> {
        let node = self.dev.join("vfio").join(group.to_string());
        match OpenOptions::new().read(true).write(true).open(&node) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Err(BindError::InUse { bdf, node }),
            // Absent when nothing is bound; without permission the writes to come will say so.
            _ => Ok(()),
        }
    }

    fn for_each(
        &self,
        group: &IommuGroup,
        wanted: impl Fn(&HostFunction) -> bool,
        change: impl Fn(&HostFunction) -> Result<(), BindError>,
    ) -> Result<Report, BindError> {
        let mut functions = Vec::new();
        for (position, function) in group.members.iter().enumerate() {
            if wanted(function)
                && let Err(error) = change(function)
            {
                // This one is half done, those before it are done.
                for done in group.members[..=position].iter().filter(|member| wanted(member)).rev() {
                    self.restore(done);
                }
                return Err(error);
            }
            let after = HostFunction::read(&self.sysfs, function.bdf)?.driver;
            functions.push(Rebound {
                bdf: function.bdf,
                before: function.driver.clone(),
                after,
                bridge: function.is_topology(),
            });
        }
        Ok(Report { group: group.number, functions })
    }

    fn to_vfio(&self, function: &HostFunction) -> Result<(), BindError> {
        self.set_override(function, VFIO_PCI)?;
        self.detach(function)?;
        self.probe(function)?;
        let got = HostFunction::read(&self.sysfs, function.bdf)?;
        if got.driver.as_deref() == Some(VFIO_PCI) {
            return Ok(());
        }
        let got = got.driver_name().to_owned();
        Err(BindError::NotTaken { bdf: function.bdf, wanted: VFIO_PCI.to_owned(), got })
    }

    fn to_host(&self, function: &HostFunction) -> Result<(), BindError> {
        self.set_override(function, "")?;
        self.detach(function)?;
        self.probe(function)?;
        if HostFunction::read(&self.sysfs, function.bdf)?.driver.is_none() {
            // The driver may be a module that nobody has needed yet. A device for which there is none stays without.
            let loaded = fs::read_to_string(function.dir.join("modalias"))
                .and_then(|alias| self.kernel.modprobe(alias.trim()));
            match loaded {
                Ok(()) => self.probe(function)?,
                Err(error) => log::info!("{}: no driver of the host's own: {error}", function.bdf),
            }
        }
        Ok(())
    }

    /// Puts a function back to how it was read. Failures are logged: there is a first one to report already.
    fn restore(&self, function: &HostFunction) {
        let back = || -> Result<(), BindError> {
            let now = HostFunction::read(&self.sysfs, function.bdf)?;
            self.set_override(function, function.driver.as_deref().unwrap_or(""))?;
            if now.driver != function.driver {
                self.detach(&now)?;
                if function.driver.is_some() {
                    self.probe(function)?;
                }
            }
            self.set_override(function, function.driver_override.as_deref().unwrap_or(""))
        };
        if let Err(error) = back() {
            log::error!("{}: could not be given back to {}: {error}", function.bdf, function.driver_name());
        }
    }

    fn set_override(&self, function: &HostFunction, driver: &str) -> Result<(), BindError> {
        // A lone line end clears it.
        self.write(function, &function.dir.join("driver_override"), &format!("{driver}\n"))
    }

    fn detach(&self, function: &HostFunction) -> Result<(), BindError> {
        match &function.driver {
            Some(driver) => {
                self.write(function, &self.sysfs.driver_dir(driver).join("unbind"), &function.bdf.to_string())
            }
            None => Ok(()),
        }
    }

    fn probe(&self, function: &HostFunction) -> Result<(), BindError> {
        self.write(function, &self.sysfs.drivers_probe(), &function.bdf.to_string())
    }

    fn write(&self, function: &HostFunction, path: &Path, text: &str) -> Result<(), BindError> {
        self.kernel.write(path, text).map_err(|source| BindError::Refused {
            bdf: function.bdf,
            path: path.to_owned(),
            text: text.trim_end().to_owned(),
            source,
        })
    }
}

/// A function of a [`Loan`], as it was.
#[derive(Debug)]
struct Lent {
    function: HostFunction,
    control: Option<String>,
}

/// Functions that `vfio-pci` has for a while. They go back to the host when this is dropped; close the device before.
#[derive(Debug)]
pub struct Loan<'a, K: Kernel> {
    binder: &'a Binder<K>,
    lent: Vec<Lent>,
}

impl<K: Kernel> Loan<'_, K> {
    /// Whether anything had to be bound at all.
    pub fn is_needed(&self) -> bool {
        !self.lent.is_empty()
    }
}

impl<K: Kernel> Drop for Loan<'_, K> {
    fn drop(&mut self) {
        self.lent.iter().rev().for_each(|lent| self.binder.restore(&lent.function));
        self.binder.give_back_controls(&self.lent);
    }
}

fn control_path(function: &HostFunction) -> PathBuf {
    function.dir.join("power/control")
}

fn control(function: &HostFunction) -> Option<String> {
    Some(fs::read_to_string(control_path(function)).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests;
