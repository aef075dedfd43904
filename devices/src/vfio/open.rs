//! Opening host functions: the IOMMU context that all functions of one guest share (group and container, or
//! iommufd), and the handle of one opened function.
//!
//! Follows `Documentation/driver-api/vfio.rst` of the Linux kernel: a container has no IOMMU, and so takes no
//! DMA map, before its first group joined; an iommufd has its address space from the start.

use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use iommufd_ioctls::IommuFd;
use log::warn;
use pci::Bdf;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_NORESIZE, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_READ,
};
use vfio_ioctls::{
    VfioContainer, VfioDevice, VfioDeviceFd, VfioError, VfioIommufd, VfioOps, VfioRegionInfoCap,
};
use vmm_sys_util::eventfd::EventFd;

/// Why a host function could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The IOMMU context could not be made.
    #[error("cannot open {node}: {cause}; {remedy}")]
    Context {
        /// The device node.
        node: &'static str,
        /// What to do about it.
        remedy: &'static str,
        /// What the kernel said.
        cause: String,
    },
    /// The function could not be opened.
    #[error("device {bdf}: cannot be opened through VFIO: {cause}{hint}")]
    Device {
        /// Host address.
        bdf: Bdf,
        /// What the kernel said.
        cause: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// Config space cannot be read.
    #[error(
        "device {bdf}: its configuration space does not answer ({cause}); the device is gone or stuck: try \
         'echo 1 > /sys/bus/pci/devices/{bdf}/reset', or remove and rescan it"
    )]
    Dead {
        /// Host address.
        bdf: Bdf,
        /// What was read, or the errno.
        cause: String,
    },
}

/// The IOMMU context of one guest. Every function of the guest joins it, and guest RAM is mapped into it once.
pub struct IommuContext {
    ops: Arc<dyn VfioOps>,
    kind: ContextKind,
}

/// How functions join the context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContextKind {
    /// `/dev/vfio/vfio` and `/dev/vfio/GROUP`.
    Container,
    /// `/dev/iommu` and `/dev/vfio/devices/vfioN` (Linux 6.6 and later, `CONFIG_VFIO_DEVICE_CDEV`).
    Iommufd,
}

impl fmt::Debug for IommuContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IommuContext").field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl IommuContext {
    /// Makes the context. `kvm` is KVM's VFIO device: the kernel then knows which guest the groups belong to.
    pub fn new(kind: ContextKind, kvm: Option<Arc<VfioDeviceFd>>) -> Result<Self, OpenError> {
        let ops: Arc<dyn VfioOps> = match kind {
            ContextKind::Container => Arc::new(VfioContainer::new(kvm).map_err(|e| OpenError::Context {
                node: "/dev/vfio/vfio",
                remedy: "load the module with 'modprobe vfio-pci', and run as a user who may open it",
                cause: cause(&e),
            })?),
            ContextKind::Iommufd => {
                let context_error = |cause: String| OpenError::Context {
                    node: "/dev/iommu",
                    remedy: "load the module with 'modprobe iommufd' (Linux 6.6 or newer, with VFIO device files), or \
                             leave out iommufd=on",
                    cause,
                };
                let iommufd = IommuFd::new().map_err(|e| match e {
                    iommufd_ioctls::IommufdError::OpenIommufd(e) => context_error(e.to_string()),
                    e => context_error(e.to_string()),
                })?;
                Arc::new(
                    VfioIommufd::new(Arc::new(iommufd), None, kvm)
                        .map_err(|e| context_error(e.to_string()))?,
                )
            }
        };
        Ok(Self { ops, kind })
    }

    pub(super) fn ops(&self) -> &dyn VfioOps {
        self.ops.as_ref()
    }

    /// Opens a function, which the user calls `id`. The kernel wakes it and resets it here.
    pub fn open(&self, bdf: Bdf, sysfs: &Path, id: Option<&str>) -> Result<Arc<Handle>, OpenError> {
        let device = VfioDevice::new(sysfs, Arc::clone(&self.ops), true).map_err(|e| OpenError::Device {
            bdf,
            cause: cause(&e),
            hint: hint(&e),
        })?;
        let config_offset = device.get_region_offset(VFIO_PCI_CONFIG_REGION_INDEX);
        let config_size = device.get_region_size(VFIO_PCI_CONFIG_REGION_INDEX);
        let handle = Handle {
            bdf,
            name: name(bdf, id),
            sysfs: sysfs.to_owned(),
            device: ManuallyDrop::new(device),
            config_offset,
            config_size,
            release: OnceLock::new(),
        };
        let mut identity = [0xff; 4];
        handle.config_read(0, &mut identity).map_err(|e| OpenError::Dead { bdf, cause: e.to_string() })?;
        if identity == [0xff; 4] {
            return Err(OpenError::Dead { bdf, cause: "all ones".to_owned() });
        }
        Ok(Arc::new(handle))
    }
}

