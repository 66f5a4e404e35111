//! Limits of devices.

use serde::{Deserialize, Serialize};

/// Limits of a device. What goes beyond waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimiter {
    /// Of bytes.
    pub bandwidth: Option<TokenBucket>,
    /// Of requests.
    pub ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// Whether it limits anything.
    #[must_use]
    pub fn is_limit(&self) -> bool {
        [self.bandwidth, self.ops].into_iter().flatten().any(|bucket| bucket.is_limit())
    }
}

/// A bucket of tokens, which fills up evenly. One whose size or refill time is 0 limits nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens that it holds.
    pub size: u64,
    /// Tokens that it has once, beside those.
    #[serde(default)]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which an empty bucket fills up.
    pub refill_time: u64,
}

impl TokenBucket {
    /// Whether it limits anything.
    #[must_use]
    pub const fn is_limit(&self) -> bool {
        self.size > 0 && self.refill_time > 0
    }
}
