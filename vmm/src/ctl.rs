//! `dormouse ctl`: a running VMM told what to do over its API socket, with the commands of Cloud Hypervisor's `ch-remote` and some for power.
//!
//! [`args`] are the commands, [`request`] makes requests of them, [`devices`] has the keys of their options, [`render`] the replies as text.
//! docs/ctl.md is for users.

mod args;
mod devices;
mod power;
mod render;
mod request;
#[cfg(test)]
mod tests;

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::time::Duration;

use crate::client::{Client, ClientError, DescriptorError, Method};
use crate::config::OptionError;
use crate::output;

pub use args::CtlArgs;
use args::CtlCommand;

/// How long a call that only reads may take unless the user says otherwise.
const PATIENCE: Duration = Duration::from_secs(10);

/// A command that failed.
#[derive(Debug, thiserror::Error)]
pub enum CtlError {
    /// Nobody to talk to.
    #[error("no VMM is named; give --api-socket PATH, as the VMM was started with")]
    NoSocket,
    /// The VMM did not do it.
    #[error(transparent)]
    Client(ClientError),
    /// It may yet do it.
    #[error("{0}, or allow it more time with --timeout SECONDS")]
    TimedOut(ClientError),
    /// A value whose grammar is not kept.
    #[error(transparent)]
    Option(#[from] OptionError),
    /// A key that is missing.
    #[error("{option}: '{key}' is missing; give {key}=VALUE")]
    MissingKey {
        /// The command.
        option: &'static str,
        /// The key.
        key: &'static str,
    },
    /// A descriptor that cannot be passed on.
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    /// No configuration to send.
    #[error(
        "create: the configuration cannot be read from {from}: {cause}; name a readable file, or - for standard input"
    )]
    Configuration {
        /// The file.
        from: String,
        /// Why.
        cause: io::Error,
    },
    /// A command that would do nothing.
    #[error("{0}")]
    Nothing(&'static str),
    /// The reply is not what the call replies.
    #[error("the reply of {} to {call} is not understood: {cause}; --json prints it as it is", socket.display())]
    Reply {
        /// The socket.
        socket: PathBuf,
        /// The call.
        call: String,
        /// What is wrong with it.
        cause: serde_json::Error,
    },
    /// What goes to the VMM or to the user has no JSON form.
    #[error("the request has no JSON form")]
    Json(#[from] serde_json::Error),
    /// Nobody takes what is written.
    #[error(transparent)]
    Output(#[from] output::OutputError),
}

impl From<ClientError> for CtlError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::TimedOut { .. } => Self::TimedOut(error),
            error => Self::Client(error),
        }
    }
}

/// Carries out one command and prints what came of it.
///
/// # Errors
/// See [`CtlError`].
pub fn run(args: &CtlArgs) -> Result<(), CtlError> {
    let text = perform(args, io::stdout().is_terminal())?;
    Ok(output::print(&text)?)
}

/// What is to be printed, for a terminal or for a program.
fn perform(args: &CtlArgs, terminal: bool) -> Result<String, CtlError> {
    let socket = args.socket().ok_or(CtlError::NoSocket)?;
    let (request, fds) = request::request(&args.command)?;
    // Booting a guest, or waiting for a migration, takes the time that it takes.
    let usual = (request.method == Method::Get).then_some(PATIENCE);
    let timeout = match args.timeout {
        Some(0) => None,
        Some(seconds) => Some(Duration::from_secs(seconds)),
        None => usual,
    };
    let client = Client::new(socket, timeout);
    let reply = client.send(&request, &fds)?;
    let text = reply.text();
    if args.json || text.is_empty() || matches!(args.command, CtlCommand::Metrics { .. }) {
        return Ok(with_line_end(&text));
    }
    // What ch-remote has too is what it prints, unless a person looks at it.
    if !terminal && !args.command.is_own() {
        return Ok(with_line_end(&text));
    }
    render::reply(&args.command, &text).map_err(|cause| CtlError::Reply {
        socket: client.socket().to_owned(),
        call: request.call().to_owned(),
        cause,
    })
}

fn with_line_end(text: &str) -> String {
    if text.is_empty() || text.ends_with('\n') { text.to_owned() } else { format!("{text}\n") }
}
