//! Entropy device (section 5.4): random numbers of the host's kernel.

use super::rate_limiter::RateLimiter;
use super::{Broken, Chain, Device, Event, Queues, Watcher};
use crate::config::devices::Entropy as Config;
use crate::timeline::Instant;
use rustix::rand::{GetRandomFlags, getrandom};

const KIND: u32 = 4;
const QUEUE: usize = 0;
/// Linux has one chain under way at a time.
const QUEUE_SIZE: u16 = 16;
/// Bytes that a chain gets at most. A driver has to take less than it has room for (section 5.4.6.2), and Linux
/// asks for 64 at a time.
const CHAIN_BYTES_MAX: u64 = 64 << 10;
/// Bytes after which others have their turn.
const BYTES_PER_TURN: u64 = 256 << 10;
/// Bytes that are asked of the host at a time, which it hands out whole and at once (getrandom(2)).
const PIECE: usize = 256;
/// Nanoseconds after which a host is asked again that has not started its generator yet.
const RETRY: u64 = 100_000_000;

/// A source of random numbers. It has no state but what its rate limiter counts.
#[derive(Debug)]
pub struct Entropy {
    limiter: RateLimiter,
    /// When chains that wait can go on.
    resume_at: Option<Instant>,
    /// Nobody gets anything.
    is_blank: bool,
}

impl Entropy {
    /// With these limits.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let limiter = RateLimiter::new(config.rate_limiter.as_ref(), Instant::now());
        Self { limiter, resume_at: None, is_blank: false }
    }

    /// The same without numbers, for a kernel that is booted once for many guests: what it got, and has not used,
    /// all of them would use. Its request waits for the device that takes this one's place.
    #[must_use]
    pub fn blank(self) -> Self {
        Self { is_blank: true, ..self }
    }

    fn serve_chains(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        let mut moved = 0;
        // A chain without room counts as well.
        for _ in 0..QUEUE_SIZE {
            let Some(mut chain) = queues.pop(QUEUE)? else {
                if queues.rearm(QUEUE)? {
                    continue;
                }
                return Ok(());
            };
            if chain.readable_len() > 0 {
                return Err(Broken::because("a chain has something to read for a device that reads nothing"));
            }
            let length = chain.writable_len().min(CHAIN_BYTES_MAX);
            if let Err(until) = self.limiter.take(length) {
                queues.put_back(QUEUE, chain);
                self.resume_at = Some(until);
                return Ok(());
            }
            let written = fill(&mut chain, length)?;
            if written == 0 && length > 0 {
                queues.put_back(QUEUE, chain);
                self.resume_at = Some(Instant(Instant::now().0.saturating_add(RETRY)));
                return Ok(());
            }
            queues.complete(QUEUE, chain, written)?;
            moved += u64::from(written);
            if moved >= BYTES_PER_TURN {
                break;
            }
        }
        queues.yield_turn();
        Ok(())
    }
}

/// Fills a chain with this many bytes, or as many as the host has; how many there were.
fn fill(chain: &mut Chain, length: u64) -> Result<u32, Broken> {
    let mut piece = [0; PIECE];
    let mut written = 0;
    while u64::from(written) < length {
        let left = usize::try_from(length - u64::from(written)).unwrap_or(PIECE).min(PIECE);
        let Ok(count) = getrandom(&mut piece[..left], GetRandomFlags::NONBLOCK) else { break };
        chain.write(&piece[..count])?;
        written += u32::try_from(count).unwrap_or(0);
    }
    Ok(written)
}

