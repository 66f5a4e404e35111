//! Page tables that KVM fills before the guest runs.

use super::Vcpu;
use kvm_bindings::{KVMIO, kvm_pre_fault_memory};
use std::ops::Range;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);

impl Vcpu {
    /// Enters the pages of a guest-physical range into the guest's page tables in KVM, as reads of the guest would
    /// (Documentation/virt/kvm/api.rst, `KVM_PRE_FAULT_MEMORY`). Linux before 6.11 does not support it, nor does KVM without
    /// hardware page tables; the guest takes the faults then.
    pub(crate) fn prefault(&self, range: Range<u64>) {
        let size = range.end.saturating_sub(range.start);
        let mut rest = kvm_pre_fault_memory { gpa: range.start, size, ..kvm_pre_fault_memory::default() };
        // KVM moves the range as far as it came, and returns for signals.
        while rest.size > 0 {
            let before = rest.size;
            // SAFETY: the ioctl reads and writes one structure of this type.
            let result = unsafe { ioctl_with_mut_ref(&self.fd, KVM_PRE_FAULT_MEMORY(), &mut rest) };
            if result != 0 && rest.size == before {
                return;
            }
        }
    }
}
