//! Running helper programs with their output captured and their failures explained.

use std::path::Path;
use std::process::{Command, Output};

use crate::error::{Error, Result};

/// Longest tail of a failed program's output that goes into an error message.
const TAIL: usize = 2000;

/// Runs `command` to its end; its standard output, or [`Error::Command`] with the tail of both streams.
pub fn capture(command: &mut Command) -> Result<Vec<u8>> {
    let output = output(command)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Err(Error::Command { command: show(command), status: output.status.to_string(), output: tail(&text) })
}

/// As [`capture`], as text.
pub fn capture_text(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&capture(command)?).into_owned())
}

/// Runs `command` whatever its exit status; fails only if it cannot be started.
pub fn output(command: &mut Command) -> Result<Output> {
    command.output().map_err(|source| Error::Command {
        command: show(command),
        status: "not started".to_owned(),
        output: source.to_string(),
    })
}

/// The program and its arguments as one line.
pub fn show(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    words.join(" ")
}

/// Whether `program` is an executable on `PATH` or in the system directories a plain user's `PATH` lacks.
pub fn exists(program: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':').chain(["/usr/sbin", "/sbin"]).any(|dir| Path::new(dir).join(program).is_file())
}

fn tail(text: &str) -> String {
    let text = text.trim();
    let mut start = text.len().saturating_sub(TAIL);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text[start..].to_owned()
}
