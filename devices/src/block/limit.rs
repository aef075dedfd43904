//! Rate limits: token buckets for bytes and for operations, of one disk or shared by a group.
//!
//! Nothing runs while nobody is held up: credit is counted when it is asked for, and who must wait is told how long.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// One bucket: `size` tokens, earned anew every `refill`, and once at the start some more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BucketSpec {
    /// Tokens it holds.
    pub size: u64,
    /// Tokens that there are once beside them.
    pub one_time_burst: u64,
    /// The time in which an empty bucket is full again.
    pub refill: Duration,
}

/// Both limits; what is `None` is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimiterSpec {
    /// Bytes.
    pub bandwidth: Option<BucketSpec>,
    /// Operations.
    pub ops: Option<BucketSpec>,
}

/// Tokens of one kind.
#[derive(Debug)]
struct Bucket {
    size: u128,
    burst: u128,
    refill: u128,
    /// Tokens times nanoseconds of `refill`, so that nothing is lost by rounding. Below zero after an access of more than `size`.
    level: i128,
    at: Instant,
}

impl Bucket {
    /// `None` if it limits nothing.
    fn new(spec: BucketSpec, now: Instant) -> Option<Self> {
        let (size, refill) = (u128::from(spec.size), spec.refill.as_nanos());
        if size == 0 || refill == 0 {
            return None;
        }
        let mut bucket = Self { size, burst: spec.one_time_burst.into(), refill, level: 0, at: now };
        bucket.level = bucket.scaled(size);
        Some(bucket)
    }

    fn scaled(&self, tokens: u128) -> i128 {
        i128::try_from(tokens.saturating_mul(self.refill)).unwrap_or(i128::MAX)
    }

    fn earn(&mut self, now: Instant) {
        let past = now.saturating_duration_since(self.at).as_nanos();
        self.at = self.at.max(now);
        let earned = i128::try_from(past.saturating_mul(self.size)).unwrap_or(i128::MAX);
        self.level = self.level.saturating_add(earned).min(self.scaled(self.size));
    }

    /// How long until `tokens` can be taken; nothing if at once. Of more than it can ever hold, a full bucket is enough.
    fn wait(&self, tokens: u128) -> Duration {
        let wanted = tokens.saturating_sub(self.burst).min(self.size);
        let lacking = self.scaled(wanted).saturating_sub(self.level);
        let lacking = u128::try_from(lacking).unwrap_or(0);
        Duration::from_nanos(u64::try_from(lacking.div_ceil(self.size)).unwrap_or(u64::MAX))
    }

    fn take(&mut self, tokens: u128) {
        let from_burst = tokens.min(self.burst);
        self.burst -= from_burst;
        self.level = self.level.saturating_sub(self.scaled(tokens - from_burst));
    }
}

#[derive(Debug)]
struct Buckets {
    bandwidth: Option<Bucket>,
    ops: Option<Bucket>,
}

/// Limits of a disk, or of all disks of a group.
#[derive(Debug)]
pub struct Limiter(Mutex<Buckets>);

impl Limiter {
    /// Full buckets; `None` if nothing is limited.
    pub fn new(spec: LimiterSpec, now: Instant) -> Option<Self> {
        let bandwidth = spec.bandwidth.and_then(|spec| Bucket::new(spec, now));
        let ops = spec.ops.and_then(|spec| Bucket::new(spec, now));
        if bandwidth.is_none() && ops.is_none() {
            return None;
        }
        Some(Self(Mutex::new(Buckets { bandwidth, ops })))
    }

    /// Takes one operation of `bytes`.
    ///
    /// # Errors
    /// Not now: how long to wait before asking again.
    pub fn take(&self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Buckets { bandwidth, ops } = &mut *buckets;
        let mut both = [(bandwidth, u128::from(bytes)), (ops, 1)];
        let mut longest = Duration::ZERO;
        for (bucket, tokens) in &mut both {
            if let Some(bucket) = bucket {
                bucket.earn(now);
                longest = longest.max(bucket.wait(*tokens));
            }
        }
        if !longest.is_zero() {
            return Err(longest);
        }
        for (bucket, tokens) in both {
            if let Some(bucket) = bucket {
                bucket.take(tokens);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn spec(size: u64, one_time_burst: u64) -> BucketSpec {
        BucketSpec { size, one_time_burst, refill: SECOND }
    }

    fn limiter(bandwidth: Option<BucketSpec>, ops: Option<BucketSpec>, now: Instant) -> Limiter {
        Limiter::new(LimiterSpec { bandwidth, ops }, now).unwrap()
    }

    #[test]
    fn a_full_bucket_is_spent_at_once_and_then_the_rate_counts() {
        let now = Instant::now();
        let limiter = limiter(None, Some(spec(10, 0)), now);
        assert_eq!((0..20).filter(|_| limiter.take(4096, now).is_ok()).count(), 10);
        assert_eq!(limiter.take(0, now), Err(SECOND / 10));
        // Ten seconds in small steps: what is left over of a step is not lost.
        let done = (0..10_000_u32).filter(|step| limiter.take(0, now + SECOND * *step / 1000).is_ok()).count();
        assert_eq!(done, 99);
    }

    #[test]
    fn an_access_of_more_than_the_bucket_holds_goes_when_it_is_full_and_is_paid_for_afterwards() {
        let now = Instant::now();
        let limiter = limiter(Some(spec(1000, 0)), None, now);
        assert_eq!(limiter.take(5000, now), Ok(()));
        assert_eq!(limiter.take(1, now), Err(SECOND * 4001 / 1000));
        assert_eq!(limiter.take(5000, now + SECOND * 4), Err(SECOND));
        assert_eq!(limiter.take(5000, now + SECOND * 5), Ok(()));
    }

    #[test]
    fn the_burst_is_there_once() {
        let now = Instant::now();
        let limiter = limiter(None, Some(spec(2, 5)), now);
        assert_eq!((0..20).filter(|_| limiter.take(0, now).is_ok()).count(), 7);
        let later = now + SECOND * 100;
        assert_eq!((0..20).filter(|_| limiter.take(0, later).is_ok()).count(), 2);
    }

    #[test]
    fn the_narrower_limit_counts_and_what_is_refused_costs_nothing() {
        let now = Instant::now();
        let limiter = limiter(Some(spec(1000, 0)), Some(spec(3, 0)), now);
        assert_eq!(limiter.take(900, now), Ok(()));
        assert_eq!(limiter.take(200, now), Err(SECOND / 10));
        assert_eq!([limiter.take(50, now), limiter.take(50, now)], [Ok(()); 2], "the refused one took no operation");
        assert!(limiter.take(0, now).is_err());
    }

    #[test]
    fn a_bucket_of_no_size_or_no_time_is_no_limit() {
        let now = Instant::now();
        let none = BucketSpec { size: 5, one_time_burst: 0, refill: Duration::ZERO };
        assert!(Limiter::new(LimiterSpec { bandwidth: Some(none), ops: Some(spec(0, 9)) }, now).is_none());
    }
}
