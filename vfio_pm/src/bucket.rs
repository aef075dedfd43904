//! A token bucket: how often something may happen, on average and in a row. No timer: credit is counted when it is asked for.

use std::time::{Duration, Instant};

const MINUTE: Duration = Duration::from_secs(60);

/// How often something may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Times in a minute, for ever; 0: without limit.
    pub per_minute: u32,
    /// Times in a row after a long rest; at least 1 counts.
    pub burst: u32,
}

impl Rate {
    /// Without limit.
    pub const UNLIMITED: Self = Self { per_minute: 0, burst: 1 };

    /// The time in which one use is earned; `None` without limit.
    fn interval(self) -> Option<Duration> {
        MINUTE.checked_div(self.per_minute)
    }
}

/// Credit of one user of a [`Rate`]. Starts full.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bucket {
    rate: Rate,
    /// Credit as the time in which it was earned.
    credit: Duration,
    at: Instant,
}

impl Bucket {
    pub(crate) fn new(rate: Rate, now: Instant) -> Self {
        let mut bucket = Self { rate, credit: Duration::ZERO, at: now };
        bucket.credit = bucket.capacity();
        bucket
    }

    /// Another rate from now on. Credit is kept as far as it fits; what was unlimited starts full.
    pub(crate) fn set_rate(&mut self, rate: Rate, now: Instant) {
        if self.rate.interval().is_none() {
            *self = Self::new(rate, now);
            return;
        }
        self.earn(now);
        let uses = self.interval().map_or(0, |interval| self.credit.as_nanos() / interval.as_nanos().max(1));
        self.rate = rate;
        let kept =
            self.interval().unwrap_or_default().saturating_mul(u32::try_from(uses).unwrap_or(u32::MAX));
        self.credit = kept.min(self.capacity());
    }

    /// Takes one use; `Err` says how long until there is one.
    pub(crate) fn take(&mut self, now: Instant) -> Result<(), Duration> {
        let Some(interval) = self.interval() else { return Ok(()) };
        self.earn(now);
        match self.credit.checked_sub(interval) {
            Some(left) => {
                self.credit = left;
                Ok(())
            }
            None => Err(interval.saturating_sub(self.credit)),
        }
    }

    /// Whether at least half of the credit is there.
    pub(crate) fn is_rested(&mut self, now: Instant) -> bool {
        self.earn(now);
        self.credit.saturating_mul(2) >= self.capacity()
    }

    fn interval(&self) -> Option<Duration> {
        self.rate.interval()
    }

    fn capacity(&self) -> Duration {
        self.interval().unwrap_or_default().saturating_mul(self.rate.burst.max(1))
    }

    fn earn(&mut self, now: Instant) {
        let earned = now.saturating_duration_since(self.at);
        self.at = self.at.max(now);
        self.credit = self.credit.saturating_add(earned).min(self.capacity());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate { per_minute: 60, burst: 3 };

    #[test]
    fn a_burst_is_free_and_then_the_rate_counts() {
        let start = Instant::now();
        let mut bucket = Bucket::new(RATE, start);
        assert_eq!([0; 3].map(|_| bucket.take(start)), [Ok(()); 3]);
        assert_eq!(bucket.take(start), Err(Duration::from_secs(1)));
        let later = start + Duration::from_millis(400);
        assert_eq!(bucket.take(later), Err(Duration::from_millis(600)));
        assert_eq!(bucket.take(start + Duration::from_secs(1)), Ok(()));
    }

    #[test]
    fn credit_never_grows_past_the_burst() {
        let start = Instant::now();
        let mut bucket = Bucket::new(RATE, start);
        let later = start + Duration::from_secs(3600);
        assert_eq!((0..10).filter(|_| bucket.take(later).is_ok()).count(), 3);
        assert!(!bucket.is_rested(later));
        assert!(bucket.is_rested(later + Duration::from_secs(2)));
    }

    #[test]
    fn a_rate_of_zero_is_no_limit_and_a_burst_of_zero_still_lets_one_through() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Rate::UNLIMITED, start);
        assert!((0..10_000).all(|_| bucket.take(start).is_ok()));
        let mut bucket = Bucket::new(Rate { per_minute: 1, burst: 0 }, start);
        assert!(bucket.take(start).is_ok());
        assert!(bucket.take(start).is_err());
    }

    #[test]
    fn a_new_rate_keeps_what_was_left_and_never_more_than_fits() {
        let start = Instant::now();
        let mut bucket = Bucket::new(RATE, start);
        bucket.take(start).unwrap();
        bucket.set_rate(Rate { per_minute: 6, burst: 10 }, start);
        assert_eq!((0..10).filter(|_| bucket.take(start).is_ok()).count(), 2);
        bucket.set_rate(Rate::UNLIMITED, start);
        bucket.set_rate(Rate { per_minute: 6, burst: 4 }, start);
        assert_eq!((0..10).filter(|_| bucket.take(start).is_ok()).count(), 4);
    }
}
