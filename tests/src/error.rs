//! The one error type of the test bed: what failed, which thing, why, and what to do about it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Everything that can go wrong while preparing, booting or judging.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program the test bed needs is absent and could not be installed.
    #[error("missing on this machine: {what}; install with: {how}")]
    Missing {
        /// The programs or packages that are absent.
        what: String,
        /// The command that provides them.
        how: String,
    },
    /// A helper program ran and failed.
    #[error("`{command}` failed ({status}): {output}")]
    Command {
        /// Program and arguments.
        command: String,
        /// Exit status in words.
        status: String,
        /// The end of what it wrote.
        output: String,
    },
    /// A file operation failed.
    #[error("cannot {what} {}: {source}", path.display())]
    File {
        /// The operation, as a verb.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// Something did not happen in time.
    #[error("{what}: not within {:.1} s{}", after.as_secs_f64(), last_seen(last))]
    Timeout {
        /// What was awaited.
        what: String,
        /// How long.
        after: Duration,
        /// The last value seen, for the reader; may be empty.
        last: String,
    },
    /// A kernel panicked, the VMM or QEMU ended, or a channel closed while it was needed.
    #[error("{lane} ended: {why}")]
    Ended {
        /// Which side.
        lane: &'static str,
        /// The line or state that told.
        why: String,
    },
    /// A check of a scenario did not hold.
    #[error("{0}")]
    Check(String),
}

fn last_seen(last: &str) -> String {
    if last.is_empty() { String::new() } else { format!(" (last seen: {last})") }
}

/// Result of nearly everything here.
pub type Result<T> = std::result::Result<T, Error>;

/// Adapts an [`io::Error`] to [`Error::File`].
pub fn file_error(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::File { what, path, source }
}

/// Fails the scenario with `message` unless `condition` holds.
pub fn ensure(condition: bool, message: impl FnOnce() -> String) -> Result<()> {
    if condition { Ok(()) } else { Err(Error::Check(message())) }
}
