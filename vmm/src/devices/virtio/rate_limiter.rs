//! Rate limits: token buckets that refill continuously.
//!
//! A request may take more tokens than a bucket holds, as long as the bucket is not empty; the next request waits until
//! the debt is paid. Therefore a request larger than its bucket passes, and the average rate is the configured one.

use crate::config::devices::{self, TokenBucket};
use crate::timeline::Instant;

const NANOSECONDS: i128 = 1_000_000;

/// One token bucket. Each token consists of as many parts as the refill time has nanoseconds, so that no fraction is
/// lost to rounding.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    /// Parts that are added per nanosecond: the size of the bucket in tokens.
    rate: i128,
    /// Parts per token.
    parts: i128,
    /// Available parts; negative when the bucket is in debt.
    balance: i128,
    /// Parts of the one-time burst, which are taken first.
    burst: i128,
    /// Time of the last refill.
    filled: Instant,
}

impl Bucket {
    /// Creates a full bucket. Requires [`TokenBucket::is_limit`].
    fn new(config: TokenBucket, now: Instant) -> Self {
        let rate = i128::from(config.size);
        // 50 days have the same effect as any longer time, and avoid an overflow of the multiplication.
        let parts = i128::from(config.refill_time.min(u32::MAX.into())) * NANOSECONDS;
        let burst = i128::from(config.one_time_burst.unwrap_or(0)) * parts;
        Self { rate, parts, balance: rate * parts, burst, filled: now }
    }

    fn fill(&mut self, now: Instant) {
        let added = i128::from(now.since(self.filled)).saturating_mul(self.rate);
        self.balance = self.balance.saturating_add(added).min(self.rate * self.parts);
        self.filled = self.filled.max(now);
    }

    /// The time at which the bucket has a token again; `None` when it has one.
    fn empty_until(&self) -> Option<Instant> {
        if self.burst > 0 || self.balance > 0 {
            return None;
        }
        let wait = (1 - self.balance + self.rate - 1) / self.rate;
        Some(Instant(self.filled.0.saturating_add(u64::try_from(wait).unwrap_or(u64::MAX))))
    }

    fn take(&mut self, tokens: u64) {
        let wanted = i128::from(tokens) * self.parts;
        let from_burst = wanted.min(self.burst);
        self.burst -= from_burst;
        self.balance = self.balance.saturating_sub(wanted - from_burst);
    }
}

/// The rate limits of one direction of a device.
#[derive(Clone, Copy, Debug, Default)]
pub struct RateLimiter {
    bytes: Option<Bucket>,
    requests: Option<Bucket>,
}

impl RateLimiter {
    /// Creates full buckets. There are no limits for a missing configuration or one without a rate.
    #[must_use]
    pub fn new(config: Option<&devices::RateLimiter>, now: Instant) -> Self {
        let bucket = |config: Option<TokenBucket>| {
            config.filter(TokenBucket::is_limit).map(|config| Bucket::new(config, now))
        };
        config.map_or_else(Self::default, |config| Self {
            bytes: bucket(config.bandwidth),
            requests: bucket(config.ops),
        })
    }

    /// Takes the tokens of one request of `bytes` bytes.
    ///
    /// # Errors
    /// The time until which the request has to wait. No tokens are taken in this case.
    pub fn take(&mut self, bytes: u64) -> Result<(), Instant> {
        self.ready()?;
        self.charge(bytes);
        Ok(())
    }

    /// Checks whether a request whose length is not known yet may start.
    ///
    /// # Errors
    /// The time until which the request has to wait.
    pub fn ready(&mut self) -> Result<(), Instant> {
        if self.bytes.is_none() && self.requests.is_none() {
            return Ok(());
        }
        self.ready_at(Instant::now())
    }

    /// Takes the tokens of one request of `bytes` bytes, even if the buckets go into debt: to be called after
    /// [`Self::ready`].
    pub fn charge(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.requests {
            bucket.take(1);
        }
    }

    fn ready_at(&mut self, now: Instant) -> Result<(), Instant> {
        let mut until = None;
        for bucket in [&mut self.bytes, &mut self.requests].into_iter().flatten() {
            bucket.fill(now);
            until = until.max(bucket.empty_until());
        }
        until.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(bandwidth: Option<(u64, u64, u64)>, ops: Option<(u64, u64, u64)>) -> RateLimiter {
        let bucket =
            |(size, burst, refill_time)| TokenBucket { size, one_time_burst: Some(burst), refill_time };
        let config = devices::RateLimiter { bandwidth: bandwidth.map(bucket), ops: ops.map(bucket) };
        RateLimiter::new(Some(&config), Instant(0))
    }

    impl RateLimiter {
        fn take_at(&mut self, bytes: u64, now: Instant) -> Result<(), Instant> {
            self.ready_at(now)?;
            self.charge(bytes);
            Ok(())
        }
    }

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn without_limits_everything_passes() {
        let mut limiter = RateLimiter::new(None, Instant(0));
        assert_eq!(limiter.take(u64::MAX), Ok(()));
    }

    #[test]
    fn a_bucket_without_size_or_refill_time_is_no_limit() {
        for bucket in [(0, 0, 0), (0, 5, 100), (100, 5, 0)] {
            let mut limiter = limiter(Some(bucket), Some(bucket));
            for _ in 0..1000 {
                assert_eq!(limiter.take_at(1 << 20, Instant(0)), Ok(()), "{bucket:?}");
            }
        }
    }

    #[test]
    fn requests_pass_at_their_rate() {
        // Two pass immediately and one on credit, then one every tenth of a second.
        let mut limiter = limiter(None, Some((2, 0, 200)));
        let mut now = 0;
        let mut passed = 0;
        while now < SECOND {
            match limiter.take_at(1 << 40, Instant(now)) {
                Ok(()) => passed += 1,
                Err(until) => {
                    assert!(until.0 > now, "the wait time is in the future");
                    now = until.0;
                }
            }
        }
        assert_eq!(passed, 2 + 1 + 9);
    }

    #[test]
    fn bytes_pass_at_their_rate_in_requests_larger_than_the_bucket() {
        let mut limiter = limiter(Some((1000, 0, 100)), None);
        assert_eq!(limiter.take_at(10_000, Instant(0)), Ok(()));
        // 9000 bytes of debt at 10,000 per second, plus one part.
        assert_eq!(limiter.take_at(1, Instant(0)), Err(Instant(SECOND * 9 / 10 + 1)));
        assert_eq!(limiter.take_at(1, Instant(SECOND * 9 / 10 + 1)), Ok(()));
    }

    #[test]
    fn a_burst_is_spent_once() {
        let mut limiter = limiter(Some((10, 90, 1000)), None);
        for _ in 0..10 {
            assert_eq!(limiter.take_at(10, Instant(0)), Ok(()));
        }
        assert!(limiter.take_at(10, Instant(0)).is_err());
        assert_eq!(limiter.take_at(10, Instant(3600 * SECOND)), Ok(()), "full again");
        assert!(
            limiter.take_at(10, Instant(3600 * SECOND)).is_err(),
            "the bucket holds no more than its size"
        );
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        let max = (u64::MAX, u64::MAX, u64::MAX);
        let mut limiter = limiter(Some(max), Some(max));
        for _ in 0..3 {
            let _ = limiter.take_at(u64::MAX, Instant(u64::MAX));
        }
    }
}
