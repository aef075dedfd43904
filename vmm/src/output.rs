//! Text for standard output: in colour where that is a terminal, and without complaint where nobody reads on (`| head`).

use std::io::{self, Write};

/// Nobody takes what is written.
#[derive(Debug, thiserror::Error)]
#[error("standard output cannot be written: {0}; check where it leads")]
pub struct OutputError(io::Error);

/// Writes `text`; the stream takes the colour out where it does not belong.
///
/// # Errors
/// Standard output takes no more, other than because its reader has gone.
pub fn print(text: &str) -> Result<(), OutputError> {
    let mut stream = anstream::stdout().lock();
    match stream.write_all(text.as_bytes()).and_then(|()| stream.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(OutputError(error)),
        _ => Ok(()),
    }
}
