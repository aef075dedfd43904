//! Network devices from their configuration: the tap is opened here, and stays open over reboots of the guest.

use devices::net::device::{Net, NetSpec, OffloadChoice, VhostUse};
use devices::net::tap::{Tap, TapError, TapRequest};
use devices::net::vhost::VhostError;
use log::info;

use crate::client::DescriptorError;
use crate::config::{NetConfig, VhostChoice};

/// A network device that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetUnitError {
    /// Its tap.
    #[error("network device {id}: {source}")]
    Tap {
        /// Its name.
        id: String,
        /// Why.
        source: TapError,
    },
    /// A descriptor of its tap.
    #[error("network device {id}: {source}")]
    Descriptor {
        /// Its name.
        id: String,
        /// Why.
        source: DescriptorError,
    },
    /// The host's kernel is to move the packets.
    #[error("network device {id}: {source}")]
    Vhost {
        /// Its name.
        id: String,
        /// Why not.
        source: VhostError,
    },
}

/// Makes the device called `id`.
///
/// # Errors
/// See [`NetUnitError`].
pub fn make_net(id: &str, config: &NetConfig) -> Result<Net, NetUnitError> {
    let descriptors = match &config.fds {
        Some(fds) => fds.open().map_err(|source| NetUnitError::Descriptor { id: id.to_owned(), source })?,
        None => Vec::new(),
    };
    let request = TapRequest {
        name: config.tap.clone(),
        descriptors,
        pairs: config.pairs(),
        ip: config.ip,
        mask: config.mask,
        mac: config.host_mac.map(|mac| mac.0),
        mtu: config.mtu,
    };
    let tap = Tap::open(&request).map_err(|source| NetUnitError::Tap { id: id.to_owned(), source })?;
    info!("network device {id}: the tap is {}, the guest's address {}", tap.name(), config.mac);
    let spec = NetSpec {
        name: id.to_owned(),
        mac: config.mac.0,
        queue_size: config.queue_size,
        offloads: OffloadChoice {
            tso: config.offload_tso,
            ufo: config.offload_ufo,
            csum: config.offload_csum,
        },
        limit: config.rate_limiter_config.unwrap_or_default().rate_limit(),
        vhost: match config.vhost {
            VhostChoice::Off => VhostUse::Never,
            VhostChoice::On => VhostUse::Always,
            VhostChoice::Auto => VhostUse::IfPossible,
        },
    };
    Net::new(spec, tap).map_err(|source| NetUnitError::Vhost { id: id.to_owned(), source })
}
