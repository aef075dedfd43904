//! A shared file system (VIRTIO 1.2, section 5.11) behind a backend such as virtiofsd.

use std::path::Path;

use super::device::{ConfigSource, Description, VhostUser};
use super::error::VhostUserError;
use super::peer::Mode;
use crate::virtio::device::{DeviceType, F_RINGS};

/// The longest name of a file system in bytes.
pub const TAG_MAX: usize = 36;

/// A file system that the guest mounts as `tag`, with `num_queues` for requests and one more for those that go first.
///
/// # Errors
/// See [`VhostUserError`].
pub fn new(
    name: &str,
    tag: &str,
    socket: &Path,
    num_queues: u16,
    queue_size: u16,
) -> Result<VhostUser, VhostUserError> {
    let mut config = vec![0; TAG_MAX];
    config.iter_mut().zip(tag.bytes()).for_each(|(there, byte)| *there = byte);
    config.extend_from_slice(&u32::from(num_queues).to_le_bytes());
    VhostUser::new(Description {
        name: name.to_owned(),
        device_type: DeviceType::FS,
        queue_sizes: vec![queue_size; usize::from(num_queues) + 1],
        rings: None,
        certain_queues: 1,
        socket: socket.into(),
        mode: Mode::Client,
        passed: F_RINGS,
        own: 0,
        config: ConfigSource::Own(config),
        resumes: false,
        control_queue: false,
    })
}
