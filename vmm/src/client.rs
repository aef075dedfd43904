//! A small blocking client of the HTTP API that a VMM serves on a Unix socket: one request, one connection, one deadline.
//!
//! It speaks to Dormouse and to Cloud Hypervisor (v1 API, `/api/v1/`). The framing is HTTP/1.1 (RFC 9112) as those two use it: status lines
//! without a reason, bodies by `Content-Length`, errors as a JSON array of strings. File descriptors go with the request (unix(7), `SCM_RIGHTS`).

mod descriptor;
mod error;
#[cfg(test)]
pub mod fixture;
mod http;
#[cfg(test)]
pub mod peer;
pub mod report;
#[cfg(test)]
mod tests;

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};

pub use descriptor::{DescriptorError, own};
pub use error::ClientError;
pub use http::{Method, Reply, Request};

/// Most descriptors that the kernel takes with one message (`SCM_MAX_FD`).
const FDS_MAX: usize = 253;
/// How much is read at a time.
const CHUNK: usize = 16 << 10;

/// A VMM, by its socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    timeout: Option<Duration>,
    end: Option<Instant>,
}

impl Client {
    /// The VMM behind `socket`. A whole request may take `timeout`, and for ever without one.
    pub fn new(socket: impl Into<PathBuf>, timeout: Option<Duration>) -> Self {
        Self { socket: socket.into(), timeout, end: None }
    }

    /// The VMM behind `socket`. All requests together may take `timeout`, from now on.
    pub fn for_all(socket: impl Into<PathBuf>, timeout: Duration) -> Self {
        Self { socket: socket.into(), timeout: Some(timeout), end: Some(Instant::now() + timeout) }
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks for a call of the v1 API that only reads, such as `vm.info`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn get(&self, call: &str) -> Result<Reply, ClientError> {
        self.send(&Request::api_get(call), &[])
    }

    /// Sends a request with descriptors, all in one message, and waits for the reply. A status that is no success is an error.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn send(&self, request: &Request, fds: &[OwnedFd]) -> Result<Reply, ClientError> {
        let deadline = Deadline(self.end.or_else(|| Some(Instant::now() + self.timeout?)));
        let failed = |error| ClientError::from_io(error, &self.socket, request, self.timeout);
        let mut stream = self.connect(deadline).map_err(failed)?;
        let reply = match transmit(&stream, &request.bytes(), fds, deadline) {
            Ok(()) => self.receive(&mut stream, request, deadline)?,
            // A server that refuses a request may answer before it has taken all of it: the answer says more than the broken pipe.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) =>
            {
                self.receive(&mut stream, request, deadline).map_err(|_| failed(error))?
            }
            Err(error) => return Err(failed(error)),
        };
        if reply.is_success() { Ok(reply) } else { Err(ClientError::api(&self.socket, request, &reply)) }
    }

    /// The error for a reply to `call` that is no JSON, or other JSON than it should be.
    pub fn not_understood(&self, call: &str, error: &serde_json::Error) -> ClientError {
        ClientError::malformed(&self.socket, &Request::api_get(call), error.to_string())
    }

    fn connect(&self, deadline: Deadline) -> io::Result<UnixStream> {
        let address = SocketAddrUnix::new(&self.socket)?;
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // A full queue of connections makes connect(2) wait, for as long as sending may take.
        set_socket_timeout(&socket, Timeout::Send, deadline.left()?)?;
        rustix::net::connect(&socket, &address)?;
        Ok(UnixStream::from(socket))
    }

    /// The first reply that is not provisional (RFC 9110, section 15.2).
    fn receive(
        &self,
        stream: &mut UnixStream,
        request: &Request,
        deadline: Deadline,
    ) -> Result<Reply, ClientError> {
        let failed = |error| ClientError::from_io(error, &self.socket, request, self.timeout);
        let malformed = |what| ClientError::malformed(&self.socket, request, what);
        let mut parser = http::Parser::default();
        let mut buffer = vec![0; CHUNK];
        loop {
            if let Some(reply) = parser.reply().map_err(malformed)? {
                return Ok(reply);
            }
            set_socket_timeout(&*stream, Timeout::Recv, deadline.left().map_err(failed)?)
                .map_err(|error| failed(error.into()))?;
            match stream.read(&mut buffer) {
                Ok(0) => {
                    return match parser.end().map_err(malformed)? {
                        Some(reply) => Ok(reply),
                        None => Err(ClientError::closed(&self.socket, request)),
                    };
                }
                Ok(count) => parser.add(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        }
    }
}

/// The end of a request's time.
#[derive(Clone, Copy, Debug)]
struct Deadline(Option<Instant>);

impl Deadline {
    /// What is left of it, for a socket's timeout; `None` is for ever.
    fn left(self) -> io::Result<Option<Duration>> {
        let Some(end) = self.0 else { return Ok(None) };
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

/// Sends all of `bytes`, and the descriptors with the first of them.
fn transmit(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd], deadline: Deadline) -> io::Result<()> {
    if fds.len() > FDS_MAX {
        let text = format!("{} file descriptors; one request takes {FDS_MAX} at most", fds.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut rest = bytes;
    while !rest.is_empty() {
        set_socket_timeout(stream, Timeout::Send, deadline.left()?)?;
        match rustix::net::sendmsg(stream, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL) {
            Ok(count) => {
                rest = &rest[count..];
                control.clear();
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
