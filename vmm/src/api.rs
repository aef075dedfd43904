//! The REST API: Cloud Hypervisor's, on a Unix socket, with the power of devices as an addition.
//!
//! Reading never waits: it is answered by the connection's own thread from [`Status`]. What changes something
//! goes to the main thread as an [`Order`](crate::orders::Order), one after the other, so that `vmm.ping` is answered while a machine boots.

mod http;
mod info;
mod metrics;
mod power;
mod routes;
mod server;

use std::sync::Arc;
use std::time::Instant;

use crate::orders::Orders;
use crate::status::Status;

pub use server::serve;

/// What a listening socket offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Everything.
    Full,
    /// What reads: nothing can be changed and no device woken.
    ReadOnly,
    /// `/metrics` alone.
    Metrics,
}

/// What the API's threads share.
#[derive(Debug)]
pub struct Api {
    /// What may be known.
    pub status: Arc<Status>,
    /// Where orders go.
    pub orders: Arc<Orders>,
    /// When the VMM started.
    pub start: Instant,
}
