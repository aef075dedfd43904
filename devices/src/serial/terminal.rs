//! The user's terminal in raw mode, and back (termios(3)).
//!
//! In raw mode every key, Ctrl-C included, goes to the guest. Output processing stays as it was, so that messages of ours on
//! the same terminal still start at the left edge.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Mutex, Once};

use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr};

struct Saved {
    terminal: OwnedFd,
    modes: Termios,
}

static SAVED: Mutex<Option<Saved>> = Mutex::new(None);
static PANIC_HOOK: Once = Once::new();

/// Puts a terminal into raw mode, and arranges that a panic restores it. Returns false, and does nothing, when `fd` is no
/// terminal, or is one on which we run in the background (changing it would stop the process).
///
/// # Errors
/// The terminal refuses.
pub(super) fn make_raw(fd: BorrowedFd<'_>) -> io::Result<bool> {
    // A terminal that is not the one that controls us knows no foreground group; then there is nothing to respect.
    let in_background = tcgetpgrp(fd).is_ok_and(|group| group != getpgrp());
    if !isatty(fd) || in_background {
        return Ok(false);
    }
    let modes = tcgetattr(fd)?;
    let mut raw = modes.clone();
    raw.make_raw();
    raw.output_modes = modes.output_modes;
    let terminal = fd.try_clone_to_owned()?;
    tcsetattr(fd, OptionalActions::Now, &raw)?;
    if let Ok(mut saved) = SAVED.lock() {
        // The first state seen is the user's own.
        saved.get_or_insert(Saved { terminal, modes });
    }
    PANIC_HOOK.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            previous(info);
        }));
    });
    Ok(true)
}

/// Puts the terminal back as it was found. Does nothing when it was not changed, so it may be called on every exit path, more
/// than once, and from any thread (not from inside a signal handler: it takes a lock, though it never waits for one).
pub fn restore() {
    if let Ok(mut saved) = SAVED.try_lock()
        && let Some(Saved { terminal, modes }) = saved.take()
    {
        // There is nobody left to tell if this fails.
        let _ = tcsetattr(&terminal, OptionalActions::Now, &modes);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    use rustix::termios::{LocalModes, OutputModes};

    use super::*;

    #[test]
    fn a_terminal_made_raw_is_restored_as_it_was() {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        let before = tcgetattr(&slave).unwrap();
        assert!(before.local_modes.contains(LocalModes::ECHO | LocalModes::ISIG));

        assert!(make_raw(slave.as_fd()).unwrap());
        let raw = tcgetattr(&slave).unwrap();
        assert!(!raw.local_modes.intersects(LocalModes::ECHO | LocalModes::ISIG | LocalModes::ICANON));
        assert!(raw.output_modes.contains(OutputModes::OPOST));

        restore();
        let after = tcgetattr(&slave).unwrap();
        assert_eq!(after.local_modes, before.local_modes);
        assert_eq!(after.input_modes, before.input_modes);
        restore();
    }

    #[test]
    fn what_is_no_terminal_is_left_alone() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(!make_raw(file.as_fd()).unwrap());
    }
}
