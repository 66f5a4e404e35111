//! Entropy device (section 5.4): random numbers of the host's kernel (getrandom(2)).

use super::backend::{Attach, Backend};
use super::rate_limiter::RateLimiter;
use super::{BackendError, Chain, Device, DeviceError, Event, Queues, Watcher};
use crate::config::devices::Entropy as Config;
use crate::timeline::Instant;
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::GuestAddress;

const KIND: u32 = 4;
const QUEUE: usize = 0;
/// Linux has one chain in flight at a time.
const QUEUE_SIZE: u16 = 16;
/// Maximum number of bytes per chain. A driver must accept a shorter reply than its buffer (section 5.4.6.2), and Linux
/// requests 64 bytes at a time.
const CHAIN_BYTES_MAX: u64 = 64 << 10;
/// Bytes after which a call ends and other devices are served.
const BUDGET_BYTES: u64 = 256 << 10;
/// Bytes per getrandom(2) call. Up to 256 bytes are returned completely and without interruption.
const CHUNK: usize = 256;
/// Nanoseconds after which the host is asked again when its generator is not initialized yet.
const RETRY: u64 = 100_000_000;

/// A virtio entropy device. Its rate limiter is its only state.
#[derive(Debug)]
pub struct Entropy {
    limiter: RateLimiter,
    /// Time at which waiting chains are served; `None` when no chain waits.
    resume_at: Option<Instant>,
    /// Whether requests wait until this device is replaced, see [`Self::placeholder`].
    is_placeholder: bool,
}

impl Entropy {
    /// Creates a device with the rate limits of its configuration.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let limiter = RateLimiter::new(config.rate_limiter.as_ref(), Instant::now());
        Self { limiter, resume_at: None, is_placeholder: false }
    }

    /// Makes the device a placeholder, with which a kernel is pre-booted: it completes no request, because random
    /// numbers that the kernel has received and not used would be the same in all later guests. The kernel's request
    /// waits for the device that replaces this one.
    #[must_use]
    pub fn placeholder(self) -> Self {
        Self { is_placeholder: true, ..self }
    }

    fn serve_chains(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        let mut moved = 0;
        // A chain of zero bytes counts as well.
        for _ in 0..QUEUE_SIZE {
            let Some(mut chain) = queues.pop(QUEUE)? else {
                if queues.enable_notification(QUEUE)? {
                    continue;
                }
                return Ok(());
            };
            if chain.readable_len() > 0 {
                return Err(DeviceError::new(
                    "a chain has a readable descriptor, but the entropy device only writes",
                ));
            }
            let length = chain.writable_len().min(CHAIN_BYTES_MAX);
            if let Err(until) = self.limiter.take(length) {
                queues.undo_pop(QUEUE, chain);
                self.resume_at = Some(until);
                return Ok(());
            }
            let written = fill(&mut chain, length)?;
            if written == 0 && length > 0 {
                queues.undo_pop(QUEUE, chain);
                self.resume_at = Some(Instant(Instant::now().0.saturating_add(RETRY)));
                return Ok(());
            }
            queues.complete(QUEUE, chain, written)?;
            moved += u64::from(written);
            if moved >= BUDGET_BYTES {
                break;
            }
        }
        queues.reschedule();
        Ok(())
    }
}

impl Attach for Config {
    fn open(&self) -> Result<Backend, BackendError> {
        Ok(Backend::Host)
    }

    fn create(&self, backend: Backend, _: GuestAddress) -> Result<Box<dyn Device>, BackendError> {
        let device = Entropy::new(self);
        match backend {
            Backend::Host => Ok(Box::new(device)),
            Backend::Nothing => Ok(Box::new(device.placeholder())),
            other => Err(other.mismatch()),
        }
    }
}

/// Fills a chain with `length` bytes, or fewer if the host has no more; returns their number.
fn fill(chain: &mut Chain, length: u64) -> Result<u32, DeviceError> {
    let mut chunk = [0; CHUNK];
    let mut written = 0;
    while u64::from(written) < length {
        let left = usize::try_from(length - u64::from(written)).unwrap_or(CHUNK).min(CHUNK);
        let Ok(count) = getrandom(&mut chunk[..left], GetRandomFlags::NONBLOCK) else { break };
        chain.write(&chunk[..count])?;
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

    fn activate(&mut self, _: u64, _: &mut Queues, _: &Watcher) -> Result<(), DeviceError> {
        Ok(())
    }

    fn serve(&mut self, event: Event, queues: &mut Queues) -> Result<(), DeviceError> {
        if self.is_placeholder || event == Event::Doorbell && self.resume_at.is_some() {
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
    fn chains_are_filled_with_different_bytes() {
        let mut driver = started();
        let mut answers: Vec<Vec<u8>> = Vec::new();
        for _ in 0..40 {
            let used = driver.request(0, &[Piece::In(3), Piece::In(61)]);
            assert_eq!(used.written, 64);
            assert!(!answers.contains(&used.bytes), "the same bytes twice");
            answers.push(used.bytes);
        }
        assert_eq!(driver.interrupts(), 1, "the driver is interrupted for the first");
    }

    #[test]
    fn a_chain_gets_at_most_64_kib() {
        let mut driver = started();
        let used = driver.request(0, &[Piece::In(1 << 20)]);
        assert_eq!(used.written, 64 << 10);
        assert_eq!(used.bytes.len(), 1 << 20);
        assert!(used.bytes[64 << 10..].iter().all(|byte| *byte == 0), "more was written than reported");
        // The last bytes of the first 64 KiB: 32 random zeroes in a row are practically impossible.
        assert!(used.bytes[(64 << 10) - 32..64 << 10].iter().any(|byte| *byte != 0));
    }

    #[test]
    fn a_call_ends_after_256_kib() {
        let mut driver = started();
        for _ in 0..16 {
            driver.push(0, &[Piece::In(64 << 10)]);
        }
        driver.write(0x50, 0);
        assert!(driver.run(Some(0)));
        let first = std::iter::from_fn(|| driver.pop(0)).count();
        assert_eq!(first, 4, "256 KiB per call");
        driver.ring();
        assert_eq!(std::iter::from_fn(|| driver.pop(0)).count(), 12);
    }

    #[test]
    fn a_placeholder_completes_no_request() {
        let mut driver = Driver::started(Entropy::new(&Config::default()).placeholder());
        driver.push(0, &[Piece::In(64)]);
        driver.ring();
        assert!(driver.pop(0).is_none() && !driver.needs_reset());
    }

    #[test]
    fn a_rate_limit_delays_requests() {
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
                    assert!(
                        driver.transport.deadline().is_some(),
                        "without a deadline the requests would hang"
                    );
                    driver.transport.serve_deadline();
                }
            }
        }
        // One passes immediately, and the others 10 ms apart: a lower bound holds on any machine.
        assert!(start.0 + 80_000_000 < Instant::now().0);
    }

    #[test]
    fn invalid_chains_fail_the_device() {
        let mut driver = started();
        driver.push(0, &[Piece::Out(vec![1]), Piece::In(64)]);
        driver.ring();
        assert!(driver.needs_reset());
        driver.start(u64::MAX);
        assert_eq!(
            driver.request(0, &[Piece::In(0), Piece::In(8)]).written,
            8,
            "a reset recovers the device"
        );
        assert_eq!(driver.request(0, &[Piece::In(0)]).written, 0);
        assert!(!driver.needs_reset());
    }

    proptest! {
        #[test]
        fn no_driver_harms_the_host(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            Driver::new(Entropy::new(&Config::default())).misbehave(&bytes);
        }
    }
}
