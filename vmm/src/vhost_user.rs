//! The machine's devices that vhost-user backends are, made from the configuration.

use std::path::Path;
use std::sync::Arc;

use devices::vhost_user::{
    Mode, VhostUser, VhostUserError, block, fs as file_system, generic as any, net as network,
};
use devices::virtio::device::DeviceType;

use crate::config::{DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, VhostMode};
use crate::emulated::{EmulatedError, Model};

/// Connects to the backend of a file system.
///
/// # Errors
/// See [`VhostUserError`].
pub fn fs(id: &str, config: &FsConfig) -> Result<Model, EmulatedError> {
    let FsConfig { tag, socket, num_queues, queue_size, .. } = config;
    model(id, file_system::new(id, tag, socket, *num_queues, *queue_size))
}

/// Connects to the backend of a disk.
///
/// # Errors
/// See [`VhostUserError`].
pub fn disk(id: &str, config: &DiskConfig) -> Result<Model, EmulatedError> {
    let socket = config.vhost_socket.as_deref().unwrap_or_default();
    model(id, block::new(id, Path::new(socket), config.num_queues, config.queue_size))
}

/// Connects to the backend of a network device, or waits for it.
///
/// # Errors
/// See [`VhostUserError`].
pub fn net(id: &str, config: &NetConfig) -> Result<Model, EmulatedError> {
    let settings = network::NetSettings {
        socket: config.vhost_socket.clone().unwrap_or_default().into(),
        mode: match config.vhost_mode {
            VhostMode::Client => Mode::Client,
            VhostMode::Server => Mode::Server,
        },
        mac: config.mac.0,
        mtu: config.mtu,
        num_queues: config.pairs() * 2,
        queue_size: config.queue_size,
        tso: config.offload_tso,
        ufo: config.offload_ufo,
        csum: config.offload_csum,
    };
    model(id, network::new(id, &settings))
}

/// Connects to the backend of a device of any type.
///
/// # Errors
/// See [`VhostUserError`].
pub fn generic(id: &str, config: &GenericVhostUserConfig) -> Result<Model, EmulatedError> {
    let device_type = DeviceType(config.virtio_type().unwrap_or_default());
    model(id, any::new(id, device_type, &config.socket, config.queue_sizes.clone()))
}

fn model(id: &str, device: Result<VhostUser, VhostUserError>) -> Result<Model, EmulatedError> {
    match device {
        Ok(device) => Ok(Model::Virtio(Arc::new(device))),
        Err(source) => Err(EmulatedError::VhostUser { id: id.to_owned(), source }),
    }
}
