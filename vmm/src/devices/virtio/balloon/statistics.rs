//! What a guest says of its memory (section 5.5.6.4).

use crate::devices::virtio::{Broken, Chain};
use serde::{Deserialize, Serialize};

/// Bytes of an entry: a tag and a value.
const ENTRY: usize = 10;
/// Entries that are read of a chain: some more than there are tags.
const ENTRIES_MAX: usize = 32;

/// Statistics of a guest's memory, as far as it keeps them. A guest can say what it likes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Bytes read from swap.
    pub swap_in: Option<u64>,
    /// Bytes written to swap.
    pub swap_out: Option<u64>,
    /// Page faults that read from a disk.
    pub major_faults: Option<u64>,
    /// Other page faults.
    pub minor_faults: Option<u64>,
    /// Bytes that nobody uses.
    pub free_memory: Option<u64>,
    /// Bytes of all memory.
    pub total_memory: Option<u64>,
    /// Bytes that programs can have without swapping.
    pub available_memory: Option<u64>,
    /// Bytes of files that could be read again.
    pub disk_caches: Option<u64>,
    /// Huge pages that were allocated.
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be allocated.
    pub hugetlb_failures: Option<u64>,
}

impl Statistics {
    /// Takes over what a chain says. Tags that are not known are passed over, and so is half an entry.
    pub(super) fn update(&mut self, chain: &mut Chain) -> Result<(), Broken> {
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

    /// What a tag means.
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
