#![allow(unsafe_code)] // The kernel's interface is an ioctl on the device's descriptor, which no crate wraps for these features.
//! `VFIO_DEVICE_FEATURE` for the low-power features (`include/uapi/linux/vfio.h`): the crate's only unsafe code.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP,
    VFIO_DEVICE_FEATURE_LOW_POWER_EXIT, VFIO_DEVICE_FEATURE_PROBE, VFIO_DEVICE_FEATURE_SET, VFIO_TYPE,
};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_io_nr;

use crate::low_power::{EnterError, ExitError, LowPower, ProbeError, Support};

/// The macro makes an undocumented public function; here it stays private.
mod request {
    use super::{VFIO_BASE, VFIO_TYPE, ioctl_io_nr};

    ioctl_io_nr!(VFIO_DEVICE_FEATURE, VFIO_TYPE as u32, VFIO_BASE + 17);
}
use request::VFIO_DEVICE_FEATURE;

/// `struct vfio_device_feature` without data.
#[repr(C)]
#[derive(Debug)]
struct Feature {
    argsz: u32,
    flags: u32,
}

/// `struct vfio_device_feature` with `struct vfio_device_low_power_entry_with_wakeup` as its data.
#[repr(C)]
#[derive(Debug)]
struct FeatureWithWakeup {
    argsz: u32,
    flags: u32,
    wakeup_eventfd: i32,
    reserved: u32,
}

const FEATURE_SIZE: u32 = 8;
const FEATURE_WITH_WAKEUP_SIZE: u32 = 16;
const _: () = assert!(size_of::<Feature>() == FEATURE_SIZE as usize);
const _: () = assert!(size_of::<FeatureWithWakeup>() == FEATURE_WITH_WAKEUP_SIZE as usize);

/// Low power of one function through its VFIO device descriptor.
pub struct VfioLowPower<F> {
    device: Arc<F>,
}

impl<F> fmt::Debug for VfioLowPower<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VfioLowPower").finish_non_exhaustive()
    }
}

impl<F: AsRawFd> VfioLowPower<F> {
    /// For the function whose VFIO device descriptor `device` owns.
    pub fn new(device: Arc<F>) -> Self {
        Self { device }
    }

    fn feature(&self, flags: u32) -> io::Result<()> {
        let feature = Feature { argsz: FEATURE_SIZE, flags };
        // SAFETY: `feature` is a whole `struct vfio_device_feature`, its size is in `argsz`, and the kernel only reads it.
        let result = unsafe { ioctl_with_ref(self.device.as_ref(), VFIO_DEVICE_FEATURE(), &feature) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn feature_with_wakeup(&self, wake: &EventFd) -> io::Result<()> {
        let feature = FeatureWithWakeup {
            argsz: FEATURE_WITH_WAKEUP_SIZE,
            flags: VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP,
            wakeup_eventfd: wake.as_raw_fd(),
            reserved: 0,
        };
        // SAFETY: `feature` is a `struct vfio_device_feature` followed by the data of this feature, the size of both is in `argsz`,
        // and the kernel only reads it; it takes a reference of its own on the eventfd.
        let result = unsafe { ioctl_with_ref(self.device.as_ref(), VFIO_DEVICE_FEATURE(), &feature) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn has(&self, feature: u32) -> Result<bool, ProbeError> {
        match self.feature(VFIO_DEVICE_FEATURE_PROBE | VFIO_DEVICE_FEATURE_SET | feature) {
            Ok(()) => Ok(true),
            // ENOTTY: not this feature; EINVAL: not for SET.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => Ok(false),
            Err(error) => Err(ProbeError(error)),
        }
    }
}

impl<F: AsRawFd + Send + Sync> LowPower for VfioLowPower<F> {
    fn probe(&self) -> Result<Support, ProbeError> {
        Ok(Support {
            entry: self.has(VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY)?,
            entry_with_wakeup: self.has(VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP)?,
            exit: self.has(VFIO_DEVICE_FEATURE_LOW_POWER_EXIT)?,
        })
    }

    fn enter(&self, wake: Option<&EventFd>) -> Result<(), EnterError> {
        let result = match wake {
            Some(wake) => self.feature_with_wakeup(wake),
            None => self.feature(VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY),
        };
        result.map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => EnterError::Engaged,
            Some(libc::ENOTTY) => EnterError::Unsupported,
            _ => EnterError::Refused(error),
        })
    }

    fn exit(&self) -> Result<(), ExitError> {
        self.feature(VFIO_DEVICE_FEATURE_SET | VFIO_DEVICE_FEATURE_LOW_POWER_EXIT).map_err(ExitError)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn the_request_number_and_features_are_the_kernels() {
        assert_eq!(VFIO_DEVICE_FEATURE(), 0x3b75);
        assert_eq!(VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, 3);
        assert_eq!(VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP, 4);
        assert_eq!(VFIO_DEVICE_FEATURE_LOW_POWER_EXIT, 5);
    }

    #[test]
    fn a_descriptor_without_the_features_probes_as_having_none_and_refuses_entry() {
        let device = VfioLowPower::new(Arc::new(File::open("/dev/null").unwrap()));
        assert_eq!(device.probe().unwrap(), Support::default());
        let eventfd = EventFd::new(0).unwrap();
        assert!(matches!(device.enter(Some(&eventfd)), Err(EnterError::Unsupported)));
        assert!(matches!(device.enter(None), Err(EnterError::Unsupported)));
        assert_eq!(device.exit().unwrap_err().0.raw_os_error(), Some(libc::ENOTTY));
    }
}
