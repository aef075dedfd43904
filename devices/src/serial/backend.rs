//! Where the bytes of a serial port or debug console go to and come from: nothing, the terminal, a file, a pseudoterminal or a Unix socket.
//!
//! A backend outlives the machine: a guest reboot builds a new [`Serial`](super::Serial) over the same backend, so the path
//! of a pseudoterminal stays, a client stays connected, and no input is lost.
//!
//! All descriptors are watched edge-triggered (epoll(7)): a hang-up or a writable descriptor is reported once and cannot make
//! the event loop spin, and stopping to read while the guest's FIFO is full needs no change to the watch list.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::output::Output;
use super::stream::{Direction, Stream};
use super::terminal;

/// Token of the descriptor read from.
pub(super) const INPUT: u32 = 1;
/// Token of the descriptor written to.
pub(super) const OUTPUT: u32 = 2;
/// Token of the timer of the output window.
pub(super) const WINDOW: u32 = 3;
/// Token of the listening socket.
pub(super) const LISTENER: u32 = 4;

/// What a serial port is connected to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum SerialMode {
    /// There is no serial port.
    Off,
    /// Output is dropped, and there is no input.
    #[default]
    Null,
    /// Standard input and output.
    Tty,
    /// Output to a file, truncated when opened; no input.
    File(PathBuf),
    /// A new pseudoterminal.
    Pty,
    /// A listening Unix stream socket with one client at a time.
    Socket(PathBuf),
}

/// A serial port could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The output file cannot be opened.
    #[error("cannot open '{path}' for the guest's output; check the directory and its permissions")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Standard input or output cannot be used.
    #[error("cannot use standard input and output for the guest; choose another mode, such as file=PATH")]
    Terminal(#[source] io::Error),
    /// No pseudoterminal.
    #[error(
        "cannot make a pseudoterminal for the guest's serial port or console; check that /dev/pts is mounted"
    )]
    Pty(#[source] io::Error),
    /// The socket cannot be made.
    #[error(
        "cannot listen on '{path}' for the serial port; check the directory, or remove the file if nobody uses it"
    )]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No timer.
    #[error("cannot make a timer for the guest's output; raise the limit on open files (ulimit -n)")]
    Timer(#[source] io::Error),
}

/// What there was to read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// So many bytes.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// Nothing any more, until somebody connects.
    Closed,
}

#[derive(Debug)]
struct Input {
    source: Option<Stream>,
    /// Bytes read that the guest's FIFO did not take.
    unread: VecDeque<u8>,
}

#[derive(Debug)]
struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

/// One end of the cable whose other end is the guest's serial port.
///
/// Lock order: the UART of a [`Serial`](super::Serial) before `output`; `input` and `output` never together.
#[derive(Debug)]
pub struct Backend {
    input: Mutex<Input>,
    output: Mutex<Output>,
    listener: Option<Listener>,
    pty: Option<PathBuf>,
    /// Keeps the pseudoterminal from hanging up while no program has it open.
    _slave: Option<OwnedFd>,
    raw_terminal: bool,
}

impl Backend {
    /// Opens what `mode` names; nothing for [`SerialMode::Off`].
    ///
    /// # Errors
    /// The file, terminal, pseudoterminal or socket cannot be opened.
    pub fn open(mode: &SerialMode) -> Result<Option<Arc<Self>>, BackendError> {
        let backend = match mode {
            SerialMode::Off => return Ok(None),
            SerialMode::Null => Self::new("nothing", None, None, false)?,
            SerialMode::Tty => Self::open_terminal()?,
            SerialMode::File(path) => Self::open_file(path)?,
            SerialMode::Pty => Self::open_pty()?,
            SerialMode::Socket(path) => Self::open_socket(path)?,
        };
        Ok(Some(Arc::new(backend)))
    }

