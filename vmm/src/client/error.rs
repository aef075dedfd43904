//! Why a VMM did not do what it was asked to do: which one, the cause, and the remedy.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::http::{Reply, Request};
use crate::remedy::remedy;

/// A request that failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is no such socket.
    #[error(
        "{}: there is no such socket; start the VMM with --api-socket {}, or name the one that it was started with",
        .0.display(), .0.display()
    )]
    NoSocket(PathBuf),
    /// The socket is left over.
    #[error("{}: nobody listens any more: the VMM has ended; remove this socket, or start the VMM again", .0.display())]
    Refused(PathBuf),
    /// Not for this user.
    #[error(
        "{}: permission denied; run this as the user who runs the VMM, or as root", .0.display()
    )]
    Denied(PathBuf),
    /// A path that no socket can have (unix(7)).
    #[error("{}: a socket's path has at most 107 bytes; use a shorter one, or a relative one", .0.display())]
    LongName(PathBuf),
    /// No connection, or it broke.
    #[error("{}: {call} failed: {cause}; {}", socket.display(), remedy(cause))]
    Io {
        /// The socket.
        socket: PathBuf,
        /// What was asked for.
        call: String,
        /// The kernel's answer.
        cause: io::Error,
    },
    /// No reply.
    #[error(
        "{}: no reply to {call} within {} s: the VMM hangs or is busy; see its log",
        socket.display(), timeout.as_secs_f32()
    )]
    TimedOut {
        /// The socket.
        socket: PathBuf,
        /// What was asked for.
        call: String,
        /// How long it was waited for.
        timeout: Duration,
    },
    /// The connection ended in the middle of the reply.
    #[error("{}: the VMM closed the connection before its reply to {call} was complete; see its log", socket.display())]
    Closed {
        /// The socket.
        socket: PathBuf,
        /// What was asked for.
        call: String,
    },
    /// Something that is no reply.
    #[error("{}: the reply to {call} cannot be read: {what}; is this the socket of a VMM?", socket.display())]
    Malformed {
        /// The socket.
        socket: PathBuf,
        /// What was asked for.
        call: String,
        /// What is wrong with it.
        what: String,
    },
    /// The VMM's own answer.
    #[error("{}: {call}: {}{}", socket.display(), explanation(*status, chain), advice(*status, chain))]
    Api {
        /// The socket.
        socket: PathBuf,
        /// What was asked for.
        call: String,
        /// HTTP's status code.
        status: u16,
        /// The VMM's error and its causes, outermost first.
        chain: Vec<String>,
    },
}

impl ClientError {
    pub(super) fn from_io(
        cause: io::Error,
        socket: &Path,
        request: &Request,
        timeout: Option<Duration>,
    ) -> Self {
        let socket = socket.to_owned();
        let call = request.call().to_owned();
        match (cause.kind(), timeout) {
            (io::ErrorKind::NotFound, _) => Self::NoSocket(socket),
            (io::ErrorKind::ConnectionRefused, _) => Self::Refused(socket),
            (io::ErrorKind::PermissionDenied, _) => Self::Denied(socket),
            (io::ErrorKind::InvalidFilename, _) => Self::LongName(socket),
            (io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock, Some(timeout)) => {
                Self::TimedOut { socket, call, timeout }
            }
            (io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe, _) => Self::Closed { socket, call },
            _ => Self::Io { socket, call, cause },
        }
    }

    pub(super) fn closed(socket: &Path, request: &Request) -> Self {
        Self::Closed { socket: socket.to_owned(), call: request.call().to_owned() }
    }

    pub(super) fn malformed(socket: &Path, request: &Request, what: String) -> Self {
        Self::Malformed { socket: socket.to_owned(), call: request.call().to_owned(), what }
    }

    /// Whether the VMM knows the call and has nothing that it could be about: there is no VM yet.
    pub fn is_about_nothing(&self) -> bool {
        matches!(self, Self::Api { status: 404, chain, .. } if *chain != ["Not Found"])
    }

    /// What a reply that is no success says. A body of another form than the API's is kept as one link.
    pub(super) fn api(socket: &Path, request: &Request, reply: &Reply) -> Self {
        let chain = serde_json::from_slice(&reply.body).unwrap_or_else(|_| {
            let text = reply.text();
            let text = text.trim();
            if text.is_empty() { Vec::new() } else { vec![text.to_owned()] }
        });
        Self::Api { socket: socket.to_owned(), call: request.call().to_owned(), status: reply.status, chain }
    }
}

/// The chain, outermost first; a link that its predecessor has said already is left out.
fn explanation(status: u16, chain: &[String]) -> String {
    let mut text = String::new();
    for link in chain.iter().filter(|link| !link.is_empty()) {
        if text.is_empty() {
            text.clone_from(link);
        } else if !text.contains(link.as_str()) {
            text = format!("{text}: {link}");
        }
    }
    let text = text.replace('\n', " ");
    if text.is_empty() { format!("refused with status {status}") } else { text }
}

/// A remedy where the status alone tells one: these answers come from the server, not from what was called.
fn advice(status: u16, chain: &[String]) -> &'static str {
    let alone = |text: &str| chain.len() == 1 && chain[0] == text;
    match status {
        404 if alone("Not Found") => {
            "; this VMM has no such call: it is another version, or not Dormouse, or this is its read-only status socket"
        }
        400 if alone("Bad Request") || chain.is_empty() => {
            "; this VMM does not take such a request: compare its version with that of this program"
        }
        429 => "; try again in a moment",
        403 => "; this is a read-only socket: use the one given by --api-socket",
        _ => "",
    }
}
