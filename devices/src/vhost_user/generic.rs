//! A device of any type behind a backend: what type it is and what queues it has is said by the operator, all else by the backend.

use std::path::Path;

use super::device::{ConfigSource, Description, VhostUser};
use super::error::VhostUserError;
use super::peer::Mode;
use crate::virtio::device::{DeviceType, F_RINGS};

/// Features of device types (VIRTIO 1.2, section 2.2).
const DEVICE_FEATURES: u64 = 0x00ff_ffff | 0x3fff << 50;
/// Configurations of device types, from long to short. Backends refuse to read beyond theirs.
const SIZES: &[u32] = &[256, 136, 128, 96, 72, 64, 60, 56, 48, 44, 40, 36, 32, 24, 20, 16, 12, 8, 4];

/// A device of type `device_type` with queues of these sizes.
///
/// # Errors
/// See [`VhostUserError`].
pub fn new(
    name: &str,
    device_type: DeviceType,
    socket: &Path,
    queue_sizes: Vec<u16>,
) -> Result<VhostUser, VhostUserError> {
    VhostUser::new(Description {
        name: name.to_owned(),
        device_type,
        certain_queues: if device_type == DeviceType::NET { 2 } else { 1 },
        queue_sizes,
        rings: None,
        socket: socket.into(),
        mode: Mode::Client,
        passed: F_RINGS | DEVICE_FEATURES,
        own: 0,
        config: ConfigSource::IfAny { sizes: SIZES },
        resumes: false,
        control_queue: false,
    })
}
