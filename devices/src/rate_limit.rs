//! How much a device may move, in bytes and in operations: token buckets with Cloud Hypervisor's settings.
//!
//! What passes may be larger than what a bucket holds: it is let through when the bucket is not empty, and paid for afterwards. So credit can be
//! negative, and over time the rate holds. There is no timer here: who may not pass is told how long to wait.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// What it holds.
    pub size: u64,
    /// What is there once, at the start, before that.
    pub one_time_burst: u64,
    /// The time in which it fills.
    pub refill_time: Duration,
}

/// Both limits of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimit {
    /// Of bytes.
    pub bandwidth: Option<Bucket>,
    /// Of operations.
    pub ops: Option<Bucket>,
}

/// A bucket at work.
#[derive(Clone, Copy, Debug)]
struct Credit {
    bucket: Bucket,
    burst: u64,
    tokens: i128,
    /// Fractions of a token, in parts of [`Bucket::refill_time`]'s nanoseconds.
    fraction: u128,
    at: Instant,
}

impl Credit {
    fn new(bucket: Bucket, now: Instant) -> Self {
        Self { bucket, burst: bucket.one_time_burst, tokens: bucket.size.into(), fraction: 0, at: now }
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_nanos();
        self.at = self.at.max(now);
        let period = self.bucket.refill_time.as_nanos().max(1);
        let earned = passed.saturating_mul(self.bucket.size.into()).saturating_add(self.fraction);
        self.fraction = earned % period;
        let tokens = i128::try_from(earned / period).unwrap_or(i128::MAX);
        let full = i128::from(self.bucket.size);
        self.tokens = self.tokens.saturating_add(tokens).min(full);
        if self.tokens == full {
            self.fraction = 0;
        }
    }

    /// How long until something may pass.
    fn wait(&mut self, now: Instant) -> Option<Duration> {
        self.refill(now);
        if self.burst > 0 || self.tokens > 0 {
            return None;
        }
        let missing = 1_i128.saturating_sub(self.tokens).unsigned_abs();
        let period = self.bucket.refill_time.as_nanos().max(1);
        let nanos = missing.saturating_mul(period).saturating_sub(self.fraction);
        let nanos = nanos.div_ceil(u128::from(self.bucket.size.max(1)));
        Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)).max(Duration::from_nanos(1)))
    }

    fn pay(&mut self, tokens: u64) {
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        self.tokens = self.tokens.saturating_sub((tokens - from_burst).into());
    }
}

/// The limits at work. Several queues can share them.
#[derive(Debug)]
pub struct Limiter {
    credit: Mutex<[Option<Credit>; 2]>,
}

impl Limiter {
    /// From full buckets; `None` if nothing is limited.
    pub fn new(limit: &RateLimit, now: Instant) -> Option<Self> {
        // A bucket of no size or no time limits nothing (as in Cloud Hypervisor).
        let credit = |bucket: Option<Bucket>| {
            let bucket = bucket.filter(|bucket| bucket.size > 0 && !bucket.refill_time.is_zero())?;
            Some(Credit::new(bucket, now))
        };
        let credit = [credit(limit.bandwidth), credit(limit.ops)];
        credit.iter().any(Option::is_some).then(|| Self { credit: Mutex::new(credit) })
    }

    fn credit(&self) -> MutexGuard<'_, [Option<Credit>; 2]> {
        self.credit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether something may pass now; `Err` says how long to wait before asking again.
    ///
    /// # Errors
    /// Not now.
    pub fn ready(&self, now: Instant) -> Result<(), Duration> {
        let waits = self.credit().each_mut().map(|credit| credit.as_mut().and_then(|c| c.wait(now)));
        match waits.into_iter().flatten().max() {
            Some(wait) => Err(wait),
            None => Ok(()),
        }
    }

    /// So much has passed.
    pub fn pay(&self, bytes: u64, ops: u64) {
        let mut credit = self.credit();
        for (credit, tokens) in credit.iter_mut().zip([bytes, ops]) {
            if let Some(credit) = credit {
                credit.pay(tokens);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn bucket(size: u64) -> Option<Bucket> {
        Some(Bucket { size, one_time_burst: 0, refill_time: SECOND })
    }

    /// What passes in `time`, if as much as possible is tried in pieces of `piece` bytes.
    fn passed(limit: &RateLimit, piece: u64, time: Duration) -> u64 {
        let start = Instant::now();
        let limiter = Limiter::new(limit, start).unwrap();
        let (mut now, mut sum) = (start, 0);
        while now < start + time {
            match limiter.ready(now) {
                Ok(()) => {
                    limiter.pay(piece, 1);
                    sum += piece;
                }
                Err(wait) => now += wait,
            }
        }
        sum
    }

    #[test]
    fn over_time_the_rate_holds_for_pieces_of_any_size() {
        let limit = RateLimit { bandwidth: bucket(1_000_000), ops: None };
        for piece in [1_000, 64_000, 3_000_000] {
            let bytes = passed(&limit, piece, 20 * SECOND);
            // The full bucket at the start, and at most one piece too many.
            assert!((20_000_000..=21_000_000 + piece).contains(&bytes), "{piece}: {bytes}");
        }
    }

    #[test]
    fn the_tighter_of_both_limits_counts() {
        let limit = RateLimit { bandwidth: bucket(1 << 40), ops: bucket(100) };
        let bytes = passed(&limit, 10, 10 * SECOND);
        assert!((10_000..=11_010).contains(&bytes), "{bytes}");
    }

    #[test]
    fn a_burst_is_there_once() {
        let one = Bucket { size: 10, one_time_burst: 1_000, refill_time: SECOND };
        let limit = RateLimit { bandwidth: None, ops: Some(one) };
        let start = Instant::now();
        let limiter = Limiter::new(&limit, start).unwrap();
        let take = |now| {
            let mut count = 0;
            while limiter.ready(now).is_ok() {
                limiter.pay(0, 1);
                count += 1;
            }
            count
        };
        assert_eq!((take(start), take(start)), (1_010, 0));
        assert_eq!(limiter.ready(start), Err(SECOND / 10));
        assert_eq!(take(start + 100 * SECOND), 10);
    }

    #[test]
    fn nothing_is_limited_by_a_bucket_of_no_size_or_no_time() {
        let now = Instant::now();
        assert!(Limiter::new(&RateLimit::default(), now).is_none());
        let timeless = Bucket { size: 5, one_time_burst: 0, refill_time: Duration::ZERO };
        assert!(Limiter::new(&RateLimit { bandwidth: bucket(0), ops: Some(timeless) }, now).is_none());
    }

    #[test]
    fn numbers_as_large_as_can_be_do_no_harm() {
        let huge =
            Bucket { size: u64::MAX, one_time_burst: u64::MAX, refill_time: Duration::from_millis(u64::MAX) };
        let start = Instant::now();
        let limiter = Limiter::new(&RateLimit { bandwidth: Some(huge), ops: Some(huge) }, start).unwrap();
        for _ in 0..4 {
            limiter.pay(u64::MAX, u64::MAX);
        }
        assert!(limiter.ready(start + SECOND).is_err());
    }
}