/// What log lines call a function: its host address, and the name that the user has given it.
pub fn name(bdf: Bdf, id: Option<&str>) -> String {
    id.map_or_else(|| bdf.to_string(), |id| format!("{bdf} ({id})"))
}

/// The error and its inner causes on one line.
fn cause(error: &VfioError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        source = inner.source();
    }
    text
}

fn hint(error: &VfioError) -> &'static str {
    match error {
        VfioError::OpenGroup(e, _) if e.raw_os_error() == Some(libc::EBUSY) => {
            "; another process holds its IOMMU group: stop the other VM first"
        }
        VfioError::OpenGroup(e, _) if e.kind() == io::ErrorKind::PermissionDenied => {
            "; run as root or give this user access to the group's node under /dev/vfio"
        }
        VfioError::OpenDeviceCdev(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            "; run as root or give this user access to the device's file under /dev/vfio/devices"
        }
        // The kernel says EINVAL of a file that is open already, and EBUSY of a group that is.
        VfioError::VfioDeviceBindIommufd(e) if matches!(e.errno(), libc::EBUSY | libc::EINVAL) => {
            "; another process may hold it: stop the other VM first"
        }
        VfioError::GroupViable => "; bind every device of its IOMMU group with 'dormouse bind'",
        _ => "; the host's kernel log (dmesg) may say more",
    }
}

/// A BAR, ROM or other region as the kernel describes it.
#[derive(Clone, Debug, Default)]
pub struct Region {
    /// Bytes; 0 when the function has no such region.
    pub size: u64,
    /// Offset in the device file.
    pub offset: u64,
    /// The kernel lets the process read it.
    pub readable: bool,
    /// Parts that may be mapped, as `(offset, size)` within the region. Empty: trapped access only.
    pub mappable: Vec<(u64, u64)>,
}

/// One opened function. The last reference to go closes the file and leaves the group.
pub struct Handle {
    bdf: Bdf,
    name: String,
    sysfs: PathBuf,
    device: ManuallyDrop<VfioDevice>,
    config_offset: u64,
    config_size: u64,
    /// Fired, and never read, once the host has wanted the function back.
    release: OnceLock<Arc<EventFd>>,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("bdf", &self.bdf).finish_non_exhaustive()
    }
}

impl Handle {
    /// Host address.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// What log lines call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its directory in the host's sysfs.
    pub fn sysfs(&self) -> &Path {
        &self.sysfs
    }

    /// Remembers the eventfd by which the host asks for the function.
    pub(super) fn watch_release(&self, release: Arc<EventFd>) {
        let _ = self.release.set(release);
    }

    /// Whether the host wants the function back.
    fn is_wanted_back(&self) -> bool {
        self.release.get().is_some_and(|release| release.read().is_ok())
    }

    /// Bytes of configuration space: 256 or 4096.
    pub fn config_size(&self) -> u64 {
        self.config_size
    }

    pub(super) fn device(&self) -> &VfioDevice {
        &self.device
    }