    /// As [`Self::open`], for a device without input: standard input is left alone.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn open_output(mode: &SerialMode) -> Result<Option<Arc<Self>>, BackendError> {
        use std::os::fd::AsFd;
        if *mode != SerialMode::Tty {
            return Self::open(mode);
        }
        let stdout = io::stdout();
        let sink = Stream::shared(stdout.as_fd(), Direction::Output).map_err(BackendError::Terminal)?;
        Ok(Some(Arc::new(Self::new("standard output", None, Some(sink), true)?)))
    }

    /// A backend over descriptors of the caller's, made non-blocking.
    ///
    /// # Errors
    /// A descriptor cannot be made non-blocking, or there is no timer.
    pub fn from_descriptors(
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
    ) -> Result<Arc<Self>, BackendError> {
        let own = |fd: Option<OwnedFd>| fd.map(Stream::owned).transpose().map_err(BackendError::Terminal);
        Ok(Arc::new(Self::new("a descriptor", own(input)?, own(output)?, true)?))
    }

    /// The path of the pseudoterminal to open at the other end.
    pub fn pty_path(&self) -> Option<&Path> {
        self.pty.as_deref()
    }

    /// Writes out what is still queued, as far as the reader takes it. To be called before the process ends.
    pub fn flush(&self) {
        self.output().drain();
    }

    fn new(
        name: &str,
        source: Option<Stream>,
        sink: Option<Stream>,
        patient: bool,
    ) -> Result<Self, BackendError> {
        let output = Output::new(name.to_owned(), sink, patient).map_err(BackendError::Timer)?;
        Ok(Self {
            input: Mutex::new(Input { source, unread: VecDeque::new() }),
            output: Mutex::new(output),
            listener: None,
            pty: None,
            _slave: None,
            raw_terminal: false,
        })
    }

    fn open_terminal() -> Result<Self, BackendError> {
        use std::os::fd::AsFd;
        let (stdin, stdout) = (io::stdin(), io::stdout());
        let source = Stream::shared(stdin.as_fd(), Direction::Input).map_err(BackendError::Terminal)?;
        let sink = Stream::shared(stdout.as_fd(), Direction::Output).map_err(BackendError::Terminal)?;
        let mut backend = Self::new("standard output", Some(source), Some(sink), true)?;
        backend.raw_terminal = terminal::make_raw(stdin.as_fd()).map_err(BackendError::Terminal)?;
        Ok(backend)
    }

    fn open_file(path: &Path) -> Result<Self, BackendError> {
        let error = |source| BackendError::File { path: path.to_owned(), source };
        // Non-blocking: opening a FIFO that nobody reads fails at once instead of waiting for a reader.
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(error)?;
        let sink = Stream::owned(file.into()).map_err(error)?;
        Self::new(&format!("'{}'", path.display()), None, Some(sink), true)
    }

    fn open_pty() -> Result<Self, BackendError> {
        let open = || -> io::Result<(Stream, Stream, OwnedFd, PathBuf)> {
            let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
            let master = openpt(flags)?;
            grantpt(&master)?;
            unlockpt(&master)?;
            let slave = ioctl_tiocgptpeer(&master, flags)?;
            // Without this the line discipline would echo the guest's output back to it as input.
            let mut modes = tcgetattr(&slave)?;
            modes.make_raw();
            tcsetattr(&slave, OptionalActions::Now, &modes)?;
            let path = PathBuf::from(OsStr::from_bytes(ptsname(&master, Vec::new())?.as_bytes()));
            let sink = Stream::owned(master)?;
            Ok((sink.try_clone()?, sink, slave, path))
        };
        let (source, sink, slave, path) = open().map_err(BackendError::Pty)?;
        // A pseudoterminal that nobody has opened is the normal case, not worth a vCPU's wait.
        let mut backend = Self::new(&path.display().to_string(), Some(source), Some(sink), false)?;
        backend.pty = Some(path);
        backend._slave = Some(slave);
        Ok(backend)
    }

    fn open_socket(path: &Path) -> Result<Self, BackendError> {
        let error = |source| BackendError::Socket { path: path.to_owned(), source };
        let socket = match UnixListener::bind(path) {
            Err(busy) if busy.kind() == io::ErrorKind::AddrInUse && is_stale_socket(path) => {
                std::fs::remove_file(path).map_err(error)?;
                UnixListener::bind(path).map_err(error)?
            }
            result => result.map_err(error)?,
        };
        socket.set_nonblocking(true).map_err(error)?;
        let mut backend = Self::new(&format!("the client of '{}'", path.display()), None, None, true)?;
        backend.listener = Some(Listener { socket, path: path.to_owned() });
        Ok(backend)
    }

    fn input(&self) -> MutexGuard<'_, Input> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn output(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts every descriptor on the watch list of the event loop.
    pub(super) fn watch(&self, ops: &mut EventOps<'_>) {
        watch(ops, self.output().timer_fd(), WINDOW, EventSet::IN);
        if let Some(listener) = &self.listener {
            watch(ops, listener.socket.as_raw_fd(), LISTENER, EventSet::IN);
        }
        self.watch_streams(ops);
    }

    fn watch_streams(&self, ops: &mut EventOps<'_>) {
        if let Some(source) = &self.input().source {
            watch(
                ops,
                source.as_raw_fd(),
                INPUT,
                EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED,
            );
        }
        if let Some(fd) = self.output().sink_fd() {
            watch(ops, fd, OUTPUT, EventSet::OUT | EventSet::EDGE_TRIGGERED);
        }
    }

    /// Reads at most `buffer.len()` bytes of input.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> Received {
        let mut input = self.input();
        if !input.unread.is_empty() {
            let count = buffer.len().min(input.unread.len());
            for (place, byte) in buffer.iter_mut().zip(input.unread.drain(..count)) {
                *place = byte;
            }
            return Received::Bytes(count);
        }
        let Some(source) = &input.source else { return Received::Nothing };
        match source.read(buffer) {
            Ok(0) => Received::Closed,
            Ok(count) => Received::Bytes(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Received::Nothing,
            Err(_) => Received::Closed,
        }
    }

    /// Gives back bytes that found no room; they come first next time.
    pub(super) fn unread(&self, bytes: &[u8]) {
        let mut input = self.input();
        for byte in bytes.iter().rev() {
            input.unread.push_front(*byte);
        }
    }

    /// Takes the input off the watch list for good, and with it the client of a socket.
    pub(super) fn hang_up(&self, ops: &mut EventOps<'_>) {
        if let Some(source) = self.input().source.take() {
            unwatch(ops, source.as_raw_fd());
        }
        if self.listener.is_some() {
            let mut output = self.output();
            if let Some(fd) = output.sink_fd() {
                unwatch(ops, fd);
            }
            output.connect(None);
        }
    }

    /// Accepts whoever has connected; the newest client replaces the one before, which may be a dead one.
    pub(super) fn accept(&self, ops: &mut EventOps<'_>) {
        let Some(listener) = &self.listener else { return };
        loop {
            match listener.socket.accept() {
                Ok((client, _)) => {
                    self.hang_up(ops);
                    if let Err(error) = self.connect(client) {
                        log::warn!(
                            "serial port: cannot serve the client of '{}': {error}",
                            listener.path.display()
                        );
                    }
                    self.watch_streams(ops);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        log::warn!("serial port: cannot accept on '{}': {error}", listener.path.display());
                        // A listener that fails stays readable; without this the event loop would spin.
                        if error.kind() != io::ErrorKind::ConnectionAborted {
                            unwatch(ops, listener.socket.as_raw_fd());
                        }
                    }
                    return;
                }
            }
        }
    }

    fn connect(&self, client: UnixStream) -> io::Result<()> {
        let source = Stream::owned(client.into())?;
        let sink = source.try_clone()?;
        self.input().source = Some(source);
        self.output().connect(Some(sink));
        Ok(())
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.flush();
        if let Some(listener) = &self.listener {
            // The socket's name is ours; a failure leaves a stale name, which the next start recognises.
            let _ = std::fs::remove_file(&listener.path);
        }
        if self.raw_terminal {
            terminal::restore();
        }
    }
}

/// Whether `path` is a socket on which nobody listens.
fn is_stale_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
        && UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

fn watch(ops: &mut EventOps<'_>, fd: i32, token: u32, set: EventSet) {
    if let Err(error) = ops.add(Events::with_data_raw(fd, token, set)) {
        // Regular files and some devices cannot be watched, and need not be: they are always ready.
        log::debug!("serial port: descriptor {fd} is not watched: {error}");
    }
}

fn unwatch(ops: &mut EventOps<'_>, fd: i32) {
    if let Err(error) = ops.remove(Events::empty_raw(fd)) {
        log::debug!("serial port: descriptor {fd} was not watched: {error}");
    }
}
