//! Where the backend is: a socket that it listens at, or one that it connects to.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::error::VhostUserError;

/// How long a backend that has just been started may take until it listens.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// How long one that is to connect may take.
const ACCEPT_PATIENCE: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(50);

/// Who listens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// The backend.
    #[default]
    Client,
    /// This process.
    Server,
}

/// The way to a backend.
#[derive(Debug)]
pub(super) struct Peer {
    socket: PathBuf,
    listener: Option<UnixListener>,
}

impl Peer {
    /// At `socket`, which is created if this process is to listen.
    pub(super) fn new(socket: &Path, mode: Mode) -> Result<Self, VhostUserError> {
        let listen = |source| VhostUserError::Listen { socket: socket.into(), source };
        let listener = match mode {
            Mode::Client => None,
            Mode::Server => Some(bind_anew(socket).map_err(listen)?),
        };
        Ok(Self { socket: socket.into(), listener })
    }

    /// The socket.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Readable when a backend has come.
    pub(super) fn listener(&self) -> Option<&UnixListener> {
        self.listener.as_ref()
    }

    /// Waits for a connection as long as a start may take; `wanted` ends it early.
    pub(super) fn wait(&self, mut wanted: impl FnMut() -> bool) -> Result<UnixStream, VhostUserError> {
        let limit = if self.listener.is_some() { ACCEPT_PATIENCE } else { CONNECT_PATIENCE };
        let deadline = Instant::now() + limit;
        loop {
            match self.try_once() {
                Err(e) if may_come(&e) && Instant::now() < deadline && wanted() => self.rest(),
                Err(e) => return Err(self.failure(e, limit)),
                Ok(stream) => return Ok(stream),
            }
        }
    }

    /// A connection, if there can be one now.
    pub(super) fn try_once(&self) -> io::Result<UnixStream> {
        let stream = match &self.listener {
            Some(listener) => listener.accept()?.0,
            None => connect(&self.socket)?,
        };
        stream.set_nonblocking(false)?;
        Ok(stream)
    }

    fn rest(&self) {
        match &self.listener {
            Some(listener) => {
                let mut fds = [PollFd::new(listener, PollFlags::IN)];
                let limit = rustix::time::Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
                let _ = poll(&mut fds, Some(&limit));
            }
            None => thread::sleep(RETRY),
        }
    }

    fn failure(&self, source: io::Error, limit: Duration) -> VhostUserError {
        let socket = self.socket.clone();
        match self.listener {
            Some(_) if source.kind() == io::ErrorKind::WouldBlock => VhostUserError::Alone { socket, limit },
            Some(_) => VhostUserError::Listen { socket, source },
            None => VhostUserError::Connect { socket, source },
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if self.listener.is_some() {
            let _ = std::fs::remove_file(&self.socket);
        }
    }
}

/// Whether it is worth to try again.
fn may_come(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, Interrupted, NotFound, WouldBlock};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | Interrupted | NotFound | WouldBlock)
}

/// Connects without waiting: a listener whose queue is full would keep the caller for as long as it likes.
fn connect(socket: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&fd, &SocketAddrUnix::new(socket)?)?;
    Ok(fd.into())
}

/// Listens at `socket`. One that a process has left behind is replaced; one where somebody listens is not.
fn bind_anew(socket: &Path) -> io::Result<UnixListener> {
    let listener = match UnixListener::bind(socket) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            let is_socket = std::fs::symlink_metadata(socket)?.file_type().is_socket();
            let refused =
                || matches!(connect(socket), Err(e) if e.kind() == io::ErrorKind::ConnectionRefused);
            if !is_socket || !refused() {
                return Err(e);
            }
            std::fs::remove_file(socket)?;
            UnixListener::bind(socket)?
        }
        other => other?,
    };
    listener.set_nonblocking(true)?;
    Ok(listener)
}
