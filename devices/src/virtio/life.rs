//! News of a device's time at work (VIRTIO 1.2, section 2.1): from the driver's DRIVER_OK to its reset.

use std::fmt::Debug;

/// Who is told. Called from vCPU threads with the device locked, as often as the guest likes: must not wait, and must not trust that this is seldom.
pub trait LifeSink: Debug + Send + Sync {
    /// The driver is ready, and the device has begun.
    fn activated(&self);

    /// The driver has reset the device, and what was active has stopped.
    fn reset(&self);
}
