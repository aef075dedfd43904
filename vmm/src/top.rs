//! `dormouse top`: the assigned devices of all running VMs, and how they sleep, live in the terminal or once as a table or JSON.
//!
//! It asks VMMs over their status sockets and reads sensors of the host; it touches no device. [`sockets`] finds the VMMs, [`collect`] asks them,
//! [`sensors`] reads watts, [`board`] is what is known, [`columns`] makes cells of it, [`once`] and [`screen`] print them, [`live`] is the
//! loop of the terminal. docs/ctl.md is for users.

mod board;
mod collect;
mod columns;
mod live;
mod once;
mod screen;
mod sensors;
mod sockets;
#[cfg(test)]
mod tests;

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::output;
use sockets::Source;

/// Shortest time between two looks.
const SHORTEST: f64 = 0.1;
/// Longest.
const LONGEST: f64 = 3600.0;

/// Watch the assigned devices of all running VMs. Keys: q leaves, arrows scroll.
///
/// It reads status sockets and touches no device. Root sees the VMs of root, a user those of the user.
#[derive(Clone, Debug, PartialEq, Args)]
pub struct TopArgs {
    /// Look at the VMMs behind these sockets (status or API sockets) instead of all that run.
    #[arg(long, value_name = "PATH", num_args = 1.., value_hint = clap::ValueHint::FilePath)]
    pub socket: Vec<PathBuf>,
    /// Print a table once, and end.
    #[arg(long)]
    pub once: bool,
    /// Print JSON.
    #[arg(long, requires = "once")]
    pub json: bool,
    /// Time between two looks.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    pub interval: Duration,
}

/// The display cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    /// Nowhere to look for VMMs.
    #[error(
        "top: XDG_RUNTIME_DIR is not set, so the VMMs of this user cannot be found; set it, run this as root, or give --socket PATH"
    )]
    NoDirectory,
    /// The directory of the status sockets cannot be read.
    #[error("top: {}: {cause}; run this as the user who runs the VMMs, or give --socket PATH", directory.display())]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// A live display needs one.
    #[error("top: standard output is no terminal; give --once for a table, or --once --json")]
    NoTerminal,
    /// The terminal does not do as it is told.
    #[error("top: the terminal cannot be used: {0}; --once needs none")]
    Terminal(io::Error),
    /// Some VMMs are missing in what was printed.
    #[error("top: {failed} of {all} VMMs could not be read; the reason stands beside each")]
    Incomplete {
        /// How many.
        failed: usize,
        /// Of how many.
        all: usize,
    },
    /// Nobody takes what is written.
    #[error(transparent)]
    Output(#[from] output::OutputError),
    /// What was collected has no JSON form.
    #[error("top: the report has no JSON form")]
    Json(#[from] serde_json::Error),
}

/// Shows the devices of running VMs.
///
/// # Errors
/// See [`TopError`].
pub fn run(args: &TopArgs) -> Result<(), TopError> {
    let source = Source::new(&args.socket)?;
    if !args.once {
        if !io::stdout().is_terminal() {
            return Err(TopError::NoTerminal);
        }
        return live::run(source, args.interval);
    }
    let board = collect::once(&source, sensors::Meter::default())?;
    let text = if args.json { once::json(&board)? } else { once::table(&board, &source) };
    output::print(&text)?;
    match board.failed() {
        0 => Ok(()),
        failed => Err(TopError::Incomplete { failed, all: board.vms().len() }),
    }
}

fn interval(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (SHORTEST..=LONGEST).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(format!("it takes seconds from {SHORTEST} to {LONGEST}")),
    }
}
