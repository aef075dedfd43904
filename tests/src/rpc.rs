//! Commands over a console: send a shell line, get its output and exit status. The other side is `image/agent.sh`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result, ensure};
use crate::timeline::{Lane, Timeline};
use crate::wire::{FRAMING, QUIET, READY, Wire};

/// How long a command may take unless told otherwise. Emulation is slow and uneven.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a command printed, and its exit status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Exit status of the shell line.
    pub status: i32,
    /// Both output streams, without the last line end.
    pub text: String,
}

/// A shell at the other end of a [`Wire`].
#[derive(Debug)]
pub struct Rpc {
    wire: Wire,
    lane: Lane,
    next: AtomicU32,
    timeline: Arc<Timeline>,
}

impl Rpc {
    /// Speaks over `wire`.
    pub fn new(wire: Wire, lane: Lane, timeline: Arc<Timeline>) -> Self {
        Self { wire, lane, next: AtomicU32::new(1), timeline }
    }

    /// The channel below.
    pub fn wire(&self) -> &Wire {
        &self.wire
    }

    /// Waits until the agent says that it is there, counting from line `mark`.
    pub fn wait_ready(&self, mark: usize, timeout: Duration) -> Result<()> {
        self.wire.wait(&format!("{} is up", self.lane.name()), mark, timeout, |line| line == READY).map(drop)
    }

    /// Runs a shell line (one line: no line ends in it) and waits for it.
    pub fn run(&self, command: &str) -> Result<Output> {
        self.run_for(command, PATIENCE)
    }

    /// As [`Rpc::run`], with its own limit of time.
    pub fn run_for(&self, command: &str, timeout: Duration) -> Result<Output> {
        let call = self.start(command)?;
        self.finish(&call, timeout)
    }

    /// Runs a shell line that must succeed; what it printed.
    pub fn sh(&self, command: &str) -> Result<String> {
        let output = self.run(command)?;
        self.must_succeed(command, output)
    }

    /// As [`Rpc::sh`], with its own limit of time.
    pub fn sh_for(&self, command: &str, timeout: Duration) -> Result<String> {
        let output = self.run_for(command, timeout)?;
        self.must_succeed(command, output)
    }

    /// As [`Rpc::run`], kept off the timeline: for what is asked again and again.
    pub fn probe(&self, command: &str) -> Result<Output> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let call = self.send(format!("{QUIET}{number}"), command)?;
        self.finish(&call, PATIENCE)
    }

    /// Sends a shell line and does not wait for it; give the result to [`Rpc::finish`].
    pub fn start(&self, command: &str) -> Result<Call> {
        self.timeline.record(self.lane, format!("$ {command}"));
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.send(number.to_string(), command)
    }

    fn send(&self, id: String, command: &str) -> Result<Call> {
        ensure(!command.contains('\n'), || format!("a command must be one line: {command}"))?;
        let mark = self.wire.mark();
        self.wire.send(&format!("{id} {command}\n"))?;
        Ok(Call { id, mark, command: command.to_owned() })
    }

    /// Waits for a started command.
    pub fn finish(&self, call: &Call, timeout: Duration) -> Result<Output> {
        let begin = format!("{}{}", FRAMING[0], call.id);
        let end = format!("{}{} ", FRAMING[1], call.id);
        let what = format!("{}: `{}`", self.lane.name(), call.command);
        let first = self.wire.wait(&what, call.mark, timeout, |line| line == begin)?;
        let last = self.wire.wait(&what, first, timeout, |line| line.starts_with(&end))?;
        let lines = self.wire.since(first + 1);
        let count = last - first - 1;
        let status = lines.get(count).and_then(|line| line.strip_prefix(&end)?.trim().parse().ok());
        let text = lines.get(..count).unwrap_or_default().join("\n");
        let text = text.trim_end_matches('\n').to_owned();
        Ok(Output { status: status.unwrap_or(-1), text })
    }

    fn must_succeed(&self, command: &str, output: Output) -> Result<String> {
        if output.status == 0 {
            return Ok(output.text);
        }
        Err(Error::Check(format!(
            "{}: `{command}` ended with status {}: {}",
            self.lane.name(),
            output.status,
            output.text
        )))
    }
}

/// A command under way.
#[derive(Debug)]
pub struct Call {
    id: String,
    mark: usize,
    command: String,
}

/// Calls `probe` until it gives something, or the time is up. `probe` gives `Err(last value)` to go on.
pub fn wait_for<T>(
    what: &str,
    timeout: Duration,
    mut probe: impl FnMut() -> Result<std::result::Result<T, String>>,
) -> Result<T> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(10);
    loop {
        match probe()? {
            Ok(value) => return Ok(value),
            Err(last) if start.elapsed() >= timeout => {
                return Err(Error::Timeout { what: what.to_owned(), after: timeout, last });
            }
            Err(_) => thread::sleep(pause),
        }
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}
