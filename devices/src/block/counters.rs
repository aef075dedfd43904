//! What a disk has counted, by the names of Cloud Hypervisor's `vm.counters`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Accesses of one kind.
#[derive(Debug)]
struct Accesses {
    bytes: AtomicU64,
    ops: AtomicU64,
    /// Microseconds.
    least: AtomicU64,
    most: AtomicU64,
    sum: AtomicU64,
}

impl Default for Accesses {
    fn default() -> Self {
        Self {
            bytes: AtomicU64::default(),
            ops: AtomicU64::default(),
            // Nothing has been measured.
            least: AtomicU64::new(u64::MAX),
            most: AtomicU64::default(),
            sum: AtomicU64::default(),
        }
    }
}

impl Accesses {
    fn count(&self, bytes: u64, took: Duration) {
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX - 1);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.ops.fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(took, Ordering::Relaxed);
        self.least.fetch_min(took, Ordering::Relaxed);
        self.most.fetch_max(took, Ordering::Relaxed);
    }

    fn most(&self) -> u64 {
        if self.ops.load(Ordering::Relaxed) == 0 { u64::MAX } else { self.most.load(Ordering::Relaxed) }
    }

    fn average(&self) -> u64 {
        let ops = self.ops.load(Ordering::Relaxed);
        self.sum.load(Ordering::Relaxed).checked_div(ops).unwrap_or(0)
    }
}

/// A disk's counters.
#[derive(Debug, Default)]
pub struct Counters {
    reads: Accesses,
    writes: Accesses,
}

impl Counters {
    /// Counts a read that went well.
    pub fn read(&self, bytes: u64, took: Duration) {
        self.reads.count(bytes, took);
    }

    /// Counts a write that went well.
    pub fn write(&self, bytes: u64, took: Duration) {
        self.writes.count(bytes, took);
    }

    /// All by name. A least or most that was never measured is 2^64 - 1.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        let now = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("read_bytes", now(&self.reads.bytes)),
            ("read_ops", now(&self.reads.ops)),
            ("read_latency_min", now(&self.reads.least)),
            ("read_latency_max", self.reads.most()),
            ("read_latency_avg", self.reads.average()),
            ("write_bytes", now(&self.writes.bytes)),
            ("write_ops", now(&self.writes.ops)),
            ("write_latency_min", now(&self.writes.least)),
            ("write_latency_max", self.writes.most()),
            ("write_latency_avg", self.writes.average()),
        ]
    }
}
