//! Limits of what a disk or network device may move (Cloud Hypervisor's `RateLimiterConfig`).

use std::time::Duration;

use devices::rate_limit::{Bucket, RateLimit};
use serde::{Deserialize, Serialize};

use super::option_parser::{OptionError, Options};

/// A token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBucketConfig {
    /// What it holds: bytes or operations.
    pub size: u64,
    /// What is there once, beside that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// The time in which it fills, in milliseconds.
    pub refill_time: u64,
}

/// Both limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimiterConfig {
    /// Of bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucketConfig>,
    /// Of operations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucketConfig>,
}

impl TokenBucketConfig {
    fn bucket(self) -> Bucket {
        Bucket {
            size: self.size,
            one_time_burst: self.one_time_burst.unwrap_or(0),
            refill_time: Duration::from_millis(self.refill_time),
        }
    }
}

impl RateLimiterConfig {
    /// From the keys `bw_*` and `ops_*`; a limit has a size and a time, or is none (as in Cloud Hypervisor).
    pub fn from_options(options: &Options) -> Result<Option<Self>, OptionError> {
        let bucket = |keys: [&str; 3]| {
            let [size, burst, time] = keys;
            let (size, burst, time): (u64, Option<u64>, u64) =
                (options.get_or_default(size)?, options.get(burst)?, options.get_or_default(time)?);
            let given = size > 0 && time > 0;
            Ok::<_, OptionError>(given.then_some(TokenBucketConfig {
                size,
                one_time_burst: burst,
                refill_time: time,
            }))
        };
        let config = Self {
            bandwidth: bucket(["bw_size", "bw_one_time_burst", "bw_refill_time"])?,
            ops: bucket(["ops_size", "ops_one_time_burst", "ops_refill_time"])?,
        };
        Ok(config.limits().then_some(config))
    }

    /// Whether anything is limited.
    pub fn limits(&self) -> bool {
        self.bandwidth.is_some() || self.ops.is_some()
    }

    /// As a device takes it.
    pub fn rate_limit(&self) -> RateLimit {
        RateLimit {
            bandwidth: self.bandwidth.map(TokenBucketConfig::bucket),
            ops: self.ops.map(TokenBucketConfig::bucket),
        }
    }
}
