//! virtio devices that another process is: a backend at the far end of a Unix socket (QEMU's Vhost-user Protocol, `docs/interop/vhost-user.rst`).
//!
//! [`VhostUser`] is the device as the transport sees it. Everything that the backend is asked goes through a `keeper` thread, one for each device,
//! so that nobody else waits for a process that may hang, die, or mean harm:
//!
//! ```text
//! vCPU, main thread -> VhostUser, its duty -> mail -> keeper -> Link (crate vhost) -> backend
//! guest's doorbell ----------------------- eventfd ---------------------------------^  |
//! guest's interrupt <--------------------- irqfd --------------------------------------+
//! ```
//!
//! Data goes between guest and backend alone. The backend maps all of the guest's memory, so it can do to the guest what it likes; to this process
//! it can do no more than not to answer.

pub mod block;
mod config_space;
mod control_queue;
mod deputy;
mod device;
mod error;
pub mod fs;
pub mod generic;
mod keeper;
mod link;
pub mod net;
mod notices;
mod peer;
#[cfg(test)]
mod tests;

pub use device::{ConfigSource, Description, VhostUser};
pub use error::VhostUserError;
pub use peer::Mode;
