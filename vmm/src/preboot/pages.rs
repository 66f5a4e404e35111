//! Pages of a pre-booted kernel or a snapshot that are prepared before a guest uses them.

use crate::kvm::Vcpu;
use crate::memory::{Extent, GuestMemory, MemoryError};

/// Pages that are prepared before a guest uses them.
#[derive(Debug, Default)]
pub(crate) struct PagesInAdvance {
    /// Those that are copied: with a spare or a snapshot, those that the kernel and a program write to, and otherwise those that
    /// a guest without a program on its disk writes to.
    pub(super) copied: Vec<Extent>,
    /// Those of a snapshot that the guest reads. `None` of a pre-booted kernel, of which guests read most.
    pub(super) read: Option<Vec<Extent>>,
}

impl PagesInAdvance {
    /// Whether these are pages of a snapshot.
    pub(crate) const fn are_of_snapshot(&self) -> bool {
        self.read.is_some()
    }

    /// Copies the pages that the guest writes to, and enters them into the guest's page tables in KVM, through a vCPU.
    ///
    /// # Errors
    /// When the file cannot be read, or the host is out of memory.
    pub(crate) fn copy(&self, memory: &GuestMemory, vcpu: Option<&Vcpu>) -> Result<(), MemoryError> {
        memory.copy_in_advance(&self.copied)?;
        prefault(vcpu, &self.copied);
        Ok(())
    }

    /// Enters all pages that the guest uses into the guest's page tables in KVM, through a vCPU.
    pub(crate) fn enter(&self, memory: &GuestMemory, vcpu: Option<&Vcpu>) {
        match &self.read {
            Some(read) => prefault(vcpu, read),
            None => {
                for range in memory.file_ranges() {
                    vcpu.iter().for_each(|vcpu| vcpu.prefault(range.clone()));
                }
            }
        }
        prefault(vcpu, &self.copied);
    }
}

fn prefault(vcpu: Option<&Vcpu>, pages: &[Extent]) {
    for extent in pages {
        vcpu.iter().for_each(|vcpu| vcpu.prefault(extent.start..extent.start + extent.length()));
    }
}
