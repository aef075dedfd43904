//! What happened, when, on which side: one record for all channels of an emulated host.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The side an entry comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lane {
    /// The host's kernel console and the commands run on the host.
    Host,
    /// The guest's console and the commands run in the guest.
    Guest,
    /// The firmware's power log.
    Power,
    /// The log of the VMM.
    Vmm,
}

impl Lane {
    /// The lane's heading.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Guest => "guest",
            Self::Power => "firmware",
            Self::Vmm => "vmm",
        }
    }

    /// Which of the three printed columns the lane is in: the VMM stands with the firmware, between the two kernels.
    fn column(self) -> usize {
        match self {
            Self::Host => 0,
            Self::Power | Self::Vmm => 1,
            Self::Guest => 2,
        }
    }
}

/// One line of a lane.
#[derive(Debug, Clone)]
pub struct Entry {
    /// When it was seen here, since the timeline began.
    pub at: Duration,
    /// Where it comes from.
    pub lane: Lane,
    /// The line.
    pub text: String,
}

type Watcher = Box<dyn Fn(&Entry) + Send + Sync>;

/// The record. Shared by the reader threads of all channels.
pub struct Timeline {
    start: Instant,
    entries: Mutex<Vec<Entry>>,
    watcher: Mutex<Option<Watcher>>,
}

impl fmt::Debug for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timeline").field("entries", &self.entries().len()).finish_non_exhaustive()
    }
}

impl Default for Timeline {
    fn default() -> Self {
        Self { start: Instant::now(), entries: Mutex::default(), watcher: Mutex::default() }
    }
}

impl Timeline {
    /// Records `text` as seen now.
    pub fn record(&self, lane: Lane, text: impl Into<String>) {
        let entry = Entry { at: self.now(), lane, text: text.into() };
        if let Some(watcher) = &*self.watcher.lock().unwrap_or_else(PoisonError::into_inner) {
            watcher(&entry);
        }
        self.entries().push(entry);
    }

    /// Calls `watcher` with each entry from now on, on the thread that records it.
    pub fn watch(&self, watcher: impl Fn(&Entry) + Send + Sync + 'static) {
        *self.watcher.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(watcher));
    }

    /// Time since the timeline began.
    pub fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// All entries of `lane` from `since` on.
    pub fn lane(&self, lane: Lane, since: Duration) -> Vec<Entry> {
        self.entries().iter().filter(|entry| entry.lane == lane && entry.at >= since).cloned().collect()
    }

    /// The last `count` entries from `since` on, merged by time, in three columns.
    pub fn columns(&self, since: Duration, count: usize) -> String {
        const WIDTH: usize = 58;
        let entries = self.entries();
        let recent: Vec<&Entry> = entries.iter().filter(|entry| entry.at >= since).collect();
        let skip = recent.len().saturating_sub(count);
        let mut out = format!("{:>9} {:WIDTH$} {:WIDTH$} {}\n", "seconds", "HOST", "FIRMWARE, VMM", "GUEST");
        for entry in &recent[skip..] {
            let mark = if entry.lane == Lane::Power { "*" } else { "" };
            for (row, piece) in wrap(&entry.text, WIDTH - 1).iter().enumerate() {
                let at = if row == 0 { format!("{:.3}", entry.at.as_secs_f64()) } else { String::new() };
                let indent = (WIDTH + 1) * entry.lane.column();
                out.push_str(&format!("{at:>9} {:indent$}{mark}{piece}\n", ""));
            }
        }
        out
    }

    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Cuts `text` into pieces of at most `width` characters; control characters become `.`.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let clean: Vec<char> = text.chars().map(|c| if c.is_control() { '.' } else { c }).collect();
    if clean.is_empty() {
        return vec![String::new()];
    }
    clean.chunks(width).map(|chunk| chunk.iter().collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_columns_keep_the_order_of_time_and_the_place_of_the_lane() {
        let timeline = Timeline::default();
        timeline.record(Lane::Host, "suspending");
        timeline.record(Lane::Power, "slot 0 off");
        timeline.record(Lane::Guest, "idle");
        let text = timeline.columns(Duration::ZERO, 10);
        let lines: Vec<&str> = text.lines().skip(1).collect();
        let column = |line: &str, word: &str| line.find(word).unwrap();
        assert!(column(lines[0], "suspending") < column(lines[1], "*slot 0 off"));
        assert!(column(lines[1], "*slot 0 off") < column(lines[2], "idle"));
    }

    #[test]
    fn only_the_last_entries_are_printed() {
        let timeline = Timeline::default();
        for n in 0..10 {
            timeline.record(Lane::Host, format!("line {n}"));
        }
        let text = timeline.columns(Duration::ZERO, 2);
        assert!(!text.contains("line 7") && text.contains("line 8") && text.contains("line 9"));
    }
}