    /// Reads configuration space. Wakes the function when it sleeps.
    pub fn config_read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        read_full(self.as_fd(), self.config_offset + offset, data)
    }

    /// Writes configuration space. Wakes the function when it sleeps.
    pub fn config_write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        write_full(self.as_fd(), self.config_offset + offset, data)
    }

    /// Reads from a region. Wakes the function when it sleeps.
    pub fn region_read(&self, region: &Region, offset: u64, data: &mut [u8]) -> io::Result<()> {
        read_full(self.as_fd(), region.offset + offset, data)
    }

    /// Writes to a region. Wakes the function when it sleeps.
    pub fn region_write(&self, region: &Region, offset: u64, data: &[u8]) -> io::Result<()> {
        write_full(self.as_fd(), region.offset + offset, data)
    }

    /// Describes a region: 0 to 5 the BARs, 6 the expansion ROM.
    pub fn region(&self, index: u32) -> Region {
        let size = self.device.get_region_size(index);
        let flags = self.device.get_region_flags(index);
        let mut mappable = Vec::new();
        if size > 0 && flags & VFIO_REGION_INFO_FLAG_MMAP != 0 {
            for cap in self.device.get_region_caps(index) {
                if let VfioRegionInfoCap::SparseMmap(sparse) = cap {
                    mappable.extend(sparse.areas.iter().map(|area| (area.offset, area.size)));
                }
            }
            if mappable.is_empty() {
                mappable.push((0, size));
            }
        }
        Region {
            size,
            offset: self.device.get_region_offset(index),
            readable: flags & VFIO_REGION_INFO_FLAG_READ != 0,
            mappable,
        }
    }

    /// How many vectors the interrupt index has, and whether that many must be given at once.
    pub fn irq_count(&self, index: u32) -> (u32, bool) {
        self.device
            .get_irq_info(index)
            .map_or((0, true), |info| (info.count, info.flags & VFIO_IRQ_INFO_NORESIZE != 0))
    }

    /// Resets the function (`VFIO_DEVICE_RESET`) where it can be reset alone. Wakes it.
    pub fn reset(&self) {
        self.device.reset();
    }
}

impl AsRawFd for Handle {
    fn as_raw_fd(&self) -> RawFd {
        self.device.as_raw_fd()
    }
}

impl AsFd for Handle {
    #[allow(unsafe_code)] // `VfioDevice` only gives its descriptor out as a number.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self.device`, which the returned borrow keeps alive.
        unsafe { BorrowedFd::borrow_raw(self.device.as_raw_fd()) }
    }
}

impl Drop for Handle {
    #[allow(unsafe_code)] // see below
    fn drop(&mut self) {
        // The crate closes the device, looks its IOMMU group up in sysfs once more, and panics where it finds none. A host that waits
        // for the device to remove it does so between the two. Then only the file is closed here, which is what the host waits for;
        // the group's is left to the process's end.
        if self.is_wanted_back() || !self.sysfs.join("iommu_group").exists() {
            // SAFETY: `self.device` owns the descriptor, and is neither used nor dropped after this.
            drop(unsafe { OwnedFd::from_raw_fd(self.device.as_raw_fd()) });
            warn!("device {}: given back to the host, which has asked for it", self.name);
        } else {
            // SAFETY: dropped here once, and `self` is not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.device) }
        }
    }
}

fn read_full(fd: BorrowedFd<'_>, mut offset: u64, mut data: &mut [u8]) -> io::Result<()> {
    while !data.is_empty() {
        match rustix::io::pread(fd, &mut *data, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                data = &mut data[n..];
                offset += n as u64;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn write_full(fd: BorrowedFd<'_>, mut offset: u64, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        match rustix::io::pwrite(fd, data, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                data = &data[n..];
                offset += n as u64;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_is_called_by_its_address_and_the_users_name() {
        let bdf: Bdf = "0000:01:00.0".parse().unwrap();
        assert_eq!(name(bdf, None), "0000:01:00.0");
        assert_eq!(name(bdf, Some("gpu")), "0000:01:00.0 (gpu)");
    }
}
