//! Writes of registers that KVM collects without an exit (Documentation/virt/kvm/api.rst, "coalesced MMIO").
//!
//! The write of a register without an immediate effect can wait for the access that depends on it: the index register
//! of the I/O APIC, the addresses of a queue. KVM appends such writes to a ring, and the handler of the next exit
//! processes them first, in their order.

use crate::bus::{MemoryBus, lock};
use crate::layout::{PAGE, PAGE_SIZE};
use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio};
use kvm_ioctls::VcpuFd;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

/// Entries of the ring (KVM_COALESCED_MMIO_MAX in include/uapi/linux/kvm.h): as many as fit into a page after the
/// indices.
const ENTRIES: u32 = 170;
const ENTRIES_OFFSET: usize = 8;
const _: () = assert!(ENTRIES_OFFSET + ENTRIES as usize * size_of::<kvm_coalesced_mmio>() <= PAGE);

/// The ring of a machine: the indices `first` and `last`, then the entries.
#[derive(Debug)]
pub struct CoalescedWrites(Mutex<*mut u8>);

// SAFETY: only KVM and this structure access the page, the latter only with the lock held.
unsafe impl Send for CoalescedWrites {}
// SAFETY: as above.
unsafe impl Sync for CoalescedWrites {}

impl CoalescedWrites {
    /// Maps the ring, which is accessible through any vCPU of a machine.
    pub(super) fn of(vcpu: &VcpuFd) -> io::Result<Self> {
        let offset = i64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * PAGE_SIZE.cast_signed();
        // SAFETY: a new mapping at an address of the kernel's choice; KVM provides one page at this offset.
        let page = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), PAGE, protection, libc::MAP_SHARED, vcpu.as_raw_fd(), offset)
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(Mutex::new(page.cast())))
    }

    /// Processes the collected writes, before an access that may depend on them. The lock is held in the meantime:
    /// another vCPU's thread may have taken writes of this vCPU and not processed them yet.
    pub(super) fn flush(&self, bus: &MemoryBus) {
        let page = lock(&self.0);
        // SAFETY: the indices are the first eight bytes of the page, aligned, and KVM accesses them as 32-bit numbers
        // as well (virt/kvm/coalesced_mmio.c).
        let (first, last) =
            unsafe { (AtomicU32::from_ptr(page.cast()), AtomicU32::from_ptr(page.cast::<u32>().add(1))) };
        // KVM adds at most as many entries as there is space for, and nothing else removes any.
        for _ in 0..ENTRIES {
            let at = first.load(Ordering::Relaxed) % ENTRIES;
            if at == last.load(Ordering::Acquire) % ENTRIES {
                return;
            }
            let offset = ENTRIES_OFFSET + at as usize * size_of::<kvm_coalesced_mmio>();
            // SAFETY: the entry lies within the page, is plain data, and KVM does not write it again before it is
            // removed.
            let entry = unsafe { page.add(offset).cast::<kvm_coalesced_mmio>().read_volatile() };
            first.store((at + 1) % ENTRIES, Ordering::Release);
            let length = (entry.len as usize).min(entry.data.len());
            // Writes to coalesced registers cause no requests to the machine.
            let _ = bus.write(entry.phys_addr, &entry.data[..length]);
        }
    }
}

impl Drop for CoalescedWrites {
    fn drop(&mut self) {
        // SAFETY: the page was mapped by `of`, and there are no more references to it.
        unsafe { libc::munmap((*lock(&self.0)).cast(), PAGE) };
    }
}
