//! The guest memory in the file of a pre-booted kernel, for tools that explain what guests do with it.

use super::error::PrebootError;
use super::file;
use super::state::State;
use crate::layout::{MIB, PAGE, PAGE_SIZE};
use crate::memory::Extent;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The guest memory of a pre-booted kernel.
#[derive(Debug)]
pub struct SavedMemory {
    file: File,
    state: State,
}

impl SavedMemory {
    /// Opens a file that `kindling preboot` or `kindling run` wrote.
    ///
    /// # Errors
    /// When the file cannot be read, is of another version, or is damaged.
    pub fn open(path: &Path) -> Result<Self, PrebootError> {
        let file = file::open(path)?;
        let state = file::read(&file, path)?;
        Ok(Self { file, state })
    }

    /// Size of the guest's memory in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.state.inputs.mem_size_mib * MIB
    }

    /// Guest-physical address of the page tables of the vCPU that runs init (its register CR3).
    #[must_use]
    pub fn page_tables(&self) -> u64 {
        self.state.vcpus.get(self.state.init_vcpu).map_or(0, |vcpu| vcpu.page_tables())
    }

    /// The page at a guest-physical address; `None` if the file does not have it: guests get a new page of zeroes.
    #[must_use]
    pub fn page(&self, address: u64) -> Option<[u8; PAGE]> {
        self.state.extents.iter().find_map(|extent| distance(extent, address))?;
        let mut page = [0; PAGE];
        self.file.read_exact_at(&mut page, file::PAGES_OFFSET + (address & !(PAGE_SIZE - 1))).ok()?;
        Some(page)
    }

    /// Whether the page at a guest-physical address is copied for each guest when init starts, because guests write to it. Spare
    /// guests get other pages in advance.
    #[must_use]
    pub fn is_copied_in_advance(&self, address: u64, is_spare: bool) -> bool {
        let pages = if is_spare { &self.state.used } else { &self.state.written };
        pages.iter().any(|extent| distance(extent, address).is_some())
    }
}

/// The distance in bytes of an address's page from the start of an extent that has it.
fn distance(extent: &Extent, address: u64) -> Option<u64> {
    let page = address & !(PAGE_SIZE - 1);
    page.checked_sub(extent.start).filter(|&distance| distance < extent.length())
}
