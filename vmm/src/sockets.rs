//! The sockets and files that the VMM is watched and driven through: made, taken over, and put away again.
//!
//! A path is locked by a file beside it for as long as the VMM lives, so that two VMMs never share one; what a dead one left
//! there is replaced. Only its owner can connect. A descriptor is whoever's that gave it.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use log::debug;
use rustix::fs::{FlockOperation, Mode, flock};
use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::net::sockopt::{socket_acceptconn, socket_domain};
use rustix::process::umask;

use crate::config::Endpoint;
use crate::remedy::remedy;

/// A socket or file that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another VMM uses it.
    #[error("{option} {}: another VMM uses this socket (its lock is {}.lock); end it, or choose another path", path.display(), path.display())]
    InUse {
        /// The option.
        option: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// Something else is there.
    #[error("{option} {}: there is something that is no socket; remove it, or choose another path", path.display())]
    NoSocket {
        /// The option.
        option: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// The operating system refuses.
    #[error("{option} {}: cannot be opened: {source}; {}", path.display(), remedy(source))]
    Open {
        /// The option.
        option: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A descriptor that is not open.
    #[error(
        "{option} fd={descriptor}: this descriptor is not open; whoever starts the VMM has to open it, and not close it on exec"
    )]
    NotOpen {
        /// The option.
        option: &'static str,
        /// Its number.
        descriptor: i32,
    },
    /// A descriptor of the wrong kind.
    #[error(
        "{option} fd={descriptor}: this is no listening Unix stream socket; bind it and call listen(2) before the VMM starts"
    )]
    NotListening {
        /// The option.
        option: &'static str,
        /// Its number.
        descriptor: i32,
    },
}

/// A listening socket. A path that was made goes when this does.
#[derive(Debug)]
pub struct Listener {
    /// The socket.
    pub socket: UnixListener,
    made: Option<Made>,
}

#[derive(Debug)]
struct Made {
    path: PathBuf,
    _lock: Option<File>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(Made { path, .. }) = &self.made
            && let Err(e) = std::fs::remove_file(path)
        {
            debug!("{} is left behind: {e}", path.display());
        }
    }
}

impl Listener {
    /// A second handle on the socket, for the thread that accepts.
    pub fn accepting(&self) -> io::Result<UnixListener> {
        self.socket.try_clone()
    }

    /// As an option says. Called while there is one thread only: the mask of file modes is the whole process's.
    pub fn open(option: &'static str, endpoint: &Endpoint) -> Result<Self, SocketError> {
        match endpoint {
            Endpoint::Path(path) => Self::bind(option, path),
            Endpoint::Descriptor(number) => {
                let descriptor = take_descriptor(option, *number)?;
                let listens = socket_domain(&descriptor) == Ok(rustix::net::AddressFamily::UNIX)
                    && socket_acceptconn(&descriptor) == Ok(true);
                if !listens {
                    return Err(SocketError::NotListening { option, descriptor: *number });
                }
                let socket = UnixListener::from(descriptor);
                // A thread of its own waits here.
                let open = |source| SocketError::Open { option, path: format!("fd={number}").into(), source };
                socket.set_nonblocking(false).map_err(open)?;
                Ok(Self { socket, made: None })
            }
        }
    }

    fn bind(option: &'static str, path: &Path) -> Result<Self, SocketError> {
        let open = |source| SocketError::Open { option, path: path.to_owned(), source };
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(open)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(SocketError::InUse { option, path: path.to_owned() });
            }
            Err(e) => return Err(open(e.into())),
        }
        let socket = bind_anew(path).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => SocketError::NoSocket { option, path: path.to_owned() },
            _ => open(source),
        })?;
        Ok(Self { socket, made: Some(Made { path: path.to_owned(), _lock: Some(lock) }) })
    }

    /// The status socket that every VMM has, for those who look for VMMs: named after the process, in a directory of the user's own.
    pub fn status() -> io::Result<Self> {
        let directory = status_directory().ok_or(io::ErrorKind::NotFound)?;
        match DirBuilder::new().mode(0o700).create(&directory) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        sweep(&directory);
        let path = directory.join(format!("{}.sock", std::process::id()));
        let socket = bind_anew(&path)?;
        Ok(Self { socket, made: Some(Made { path, _lock: None }) })
    }
}

/// Where status sockets are: in the system's directory for root, in the user's own for others.
pub fn status_directory() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Some("/run/dormouse".into());
    }
    let own = std::env::var_os("XDG_RUNTIME_DIR").filter(|own| !own.is_empty())?;
    Some(Path::new(&own).join("dormouse"))
}

/// Removes what VMMs have left that were killed: no process has the number and nobody answers. (The number alone does not tell where
/// processes of several PID namespaces share the directory.)
fn sweep(directory: &Path) {
    for entry in directory.read_dir().into_iter().flatten().flatten() {
        let path = entry.path();
        let number =
            path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<u32>().ok());
        let Some(number) = number.filter(|_| path.extension().is_some_and(|extension| extension == "sock"))
        else {
            continue;
        };
        let refused =
            || UnixStream::connect(&path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
        if !Path::new("/proc").join(number.to_string()).exists()
            && refused()
            && let Err(e) = std::fs::remove_file(&path)
        {
            debug!("{} is left from a VMM that was killed: {e}", path.display());
        }
    }
}

/// Binds a socket that only its owner can connect to, in the place of one that a dead process left.
fn bind_anew(path: &Path) -> io::Result<UnixListener> {
    if let Ok(there) = path.symlink_metadata() {
        if !there.file_type().is_socket() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        std::fs::remove_file(path)?;
    }
    let before = umask(Mode::RWXG | Mode::RWXO);
    let socket = UnixListener::bind(path);
    umask(before);
    let socket = socket?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))?;
    Ok(socket)
}

/// A file or pipe to write to, as an option says. A pipe is waited for until somebody reads from it.
pub fn open_output(option: &'static str, endpoint: &Endpoint) -> Result<File, SocketError> {
    match endpoint {
        Endpoint::Descriptor(number) => Ok(take_descriptor(option, *number)?.into()),
        Endpoint::Path(path) => OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)
            .map_err(|source| SocketError::Open { option, path: path.clone(), source }),
    }
}

/// Takes over an inherited descriptor. Each is named by one option only, and the standard streams are not for that.
#[allow(unsafe_code)] // An inherited descriptor is nothing but a number.
fn take_descriptor(option: &'static str, number: i32) -> Result<OwnedFd, SocketError> {
    use std::sync::Mutex;
    static TAKEN: Mutex<Vec<i32>> = Mutex::new(Vec::new());
    let mut taken = TAKEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let not_open = || SocketError::NotOpen { option, descriptor: number };
    if number <= 2 || taken.contains(&number) {
        return Err(not_open());
    }
    // SAFETY: the call takes any number.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(not_open());
    }
    taken.push(number);
    // SAFETY: it is open, and nothing else here owns it: options are read before the VMM opens files of its own, and none names it twice.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    if let Ok(flags) = fcntl_getfd(descriptor.as_fd()) {
        // Nothing that the VMM starts is to have it. If that fails there is no harm: the VMM starts nothing.
        let _ = fcntl_setfd(descriptor.as_fd(), flags | FdFlags::CLOEXEC);
    }
    Ok(descriptor)
}

#[cfg(test)]
mod tests;
