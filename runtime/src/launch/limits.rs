//! Limits of a guest beyond its memory and its vCPUs.

use kindling_vmm::config::Config;
use kindling_vmm::config::devices::{RateLimiter, TokenBucket};

/// Limits of a guest, each optional. A rate allows a burst of what it allows in a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Maximum number of processes and threads in the guest, without those of its kernel and its init. At the limit, fork(2)
    /// fails with EAGAIN.
    pub processes: Option<u64>,
    /// Bytes per second that the guest reads from and writes to each disk: the root filesystem, and each volume.
    pub disk_bandwidth: Option<u64>,
    /// Requests per second to each disk.
    pub disk_operations: Option<u64>,
    /// Bytes per second that the guest sends, and that it receives.
    pub network_bandwidth: Option<u64>,
}

impl Limits {
    /// Sets the limits in a complete configuration.
    pub(super) fn apply(&self, config: &mut Config) {
        config.guest.max_processes = self.processes;
        let disk = limiter(self.disk_bandwidth, self.disk_operations);
        let devices = &mut config.devices;
        devices.root.iter_mut().for_each(|root| root.rate_limiter = disk);
        devices.drives.iter_mut().for_each(|drive| drive.rate_limiter = disk);
        for card in &mut devices.network_interfaces {
            card.rx_rate_limiter = limiter(self.network_bandwidth, None);
            card.tx_rate_limiter = card.rx_rate_limiter;
        }
    }
}

fn limiter(bandwidth: Option<u64>, operations: Option<u64>) -> Option<RateLimiter> {
    let bucket = |rate: u64| TokenBucket { size: rate, one_time_burst: None, refill_time: 1000 };
    let limiter = RateLimiter { bandwidth: bandwidth.map(bucket), ops: operations.map(bucket) };
    (limiter != RateLimiter::default()).then_some(limiter)
}
