//! News of a function's power for operators and programs: every change of phase, every failure, every denial.
//!
//! A guest can cause as much news as it likes, so changes are rate-limited for each function; what is left out is counted and
//! said with the next. Failures have a limit of their own, so that no storm of changes hides one.

use std::fmt::Debug;
use std::time::{Duration, Instant};

use pci::Bdf;
use serde::Serialize;

use crate::bucket::{Bucket, Rate};
use crate::state::Phase;
use crate::stats::{Denial, FailureKind, WakeCause, whole_millis};

/// Changes that are told.
const CHANGES: Rate = Rate { per_minute: 3000, burst: 200 };
/// Failures that are told.
const FAILURES: Rate = Rate { per_minute: 60, burst: 60 };

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum News {
    /// Another phase ([`Phase::name`]).
    Transition {
        /// Where it was.
        from: &'static str,
        /// Where it is.
        to: &'static str,
        /// How long it was there, in milliseconds.
        after_ms: u64,
    },
    /// Woken out of low power.
    Woken {
        /// [`WakeCause::name`].
        cause: &'static str,
    },
    /// Something went wrong.
    Failed {
        /// [`FailureKind::name`].
        failure: &'static str,
        /// What happened and what to do.
        message: String,
    },
    /// Low power is not entered, or later.
    Denied {
        /// [`Denial::name`].
        why: &'static str,
        /// When it will be tried again, if by itself; in milliseconds.
        wait_ms: Option<u64>,
    },
    /// The slot will not be cut from power any more.
    Latched,
    /// It may be again.
    Unlatched,
    /// A lost device is back after a reset.
    Recovered,
}

/// News of one function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PowerNews {
    /// Host address.
    pub bdf: String,
    /// When, in milliseconds since the domain was made.
    pub at_ms: u64,
    /// What.
    #[serde(flatten)]
    pub news: News,
    /// News of this function that was left out before this.
    pub left_out: u64,
}

/// Takes news. Calls come one at a time and in order, from vCPU threads too: it must neither block nor call the domain.
pub trait NewsSink: Debug + Send + Sync {
    /// Something has happened.
    fn tell(&self, news: &PowerNews);
}

/// The news of one function on its way to the sink.
#[derive(Debug)]
pub(crate) struct Outbox {
    /// `None` where nobody listens.
    limits: Option<Limits>,
    start: Instant,
    waiting: Vec<(Duration, News, u64)>,
}

#[derive(Debug)]
struct Limits {
    changes: Bucket,
    failures: Bucket,
    left_out: u64,
}

impl Outbox {
    pub(crate) fn new(listened: bool, now: Instant) -> Self {
        let limits = listened.then(|| Limits {
            changes: Bucket::new(CHANGES, now),
            failures: Bucket::new(FAILURES, now),
            left_out: 0,
        });
        Self { limits, start: now, waiting: Vec::new() }
    }

    fn push(&mut self, news: News, now: Instant) {
        let Some(limits) = &mut self.limits else { return };
        let bucket = match news {
            News::Transition { .. } | News::Woken { .. } | News::Denied { .. } => &mut limits.changes,
            _ => &mut limits.failures,
        };
        if bucket.take(now).is_err() {
            limits.left_out += 1;
            return;
        }
        let left_out = std::mem::take(&mut limits.left_out);
        self.waiting.push((now.saturating_duration_since(self.start), news, left_out));
    }

    pub(crate) fn transition(&mut self, from: Phase, to: Phase, after: Duration, now: Instant) {
        let after_ms = whole_millis(after);
        self.push(News::Transition { from: from.name(), to: to.name(), after_ms }, now);
    }

    pub(crate) fn woken(&mut self, cause: WakeCause, now: Instant) {
        self.push(News::Woken { cause: cause.name() }, now);
    }

    pub(crate) fn failed(&mut self, failure: FailureKind, message: String, now: Instant) {
        self.push(News::Failed { failure: failure.name(), message }, now);
    }

    pub(crate) fn denied(&mut self, why: Denial, wait: Option<Duration>, now: Instant) {
        self.push(News::Denied { why: why.name(), wait_ms: wait.map(whole_millis) }, now);
    }

    pub(crate) fn plain(&mut self, news: News, now: Instant) {
        self.push(news, now);
    }

    /// What is waiting, addressed.
    pub(crate) fn take(&mut self, bdf: Bdf) -> impl Iterator<Item = PowerNews> {
        let waiting = std::mem::take(&mut self.waiting);
        waiting.into_iter().map(move |(at, news, left_out)| PowerNews {
            bdf: bdf.to_string(),
            at_ms: whole_millis(at),
            news,
            left_out,
        })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeFunction;
    use crate::gate::FunctionGate;

    #[test]
    fn a_storm_of_changes_is_cut_short_counted_and_hides_no_failure() {
        let now = Instant::now();
        let mut outbox = Outbox::new(true, now);
        for _ in 0..1000 {
            outbox.transition(Phase::On, Phase::HoldOff, Duration::ZERO, now);
        }
        outbox.failed(FailureKind::NoAnswer, "gone".to_owned(), now);
        let bdf = FakeFunction::new(0).bdf();
        let told: Vec<PowerNews> = outbox.take(bdf).collect();
        assert_eq!(told.len(), 201);
        let last = told.last().unwrap();
        assert_eq!(last.left_out, 800);
        assert!(matches!(last.news, News::Failed { failure: "no-answer", .. }), "{last:?}");
        assert!(outbox.is_empty());
    }

    #[test]
    fn where_nobody_listens_nothing_is_kept() {
        let now = Instant::now();
        let mut outbox = Outbox::new(false, now);
        outbox.woken(WakeCause::Pme, now);
        assert!(outbox.is_empty());
    }
}
