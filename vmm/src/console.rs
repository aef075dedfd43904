//! The paravirtual console as the configuration asks for it, and the signal by which a terminal says that its size has changed.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use devices::serial::{Backend, BackendError, SerialMode};
use devices::virtio::console::Console;
use log::warn;

use crate::config::VirtioConsoleConfig;

/// A console that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleUnitError {
    /// Its other end.
    #[error("--console: {0}")]
    Backend(#[from] BackendError),
    /// It was to be off.
    #[error("--console: there is none; this is a defect, please report it")]
    Off,
}

/// Makes the device called `id`.
///
/// # Errors
/// Its other end cannot be had.
pub fn make_console(id: &str, config: &VirtioConsoleConfig) -> Result<Console, ConsoleUnitError> {
    let mode = config.target.serial_mode();
    let backend = Backend::open(&mode)?.ok_or(ConsoleUnitError::Off)?;
    let resized = if mode == SerialMode::Tty && backend.window().is_some() {
        window_changes().inspect_err(|e| warn!("the guest does not hear of the terminal's size: {e}")).ok()
    } else {
        None
    };
    Ok(Console::new(id, backend, resized))
}

/// What becomes readable at SIGWINCH. The signal is taken over once in the life of the process.
fn window_changes() -> io::Result<UnixStream> {
    static PIPE: Mutex<Option<UnixStream>> = Mutex::new(None);
    let mut pipe = PIPE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pipe) = &*pipe {
        return pipe.try_clone();
    }
    let (read, write) = UnixStream::pair()?;
    read.set_nonblocking(true)?;
    signal_hook::low_level::pipe::register(libc::SIGWINCH, write)?;
    let copy = read.try_clone()?;
    *pipe = Some(read);
    Ok(copy)
}
