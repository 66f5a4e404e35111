//! Rate limits: buckets of tokens that fill up evenly.
//!
//! Whoever finds tokens in a bucket may take more than there are; the next one waits until the debt is paid.
//! So a request larger than its bucket passes, and the rate over time is what was asked for.

use crate::config::devices::{self, TokenBucket};
use crate::timeline::Instant;

const NANOSECONDS: i128 = 1_000_000;

/// One bucket. Tokens are counted in parts, of which a token has as many as the refill time has nanoseconds,
/// so that nothing is lost to rounding.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    /// Parts that come in a nanosecond: the bucket's size.
    rate: i128,
    /// Parts of a token.
    parts: i128,
    /// Parts that there are; less than none where more was taken.
    balance: i128,
    /// Parts that are there once, and are taken first.
    burst: i128,
    filled: Instant,
}

impl Bucket {
    /// A full one, for a configuration that is a limit.
    fn new(config: TokenBucket, now: Instant) -> Self {
        let rate = i128::from(config.size);
        // 50 days are as good as any longer time, and leave room to multiply.
        let parts = i128::from(config.refill_time.min(u32::MAX.into())) * NANOSECONDS;
        let burst = i128::from(config.one_time_burst.unwrap_or(0)) * parts;
        Self { rate, parts, balance: rate * parts, burst, filled: now }
    }

    fn fill(&mut self, now: Instant) {
        let added = i128::from(now.since(self.filled)).saturating_mul(self.rate);
        self.balance = self.balance.saturating_add(added).min(self.rate * self.parts);
        self.filled = self.filled.max(now);
    }

    /// When there will be a token, if there is none.
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

/// The limits of one direction of a device.
#[derive(Clone, Copy, Debug, Default)]
pub struct RateLimiter {
    bytes: Option<Bucket>,
    requests: Option<Bucket>,
}

impl RateLimiter {
    /// Full buckets; no limits where none are configured.
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

    /// Takes one request of so many bytes.
    ///
    /// # Errors
    /// When it has to wait, and until when. Nothing was taken then.
    pub fn take(&mut self, bytes: u64) -> Result<(), Instant> {
        self.ready()?;
        self.charge(bytes);
        Ok(())
    }

    /// Whether a request may go on of which nobody knows yet how long it is.
    ///
    /// # Errors
    /// When it has to wait, and until when.
    pub fn ready(&mut self) -> Result<(), Instant> {
        if self.bytes.is_none() && self.requests.is_none() {
            return Ok(());
        }
        self.ready_at(Instant::now())
    }

    /// Takes one request of so many bytes, however many there are: after [`Self::ready`].
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
        // Two at once and one on credit, then one every tenth of a second.
        let mut limiter = limiter(None, Some((2, 0, 200)));
        let mut now = 0;
        let mut passed = 0;
        while now < SECOND {
            match limiter.take_at(1 << 40, Instant(now)) {
                Ok(()) => passed += 1,
                Err(until) => {
                    assert!(until.0 > now, "time goes on");
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
        // 9000 bytes of debt at 10,000 in a second, and one part more.
        assert_eq!(limiter.take_at(1, Instant(0)), Err(Instant(SECOND * 9 / 10 + 1)));
        assert_eq!(limiter.take_at(1, Instant(SECOND * 9 / 10 + 1)), Ok(()));
    }

    #[test]
    fn a_burst_is_there_once() {
        let mut limiter = limiter(Some((10, 90, 1000)), None);
        for _ in 0..10 {
            assert_eq!(limiter.take_at(10, Instant(0)), Ok(()));
        }
        assert!(limiter.take_at(10, Instant(0)).is_err());
        assert_eq!(limiter.take_at(10, Instant(3600 * SECOND)), Ok(()), "full again");
        assert!(limiter.take_at(10, Instant(3600 * SECOND)).is_err(), "and not fuller than full");
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
