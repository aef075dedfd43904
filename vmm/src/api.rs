//! The REST API: Cloud Hypervisor's, on a Unix socket, with the power of devices as an addition.
//!
//! Reading never waits: it is answered by the connection's own thread from [`Status`]. What changes something
//! goes to the main thread as an [`Order`](crate::orders::Order), one after the other, so that `vmm.ping` is answered while a machine boots.

mod http;
mod info;
mod metrics;
#[cfg(test)]
mod openapi;
mod power;
mod routes;
mod server;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::orders::Orders;
use crate::status::Status;

pub use server::serve;

/// How long the VMM waits at its end for clients to take their answers.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

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
    /// Requests that are being answered.
    pub answering: Answering,
}

impl Api {
    /// With nobody connected yet.
    pub fn new(status: Arc<Status>, orders: Arc<Orders>, start: Instant) -> Self {
        Self { status, orders, start, answering: Answering::default() }
    }

    /// Waits until who has asked for the VMM's end, and whoever else has asked for something, has been sent the answer. Without this
    /// the process would be gone before its threads get to send it. Not for long: a client need not read.
    pub fn send_last_answers(&self) {
        let count = self.answering.count.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.answering.changed.wait_timeout_while(count, LAST_ANSWERS, |count| *count > 0);
        if waited.is_ok_and(|(count, _)| *count > 0) {
            log::debug!("a client of the API does not read its answer");
        }
    }
}

/// Counts requests from their arrival until the answer is sent.
#[derive(Debug, Default)]
pub struct Answering {
    count: Mutex<usize>,
    changed: Condvar,
}

impl Answering {
    /// One more, until what is returned is dropped.
    fn one(&self) -> impl Drop {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        OneRequest(self)
    }
}

struct OneRequest<'a>(&'a Answering);

impl Drop for OneRequest<'_> {
    fn drop(&mut self) {
        *self.0.count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.changed.notify_all();
    }
}
