//! A disk (VIRTIO 1.2, section 5.2) behind a backend such as qemu-storage-daemon.

use std::path::Path;

use super::device::{ConfigSource, Description, VhostUser};
use super::error::VhostUserError;
use super::peer::Mode;
use crate::virtio::device::{DeviceType, F_RINGS};

/// VIRTIO_BLK_F_MQ.
const F_MQ: u64 = 1 << 12;
/// SIZE_MAX, SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES, LIFETIME, SECURE_ERASE.
const PASSED: u64 =
    1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | F_MQ | 0xf << 13;
/// With the fields of secure erase, and without.
const SIZES: &[u32] = &[72, 60];

/// A disk with `num_queues` queues.
///
/// # Errors
/// See [`VhostUserError`].
pub fn new(name: &str, socket: &Path, num_queues: u16, queue_size: u16) -> Result<VhostUser, VhostUserError> {
    let several = num_queues > 1;
    VhostUser::new(Description {
        name: name.to_owned(),
        device_type: DeviceType::BLOCK,
        queue_sizes: vec![queue_size; usize::from(num_queues)],
        rings: None,
        certain_queues: 1,
        socket: socket.into(),
        mode: Mode::Client,
        passed: F_RINGS | if several { PASSED } else { PASSED & !F_MQ },
        own: 0,
        config: ConfigSource::Backend { sizes: SIZES, queues: Some((QUEUES_AT, num_queues)) },
        resumes: false,
        control_queue: false,
    })
}

/// Where the configuration has the number of queues.
const QUEUES_AT: usize = 34;
