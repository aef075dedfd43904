//! The hardware seam: VFIO's three low-power features of one function (`include/uapi/linux/vfio.h`:
//! `VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY`, `_ENTRY_WITH_WAKEUP`, `_EXIT`).

use std::fmt::Debug;
use std::io;

use vmm_sys_util::eventfd::EventFd;

/// Which of the low-power features the host's driver has for a function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Support {
    /// `VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY`.
    pub entry: bool,
    /// `VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP`.
    pub entry_with_wakeup: bool,
    /// `VFIO_DEVICE_FEATURE_LOW_POWER_EXIT`.
    pub exit: bool,
}

impl Support {
    /// All three features, as Linux has them from 6.1 on.
    pub const FULL: Self = Self { entry: true, entry_with_wakeup: true, exit: true };

    /// Whether a function can be put in low power, woken by the host and brought back.
    pub fn is_full(self) -> bool {
        self == Self::FULL
    }
}

/// Asking for the features failed for another reason than their absence.
#[derive(Debug, thiserror::Error)]
#[error("cannot ask the host for the low-power features; see the host's kernel log for the device's state")]
pub struct ProbeError(#[source] pub io::Error);

/// The host refused to let a function sleep.
#[derive(Debug, thiserror::Error)]
pub enum EnterError {
    /// `-EINVAL`: as far as the kernel knows the function is in low power already.
    #[error("the host says the function is in low power already")]
    Engaged,
    /// `-ENOTTY`: the kernel or the function's VFIO driver lacks the feature.
    #[error("the host's VFIO driver has no low-power support; it needs Linux 6.1 or newer")]
    Unsupported,
    /// Anything else; `-EIO` when the function could not be resumed to take the call.
    #[error("the host refused low power; see its kernel log for the device's state")]
    Refused(#[source] io::Error),
    /// No eventfd could be made or watched for the wakeup.
    #[error("no eventfd for the wakeup; raise the limit on open files (ulimit -n)")]
    EventFd(#[source] io::Error),
}

/// The host could not take a function out of low power.
///
/// The kernel reports success for many a device that did not come back: see [`crate::FunctionGate::settle`].
#[derive(Debug, thiserror::Error)]
#[error("the host could not end low power; see its kernel log for the device's state")]
pub struct ExitError(#[source] pub io::Error);

/// Low power of one function.
///
/// All three calls resume the device on the host first and may block for as long as that takes (seconds). They are made by
/// the domain's worker thread only, except [`probe`](Self::probe), which belongs before boot.
pub trait LowPower: Debug + Send + Sync {
    /// Which features the host has.
    fn probe(&self) -> Result<Support, ProbeError>;

    /// Allows the host to suspend the function.
    ///
    /// With `wake`, the first resume for any reason signals the eventfd and ends low power. Without, the host resumes and
    /// suspends the function as it likes and tells nobody. Success says nothing about the power state reached.
    fn enter(&self, wake: Option<&EventFd>) -> Result<(), EnterError>;

    /// Ends low power and resumes the function. Does no harm when it is not in low power.
    fn exit(&self) -> Result<(), ExitError>;
}
