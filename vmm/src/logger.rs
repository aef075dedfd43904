//! The log: lines on standard error or in a file, in the form of Cloud Hypervisor's.
//!
//! ```text
//! dormouse: 1.042317s: <vcpu0> WARN:devices::rtc -- message
//! ```
//!
//! A guest can provoke messages as often as it likes, so each place in the code may write only a few in a
//! row; what is held back is counted and mentioned. With debug messages on, nothing is held back.
//!
//! [`format`](mod@format) is for another form of line.

mod format;

use std::ffi::CStr;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::multicall::Program;

pub use format::{FormatError, LogFormat};

/// Lines that one place may write in one period.
const LINES_PER_PERIOD: u64 = 20;
const PERIOD: Duration = Duration::from_secs(10);
/// Places that are told apart; two that share a slot share its lines.
const SLOTS: usize = 256;

/// The main thread's name, which management software looks for.
pub const MAIN_THREAD: &CStr = c"vmm";

static LOGGER: OnceLock<Logger> = OnceLock::new();

/// Starts logging, to `file` if there is one, in the usual form unless there is another. Called once, before there is a second thread.
///
/// # Errors
/// There is a logger already.
pub fn init(
    file: Option<File>,
    level: LevelFilter,
    format: Option<LogFormat>,
    start: Instant,
) -> Result<(), log::SetLoggerError> {
    let limited = level < LevelFilter::Debug;
    let program = Program::current();
    let logger = LOGGER.get_or_init(|| Logger {
        program,
        file,
        level,
        format,
        start,
        limiter: limited.then(Limiter::new),
    });
    log::set_logger(logger)?;
    log::set_max_level(level);
    Ok(())
}

struct Logger {
    program: Program,
    file: Option<File>,
    level: LevelFilter,
    format: Option<LogFormat>,
    start: Instant,
    limiter: Option<Limiter>,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        rank(metadata) <= self.level
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let now = self.start.elapsed();
        let held_back = match self.limiter.as_ref().map(|limiter| limiter.admit(record, now)) {
            Some(None) => return,
            Some(Some(held_back)) => held_back,
            None => 0,
        };
        // One write for a line, so that lines of different threads do not mix.
        let line =
            Line { program: self.program, format: self.format.as_ref(), record, now, held_back }.to_string();
        let result = match &self.file {
            Some(file) => (&*file).write_all(line.as_bytes()),
            None => io::stderr().lock().write_all(line.as_bytes()),
        };
        // There is nowhere to report this to.
        drop(result);
    }

    fn flush(&self) {}
}

/// The level that counts. What `vfio-ioctls` warns of is usual: it asks each device for interrupts and regions that most have not.
fn rank(metadata: &Metadata<'_>) -> Level {
    let usual = metadata.level() == Level::Warn && metadata.target().starts_with("vfio_ioctls");
    if usual { Level::Debug } else { metadata.level() }
}

struct Line<'a> {
    program: Program,
    format: Option<&'a LogFormat>,
    record: &'a Record<'a>,
    now: Duration,
    held_back: u64,
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.format {
            Some(format) => format.write(f, self.record, self.now)?,
            None => self.write_usual(f)?,
        }
        if self.held_back > 0 {
            write!(f, " ({} messages from here held back)", self.held_back)?;
        }
        f.write_str("\n")
    }
}

impl Line<'_> {
    fn write_usual(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let thread = thread::current();
        let module = self.record.module_path().unwrap_or("?");
        write!(
            f,
            "{}: {}.{:06}s: <{}> {}:{module} -- {}",
            self.program.name(),
            self.now.as_secs(),
            self.now.subsec_micros(),
            thread_name(thread.name()),
            self.record.level(),
            self.record.args()
        )
    }
}

/// Rust calls the main thread `main`, whatever its name.
fn thread_name(name: Option<&str>) -> &str {
    match name {
        Some("main") => MAIN_THREAD.to_str().unwrap_or("main"),
        name => name.unwrap_or("?"),
    }
}

/// Counts lines by place and period.
struct Limiter {
    /// Period in the upper half, lines in the lower.
    slots: [AtomicU64; SLOTS],
}

