//! Rate limits of devices.

use serde::{Deserialize, Serialize};

/// Rate limits of a device or of one direction. Requests that exceed a limit are delayed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimiter {
    /// Limit of bytes.
    pub bandwidth: Option<TokenBucket>,
    /// Limit of requests.
    pub ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// Whether there is an effective limit.
    #[must_use]
    pub fn is_limit(&self) -> bool {
        [self.bandwidth, self.ops].into_iter().flatten().any(|bucket| bucket.is_limit())
    }
}

/// A token bucket, which refills continuously. A bucket with size or refill time 0 is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Capacity in tokens: bytes or requests.
    pub size: u64,
    /// Additional tokens that are available once and not refilled.
    #[serde(default)]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which an empty bucket refills completely.
    pub refill_time: u64,
}

impl TokenBucket {
    /// Whether the bucket is an effective limit.
    #[must_use]
    pub const fn is_limit(&self) -> bool {
        self.size > 0 && self.refill_time > 0
    }
}
