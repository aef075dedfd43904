//! Disks of the machine, made from the configuration: the image is opened and locked, limits are found that disks share.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use devices::block::{Disk, DiskError, DiskSpec};
use devices::rate_limit::Limiter;
use devices::virtio::block::{Block, BlockOptions};

use crate::config::{DiskConfig, VmConfig};
use crate::emulated::{Model, Unit};

/// A disk, whatever machine it is in.
#[derive(Debug)]
pub struct DiskUnit {
    /// The device.
    pub block: Arc<Block>,
    /// The limit that it shares, by name.
    group: Option<(String, Arc<Limiter>)>,
}

/// Limits that disks share: one bucket for all disks of a group, whenever they come.
#[derive(Debug)]
pub struct Groups(BTreeMap<String, Arc<Limiter>>);

impl Groups {
    /// Those of the configuration; what disks that are there already use is the same.
    pub fn new(config: &VmConfig, present: &[Unit]) -> Self {
        let now = Instant::now();
        let configured = config.rate_limit_groups.iter().flatten().filter_map(|group| {
            let limiter = Limiter::new(&group.rate_limiter_config.rate_limit(), now)?;
            Some((group.id.clone(), Arc::new(limiter)))
        });
        let mut groups: BTreeMap<_, _> = configured.collect();
        groups.extend(present.iter().filter_map(|unit| match &unit.model {
            Model::Disk(disk) => disk.group.clone(),
            Model::Virtio(_) | Model::PvPanic | Model::Pmem(_) | Model::Mem => None,
        }));
        Self(groups)
    }
}

/// Opens a disk.
///
/// # Errors
/// Its image cannot be used.
pub fn make_disk(id: &str, config: &DiskConfig, groups: &Groups) -> Result<DiskUnit, DiskError> {
    let spec = DiskSpec {
        path: config.path.clone().unwrap_or_default(),
        readonly: config.readonly,
        direct: config.direct,
        image_type: config.image_type,
        backing_files: config.backing_files,
        sparse: config.sparse,
        granularity: config.lock_granularity,
    };
    let disk = Disk::open(&spec)?;
    let group = config.rate_limit_group.as_ref().and_then(|name| groups.0.get_key_value(name));
    let group = group.map(|(name, limiter)| (name.clone(), Arc::clone(limiter)));
    let own = || {
        let limits = config.rate_limiter_config.as_ref()?.rate_limit();
        Limiter::new(&limits, Instant::now()).map(Arc::new)
    };
    let limiter = group.as_ref().map(|(_, limiter)| Arc::clone(limiter)).or_else(own);
    let affinity = config.queue_affinity.iter().flatten();
    let options = BlockOptions {
        num_queues: config.num_queues,
        queue_size: config.queue_size,
        affinity: affinity.map(|queue| (queue.queue_index, queue.host_cpus.clone())).collect(),
        serial: config.serial.clone(),
        limiter,
        disable_io_uring: config.disable_io_uring,
    };
    Ok(DiskUnit { block: Arc::new(Block::new(id, disk, options)), group })
}