impl Limiter {
    fn new() -> Self {
        Self { slots: [const { AtomicU64::new(0) }; SLOTS] }
    }

    /// `None` to hold the line back, else how many were held back in the last period that had any.
    fn admit(&self, record: &Record<'_>, now: Duration) -> Option<u64> {
        let slot = &self.slots[slot(record)];
        // Periods start at 1, so that a slot that was never used is in none.
        let period = (now.as_secs() / PERIOD.as_secs() + 1) & u64::from(u32::MAX);
        let count = |value: u64| if value >> 32 == period { value & u64::from(u32::MAX) } else { 0 };
        let next = |value| Some(period << 32 | (count(value) + 1).min(u64::from(u32::MAX)));
        let before = match slot.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next) {
            Ok(before) | Err(before) => before,
        };
        if count(before) >= LINES_PER_PERIOD {
            return None;
        }
        let earlier = if before >> 32 == period { 0 } else { before & u64::from(u32::MAX) };
        Some(earlier.saturating_sub(LINES_PER_PERIOD))
    }
}

/// The slot of the place that a record comes from, and of what it is about, if it says so by its target (FNV-1a over file, line and target).
fn slot(record: &Record<'_>) -> usize {
    let line = record.line().unwrap_or(0).to_le_bytes();
    let bytes = record.file().unwrap_or("").bytes().chain(line).chain(record.target().bytes());
    let hash = bytes.fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    usize::try_from(hash).map_or(0, |hash| hash % SLOTS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(line: u32) -> Record<'static> {
        Record::builder()
            .args(format_args!("hello"))
            .level(Level::Warn)
            .module_path_static(Some("devices::rtc"))
            .file_static(Some("rtc.rs"))
            .line(Some(line))
            .build()
    }

    #[test]
    fn lines_have_time_thread_level_and_module() {
        let line = |program, format: Option<LogFormat>, held_back| {
            let now = Duration::from_micros(1_042_317);
            thread::Builder::new()
                .name("vcpu0".into())
                .spawn(move || {
                    Line { program, format: format.as_ref(), record: &record(1), now, held_back }.to_string()
                })
                .unwrap()
                .join()
                .unwrap()
        };
        let usual = ": 1.042317s: <vcpu0> WARN:devices::rtc -- hello\n";
        for program in [Program::Dormouse, Program::CloudHypervisor] {
            assert_eq!(line(program, None, 0), format!("{}{usual}", program.name()));
        }
        let other = "{level} {location}: {msg}".parse().ok();
        assert_eq!(line(Program::Dormouse, other, 0), "WARN rtc.rs:1: hello\n");
        assert_eq!((thread_name(Some("main")), thread_name(None)), ("vmm", "?"));
        assert!(line(Program::Dormouse, None, 3).ends_with("hello (3 messages from here held back)\n"));
    }

    #[test]
    fn what_the_library_warns_of_at_every_device_is_for_debugging() {
        let rank = |level, target| rank(&Metadata::builder().level(level).target(target).build());
        assert_eq!(rank(Level::Warn, "vfio_ioctls::vfio_device"), Level::Debug);
        assert_eq!(rank(Level::Error, "vfio_ioctls::vfio_device"), Level::Error);
        assert_eq!(rank(Level::Warn, "devices::vfio::function"), Level::Warn);
    }

    #[test]
    fn a_place_that_says_too_much_is_held_back_until_the_next_period() {
        let limiter = Limiter::new();
        let admitted = (0..100).filter(|_| limiter.admit(&record(1), Duration::ZERO).is_some()).count();
        assert_eq!(admitted, 20);
        assert_eq!(limiter.admit(&record(2), Duration::ZERO), Some(0), "another place is not affected");
        let about = Record::builder().file_static(Some("rtc.rs")).line(Some(1)).target("_disk0").build();
        assert_eq!(limiter.admit(&about, Duration::ZERO), Some(0), "nor is another device at the same place");
        assert_eq!(limiter.admit(&record(1), PERIOD), Some(80));
        assert_eq!(limiter.admit(&record(1), PERIOD), Some(0));
    }
}
