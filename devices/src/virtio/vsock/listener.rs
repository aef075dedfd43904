//! The Unix sockets on the host: the one that clients come to, and those of servers that the guest asks for.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use log::debug;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// The socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// Somebody listens there.
    #[error("--vsock socket={}: another program listens on this socket; end it, or choose another path", .0.display())]
    InUse(PathBuf),
    /// Something else is there.
    #[error("--vsock socket={}: there is something that is no socket; remove it, or choose another path", .0.display())]
    NoSocket(PathBuf),
    /// The operating system refuses.
    #[error("--vsock socket={}: cannot listen there: {source}; check the directory and its permissions, and that the path has no more than 96 bytes", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The longest path to which a port's number can be added: `sun_path` has 108 bytes with the zero at its end.
const PATH_MAX: usize = 96;

/// The listening socket. Its path goes when this does.
#[derive(Debug)]
pub struct HostSocket {
    /// The socket.
    pub listener: UnixListener,
    path: PathBuf,
    /// Device and inode: what is there in the end may be somebody else's.
    identity: Option<(u64, u64)>,
}

impl HostSocket {
    /// Listens at `path`, in the place of a socket that a dead process left.
    ///
    /// # Errors
    /// See [`VsockError`].
    pub fn bind(path: &Path) -> Result<Self, VsockError> {
        let open = |source| VsockError::Open { path: path.into(), source };
        if path.as_os_str().len() > PATH_MAX {
            return Err(open(io::ErrorKind::InvalidFilename.into()));
        }
        if let Ok(there) = path.symlink_metadata() {
            if !there.file_type().is_socket() {
                return Err(VsockError::NoSocket(path.into()));
            }
            match connect_to(path) {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(open)?;
                }
                // A listener whose queue is full would have one wait: it is alive too.
                _ => return Err(VsockError::InUse(path.into())),
            }
        }
        let listener = UnixListener::bind(path).map_err(|e| match e.kind() {
            io::ErrorKind::AddrInUse => VsockError::InUse(path.into()),
            _ => open(e),
        })?;
        listener.set_nonblocking(true).map_err(open)?;
        let identity = fs::symlink_metadata(path).ok().map(|there| (there.dev(), there.ino()));
        Ok(Self { listener, path: path.into(), identity })
    }

    /// Connects to the server that the guest's `port` of the host stands for.
    ///
    /// # Errors
    /// There is none, or it has more clients waiting than it takes.
    pub fn connect_to_port(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.as_os_str().to_owned();
        path.push(format!("_{port}"));
        connect_to(Path::new(&path))
    }
}

impl Drop for HostSocket {
    fn drop(&mut self) {
        let there = fs::symlink_metadata(&self.path).ok().map(|there| (there.dev(), there.ino()));
        if there.is_some()
            && there == self.identity
            && let Err(e) = fs::remove_file(&self.path)
        {
            debug!("{} is left behind: {e}", self.path.display());
        }
    }
}

/// A connection that blocks neither now nor later.
fn connect_to(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}
