//! One byte channel to the emulated machine (a Unix socket of QEMU), read into lines by a thread of its own.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result, file_error};
use crate::timeline::{Lane, Timeline};

/// What begins and what ends the answer to a command, each followed by its identifier. Not on the timeline.
pub const FRAMING: [&str; 2] = ["@<", "@>"];
/// The line by which the shell at the other end announces itself.
pub const READY: &str = "@ready";
/// Identifiers of commands that are kept off the timeline begin so: what is polled would drown the rest.
pub const QUIET: char = '0';
/// The line that tells that the VMM has ended; followed by its exit status.
pub const VMM_EXIT: &str = "@vmm-exit ";

#[derive(Debug, Default)]
struct Lines {
    lines: Vec<String>,
    /// Why nothing more is to be expected: a panic, the end of the VMM, the end of QEMU.
    ended: Option<String>,
    closed: bool,
    panic_is_expected: bool,
    quiet: bool,
}

/// The channel.
#[derive(Debug)]
pub struct Wire {
    /// Locked for a whole line at a time.
    stream: Arc<Mutex<UnixStream>>,
    lane: Lane,
    shared: Arc<(Mutex<Lines>, Condvar)>,
}

impl Wire {
    /// Connects to the socket at `path`, waiting for QEMU to create it, and records its lines on `lane`.
    pub fn connect(path: &Path, lane: Lane, timeline: Arc<Timeline>) -> Result<Self> {
        let stream = connect(path)?;
        let mut reader = stream.try_clone().map_err(file_error("clone", path))?;
        let shared = Arc::new((Mutex::new(Lines::default()), Condvar::new()));
        let sink = Arc::clone(&shared);
        thread::spawn(move || {
            let mut partial = Vec::new();
            let mut buffer = [0; 4096];
            loop {
                let count = reader.read(&mut buffer).unwrap_or(0);
                let mut lines = sink.0.lock().unwrap_or_else(PoisonError::into_inner);
                if count == 0 {
                    lines.closed = true;
                    lines.ended.get_or_insert_with(|| "QEMU closed the channel".to_owned());
                    sink.1.notify_all();
                    return;
                }
                for byte in &buffer[..count] {
                    match byte {
                        b'\n' => {
                            let line = String::from_utf8_lossy(&partial).into_owned();
                            partial.clear();
                            lines.accept(line, lane, &timeline);
                        }
                        b'\r' => {}
                        byte => partial.push(*byte),
                    }
                }
                sink.1.notify_all();
            }
        });
        Ok(Self { stream: Arc::new(Mutex::new(stream)), lane, shared })
    }

    /// Sends `text`.
    pub fn send(&self, text: &str) -> Result<()> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        stream.write_all(text.as_bytes()).map_err(|source| Error::Ended {
            lane: self.lane.name(),
            why: format!("cannot write to its channel: {source}"),
        })
    }

    /// Sends an empty line again and again, as long as this exists.
    pub fn pulse(&self, every: Duration) {
        let stream = Arc::downgrade(&self.stream);
        thread::spawn(move || {
            loop {
                thread::sleep(every);
                let Some(stream) = stream.upgrade() else { return };
                if stream.lock().unwrap_or_else(PoisonError::into_inner).write_all(b"\n").is_err() {
                    return;
                }
            }
        });
    }

    /// Number of lines seen so far; the starting point of a later [`Wire::wait`].
    pub fn mark(&self) -> usize {
        self.lines().lines.len()
    }

    /// The lines from `mark` on.
    pub fn since(&self, mark: usize) -> Vec<String> {
        self.lines().lines.get(mark..).unwrap_or_default().to_vec()
    }

    /// Waits for a line from `mark` on that `matches`; its number. Fails at once when the other side has ended.
    pub fn wait(
        &self,
        what: &str,
        mark: usize,
        timeout: Duration,
        matches: impl Fn(&str) -> bool,
    ) -> Result<usize> {
        let deadline = Instant::now() + timeout;
        let mut next = mark;
        let mut lines = self.lines();
        loop {
            while let Some(line) = lines.lines.get(next) {
                if matches(line) {
                    return Ok(next);
                }
                next += 1;
            }
            if let Some(why) = &lines.ended {
                return Err(Error::Ended { lane: self.lane.name(), why: why.clone() });
            }
            let now = Instant::now();
            if now >= deadline {
                let last = lines.lines.iter().rev().find(|l| !l.is_empty()).cloned().unwrap_or_default();
                return Err(Error::Timeout { what: what.to_owned(), after: timeout, last });
            }
            lines =
                self.shared.1.wait_timeout(lines, deadline - now).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Forgets an earlier end (a panic that was wanted, a VMM that has been stopped).
    pub fn forget_end(&self) {
        let mut lines = self.lines();
        lines.panic_is_expected = false;
        if !lines.closed {
            lines.ended = None;
        }
    }

    /// Takes a panic of the kernel at the other end for an ordinary line, until [`Wire::forget_end`].
    pub fn expect_panic(&self) {
        self.lines().panic_is_expected = true;
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lines {
    fn accept(&mut self, line: String, lane: Lane, timeline: &Timeline) {
        if let Some((_, status)) = line.split_once(VMM_EXIT) {
            self.ended = Some(format!("the VMM ended with status {status}"));
        } else if line.contains("Kernel panic") && !self.panic_is_expected {
            self.ended = Some(line.clone());
        }
        if let Some(id) = line.strip_prefix(FRAMING[0]) {
            self.quiet = id.starts_with(QUIET);
        } else if line.starts_with(FRAMING[1]) || line == READY {
            self.quiet = false;
        }
        if !line.is_empty() && !self.quiet && !FRAMING.iter().any(|prefix| line.starts_with(prefix)) {
            timeline.record(lane, line.clone());
        }
        self.lines.push(line);
    }
}

/// Connects to a socket that QEMU is about to create.
pub fn connect(path: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(source) if Instant::now() >= deadline => {
                return Err(Error::File { what: "connect to", path: path.to_owned(), source });
            }
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
}
