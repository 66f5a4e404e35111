//! Limits of a guest beyond its memory and its vCPUs.

use super::LaunchOptions;
use kindling_vmm::config::Config;
use kindling_vmm::config::devices::{RateLimiter, TokenBucket};
use kindling_vmm::jail::CgroupLimits;

const MIB: u64 = 1 << 20;
/// Memory in bytes that a monitor may have in its cgroup beside the guest's, of which an honest one needs less than 1 MiB.
const MONITOR_MEMORY: u64 = 64 * MIB;

/// Limits of a guest, each optional. A rate allows a burst of what it allows in a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Processor time of the monitor, with all vCPUs, in thousandths of a processor. The monitor gets a cgroup for it.
    pub cpu_millis: Option<u64>,
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

impl LaunchOptions {
    /// The limits of the monitor's cgroup, if it gets one.
    pub(super) fn cgroup(&self, config: &Config) -> Option<CgroupLimits> {
        /// Threads of the kernel for the operations of disks, and those of the monitor beside vCPUs.
        const OTHER_THREADS: u64 = 512;
        if self.cgroup_parent.is_none() && self.limits.cpu_millis.is_none() {
            return None;
        }
        // Of its page tables, KVM needs one page for each 2 MiB of the guest.
        let memory = config.machine.mem_size_mib.saturating_mul(MIB);
        let memory = memory.saturating_add(memory / 64).saturating_add(MONITOR_MEMORY);
        Some(CgroupLimits {
            parent: self.cgroup_parent.clone(),
            cpu_millis: self.limits.cpu_millis,
            memory: Some(memory),
            processes: Some(self.vcpus.saturating_add(OTHER_THREADS)),
        })
    }
}

fn limiter(bandwidth: Option<u64>, operations: Option<u64>) -> Option<RateLimiter> {
    let bucket = |rate: u64| TokenBucket { size: rate, one_time_burst: None, refill_time: 1000 };
    let limiter = RateLimiter { bandwidth: bandwidth.map(bucket), ops: operations.map(bucket) };
    (limiter != RateLimiter::default()).then_some(limiter)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kindling_vmm::config::BootSource;
    use kindling_vmm::config::devices::{Drive, NetworkInterface, RootFilesystem};

    #[test]
    fn limits_apply_to_every_device_of_their_kind() {
        let mut config = Config::new(BootSource::kernel("kernel"));
        config.devices.root = Some(RootFilesystem::new("root"));
        config.devices.drives = vec![Drive::new("a", "a"), Drive::new("b", "b")];
        config.devices.network_interfaces = vec![NetworkInterface::new("net0", "user")];
        let limits = Limits {
            cpu_millis: None,
            processes: Some(9),
            disk_bandwidth: Some(100),
            disk_operations: Some(20),
            network_bandwidth: Some(30),
        };
        limits.apply(&mut config);
        let bucket = |rate| Some(TokenBucket { size: rate, one_time_burst: None, refill_time: 1000 });
        let disk = Some(RateLimiter { bandwidth: bucket(100), ops: bucket(20) });
        let network = Some(RateLimiter { bandwidth: bucket(30), ops: None });
        assert_eq!(config.devices.root.map(|root| root.rate_limiter), Some(disk));
        assert!(config.devices.drives.iter().all(|drive| drive.rate_limiter == disk));
        let card = &config.devices.network_interfaces[0];
        assert_eq!((card.rx_rate_limiter, card.tx_rate_limiter), (network, network));
        assert_eq!(config.guest.max_processes, Some(9));
        assert_eq!(limiter(None, None), None);
    }
}