impl Device for Entropy {
    fn kind(&self) -> u32 {
        KIND
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn configuration(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, _: u64, _: &mut Queues, _: &Watcher) -> Result<(), Broken> {
        Ok(())
    }

    fn serve(&mut self, event: Event, queues: &mut Queues) -> Result<(), Broken> {
        if self.is_blank || event == Event::Doorbell && self.resume_at.is_some() {
            return Ok(());
        }
        self.resume_at = None;
        let result = self.serve_chains(queues);
        queues.notify(QUEUE)?;
        result
    }

    fn deadline(&self) -> Option<Instant> {
        self.resume_at
    }

    fn reset(&mut self) {
        self.resume_at = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::devices::{RateLimiter as Limits, TokenBucket};
    use crate::devices::virtio::driver::{Driver, Piece};
    use proptest::prelude::*;

    fn started() -> Driver {
        Driver::started(Entropy::new(&Config::default()))
    }

    #[test]
    fn chains_come_back_full_and_different() {
        let mut driver = started();
        let mut answers: Vec<Vec<u8>> = Vec::new();
        for _ in 0..40 {
            let used = driver.request(0, &[Piece::In(3), Piece::In(61)]);
            assert_eq!(used.written, 64);
            assert!(!answers.contains(&used.bytes), "the same bytes twice");
            answers.push(used.bytes);
        }
        assert_eq!(driver.interrupts(), 1, "the driver wants to hear of the first");
    }

    #[test]
    fn a_chain_gets_64_kib_at_most() {
        let mut driver = started();
        let used = driver.request(0, &[Piece::In(1 << 20)]);
        assert_eq!(used.written, 64 << 10);
        assert_eq!(used.bytes.len(), 1 << 20);
        assert!(used.bytes[64 << 10..].iter().all(|byte| *byte == 0), "more was written than was said");
        // 500 bytes from the end: 32 zeroes in a row are as good as impossible.
        assert!(used.bytes[(64 << 10) - 32..64 << 10].iter().any(|byte| *byte != 0));
    }

    #[test]
    fn a_queue_full_of_large_chains_is_served_in_turns() {
        let mut driver = started();
        for _ in 0..16 {
            driver.push(0, &[Piece::In(64 << 10)]);
        }
        driver.write(0x50, 0);
        assert!(driver.run(Some(0)));
        let first = std::iter::from_fn(|| driver.pop(0)).count();
        assert_eq!(first, 4, "256 KiB in a turn");
        driver.ring();
        assert_eq!(std::iter::from_fn(|| driver.pop(0)).count(), 12);
    }

    #[test]
    fn a_kernel_that_is_booted_for_many_gets_nothing() {
        let mut driver = Driver::started(Entropy::new(&Config::default()).blank());
        driver.push(0, &[Piece::In(64)]);
        driver.ring();
        assert!(driver.pop(0).is_none() && !driver.is_broken());
    }

    #[test]
    fn what_is_limited_waits() {
        let bucket = TokenBucket { size: 64, one_time_burst: None, refill_time: 10 };
        let limits = Limits { bandwidth: Some(bucket), ops: None };
        let mut driver = Driver::started(Entropy::new(&Config { rate_limiter: Some(limits) }));
        let start = Instant::now();
        for _ in 0..10 {
            driver.push(0, &[Piece::In(64)]);
        }
        driver.ring();
        let mut done = 0;
        while done < 10 {
            match driver.pop(0) {
                Some(_) => done += 1,
                None => {
                    assert!(driver.transport.deadline().is_some(), "nothing would go on");
                    driver.transport.serve_deadline();
                }
            }
        }
        // One at once, and the others 10 ms apart: a lower bound holds on any machine.
        assert!(start.0 + 80_000_000 < Instant::now().0);
    }

    #[test]
    fn chains_that_no_driver_may_offer_break_the_device() {
        let mut driver = started();
        driver.push(0, &[Piece::Out(vec![1]), Piece::In(64)]);
        driver.ring();
        assert!(driver.is_broken());
        driver.start(u64::MAX);
        assert_eq!(driver.request(0, &[Piece::In(0), Piece::In(8)]).written, 8, "a reset mends it");
        assert_eq!(driver.request(0, &[Piece::In(0)]).written, 0);
        assert!(!driver.is_broken());
    }

    proptest! {
        #[test]
        fn no_driver_harms_the_host(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            Driver::new(Entropy::new(&Config::default())).misbehave(&bytes);
        }
    }
}
