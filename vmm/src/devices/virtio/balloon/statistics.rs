//! Memory statistics of a guest (section 5.5.6.4).

use crate::devices::virtio::{Chain, DeviceError};
use serde::{Deserialize, Serialize};

/// Bytes per entry: a tag and a value.
const ENTRY: usize = 10;
/// Maximum number of entries per chain: more than there are tags.
const ENTRIES_MAX: usize = 32;

/// Memory statistics as reported by a guest, which are not verified. A field is `None` when the guest has not reported
/// it. Linux counts events from its boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Bytes swapped in.
    pub swap_in: Option<u64>,
    /// Bytes swapped out.
    pub swap_out: Option<u64>,
    /// Major page faults: those that read from a disk.
    pub major_faults: Option<u64>,
    /// Minor page faults: all others.
    pub minor_faults: Option<u64>,
    /// Unused memory in bytes (`MemFree`).
    pub free_memory: Option<u64>,
    /// Total memory in bytes (`MemTotal`).
    pub total_memory: Option<u64>,
    /// Estimate of the memory in bytes that is available to new programs without swapping (`MemAvailable`).
    pub available_memory: Option<u64>,
    /// Memory in bytes that can be reclaimed without I/O, which is mostly the page cache.
    pub disk_caches: Option<u64>,
    /// Successful huge page allocations.
    pub hugetlb_allocations: Option<u64>,
    /// Failed huge page allocations.
    pub hugetlb_failures: Option<u64>,
}

impl Statistics {
    /// Updates the statistics from a chain. Unknown tags and incomplete entries are ignored.
    pub(super) fn update(&mut self, chain: &mut Chain) -> Result<(), DeviceError> {
        let mut entry = [0; ENTRY];
        for _ in 0..ENTRIES_MAX {
            if chain.readable_len() < ENTRY as u64 {
                break;
            }
            chain.read(&mut entry)?;
            let [low, high, value @ ..] = entry;
            if let Some(field) = self.field(u16::from_le_bytes([low, high])) {
                *field = Some(u64::from_le_bytes(value));
            }
        }
        Ok(())
    }

    /// The field for a tag.
    const fn field(&mut self, tag: u16) -> Option<&mut Option<u64>> {
        Some(match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free_memory,
            5 => &mut self.total_memory,
            6 => &mut self.available_memory,
            7 => &mut self.disk_caches,
            8 => &mut self.hugetlb_allocations,
            9 => &mut self.hugetlb_failures,
            _ => return None,
        })
    }
}
