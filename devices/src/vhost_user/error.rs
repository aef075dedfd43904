//! What goes wrong with a backend, and what the operator can do about it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a backend cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// Nobody listens.
    #[error(
        "cannot connect to the vhost-user socket {}: {source}; start the backend first, and let it listen at that path",
        socket.display()
    )]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The socket cannot be made.
    #[error(
        "cannot listen at the vhost-user socket {}: {source}; choose a path in a directory that exists and can be written, where no other program listens",
        socket.display()
    )]
    Listen {
        /// The socket.
        socket: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Nobody has come.
    #[error(
        "no backend has connected to the vhost-user socket {} in {} s; start one that connects to it, or write vhost_mode=client if the backend listens",
        socket.display(), limit.as_secs()
    )]
    Alone {
        /// The socket.
        socket: PathBuf,
        /// How long was waited.
        limit: Duration,
    },
    /// A request failed.
    #[error("the vhost-user backend does not do what it should ({what}): {source}; see its own messages")]
    Request {
        /// What was asked.
        what: &'static str,
        /// What came.
        source: vhost::Error,
    },
    /// What came is no answer.
    #[error("the vhost-user backend does not do what it should ({what}): {source}; see its own messages")]
    Answer {
        /// What was asked.
        what: &'static str,
        /// What came.
        source: io::Error,
    },
    /// No answer.
    #[error("the vhost-user backend did not answer in {} s ({what}); it hangs, or is overloaded", limit.as_secs())]
    Silent {
        /// What was asked.
        what: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// It is gone.
    #[error("the vhost-user backend at {} has gone", socket.display())]
    Gone {
        /// The socket.
        socket: PathBuf,
    },
    /// It is another kind of device.
    #[error(
        "the vhost-user backend refuses to tell the device's configuration (GET_CONFIG); is it one for this kind of device?"
    )]
    Config,
    /// It speaks an old protocol only.
    #[error("the vhost-user backend has no {0}, without which the device cannot work; use a newer one")]
    Lacks(&'static str),
    /// Too few queues.
    #[error(
        "the vhost-user backend has {there} queues and the device is to have {wanted}; lower num_queues, or give the backend more"
    )]
    Queues {
        /// What it has.
        there: u64,
        /// What it is to have.
        wanted: usize,
    },
    /// It came back as another one.
    #[error(
        "the vhost-user backend has come back without features that the guest relies on ({0:#x}); start it as it was started before"
    )]
    Changed(u64),
    /// Memory that cannot be shown to the backend.
    #[error("guest memory at {0:#x} cannot be shared with a vhost-user backend; add shared=on to --memory")]
    NotShared(u64),
    /// More memory than it takes.
    #[error(
        "guest memory has {wanted} parts and the vhost-user backend takes {there}; use fewer memory zones, or another backend"
    )]
    Slots {
        /// Parts there are.
        wanted: usize,
        /// Parts it takes.
        there: u64,
    },
    /// A ring that is not in memory.
    #[error("queue {0} is not in the guest's memory")]
    Ring(u16),
    /// The host.
    #[error("{what}: {source}; close what else is open on the host, or raise its limits")]
    Host {
        /// What failed.
        what: &'static str,
        /// How.
        source: io::Error,
    },
}

impl VhostUserError {
    /// For `map_err`: a request failed.
    pub(super) fn request(what: &'static str) -> impl FnOnce(vhost::Error) -> Self {
        move |source| Self::Request { what, source }
    }

    /// For `map_err`: something on the host failed.
    pub(super) fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}
