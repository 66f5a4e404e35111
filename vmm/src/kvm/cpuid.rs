//! The CPUID of a guest: the leaves that KVM supports, with the topology of the machine, and with the bits that avoid
//! the kernel's calibration loops.
//!
//! Leaves are those of the Intel SDM, volume 2, "CPUID", and of the AMD APM, volume 3, appendix E.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Leaf 1, ECX: the timer of the local APIC supports TSC deadlines. Linux then does not measure the frequency of the
/// APIC (217 ms in the exact lab).
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: the registers of the local APIC are accessible as MSRs.
const X2APIC: u32 = 1 << 21;
/// Leaf 1, ECX: a hypervisor is present. Linux checks for KVM's leaves only if it is set.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: bits 16 to 23 of EBX are the number of logical processors.
const MULTITHREADING: u32 = 1 << 28;
/// Leaf 6, EAX: the APIC timer runs in every power state. Without this and TSC deadlines, a kernel requires a second
/// timer.
const ALWAYS_RUNNING_APIC_TIMER: u32 = 1 << 2;
/// Leaf 1, ECX: VMX. Nested virtualization is not supported.
const VMX: u32 = 1 << 5;
/// Leaf 0x8000_0001, ECX: SVM. As above.
const SVM: u32 = 1 << 2;

/// The bits of performance counters. Leaf 1, ECX: 64-bit debug store, and the MSR of the counters' capabilities; EDX:
/// debug store.
const COUNTERS_1_ECX: u32 = 1 << 2 | 1 << 15;
const COUNTERS_1_EDX: u32 = 1 << 21;
/// Leaf 0x8000_0001, ECX: AMD's counters of the core, the northbridge and the last-level cache.
const COUNTERS_AMD: u32 = 1 << 23 | 1 << 24 | 1 << 28;

/// Whether this processor supports hardware virtualization (Intel VMX or AMD SVM).
pub(super) fn host_has_virtualization() -> bool {
    core::arch::x86_64::__cpuid(1).ecx & VMX != 0 || host_has_svm()
}

/// Whether this processor supports AMD SVM.
pub(super) fn host_has_svm() -> bool {
    let highest_extended = core::arch::x86_64::__cpuid(0x8000_0000).eax;
    highest_extended >= 0x8000_0001 && core::arch::x86_64::__cpuid(0x8000_0001).ecx & SVM != 0
}

/// The leaves that KVM itself looks up most often: features, and the width of addresses.
const FREQUENT_LEAVES: [u32; 4] = [0x7, 0x1, 0x8000_0001, 0x8000_0008];

/// The leaves that [`adapt`] may fill in.
const ADAPTED: [u32; 5] = [0x6, 0xb, 0x1f, 0x8000_0008, 0x8000_001e];

/// The leaves that KVM supports, without those that are all zeroes, and with those first that KVM looks up most often.
/// KVM searches the list linearly (`cpuid_entry2_find` in arch/x86/kvm/cpuid.c), more than a hundred times for the
/// creation of a vCPU; a missing leaf reads as zeroes in the guest (`kvm_cpuid`, in the same file).
pub(super) fn compact(supported: &CpuId) -> CpuId {
    let is_asked_most = |entry: &&kvm_cpuid_entry2| FREQUENT_LEAVES.contains(&entry.function);
    let (first, others): (Vec<_>, Vec<_>) = supported.as_slice().iter().partition(is_asked_most);
    let says_something = |entry: &&kvm_cpuid_entry2| {
        entry.eax | entry.ebx | entry.ecx | entry.edx != 0 || ADAPTED.contains(&entry.function)
    };
    let entries: Vec<_> = first.into_iter().chain(others).filter(says_something).copied().collect();
    // There are fewer entries than before, so that this does not fail.
    CpuId::from_entries(&entries).unwrap_or_else(|_| supported.clone())
}

/// CPUID of vCPU `id` in a machine with `count` vCPUs: one package, one thread per core.
pub(super) fn for_vcpu(supported: &CpuId, id: u8, count: u8) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        adapt(entry, id, count);
    }
    cpuid
}

/// Width of a physical address in bits: leaf 0x8000_0008, EAX bits 0 to 7. A processor without the leaf has 36.
pub(super) fn physical_address_bits(supported: &CpuId) -> u8 {
    let leaf = supported.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
    leaf.map_or(36, |leaf| leaf.eax.to_le_bytes()[0]).clamp(36, 52)
}

fn adapt(entry: &mut kvm_cpuid_entry2, id: u8, count: u8) {
    let (id, count) = (u32::from(id), u32::from(count));
    match entry.function {
        0x1 => {
            entry.ecx |= TSC_DEADLINE | X2APIC | HYPERVISOR;
            entry.ecx &= !(VMX | COUNTERS_1_ECX);
            // Bits 8 to 15 are the size of the cache line that CLFLUSH flushes, in units of 8 bytes.
            entry.ebx = (entry.ebx & 0x0000_ffff) | count << 16 | id << 24;
            entry.edx = if count > 1 { entry.edx | MULTITHREADING } else { entry.edx & !MULTITHREADING };
            entry.edx &= !COUNTERS_1_EDX;
        }
        // Caches: not shared between threads; the package has `count` cores.
        0x4 if entry.eax & 0x1f != 0 => {
            entry.eax = (entry.eax & 0x3fff) | (count - 1) << 26;
        }
        0x6 => entry.eax |= ALWAYS_RUNNING_APIC_TIMER,
        0xb | 0x1f => adapt_topology(entry, id, count),
        // Performance counters of Intel and AMD: the machine has none.
        0xa | 0x8000_0022 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0001 => entry.ecx &= !(SVM | COUNTERS_AMD),
        // AMD: number of cores minus one, and the width of the core id.
        0x8000_0008 => entry.ecx = (count - 1) | id_bits(count) << 12,
        // AMD: the processor's APIC id and its core, one thread each.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
        _ => {}
    }
}

/// Number of bits of the ids of `count` processors.
fn id_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// Extended topology: level 0 is threads (one per core), level 1 is cores.
fn adapt_topology(entry: &mut kvm_cpuid_entry2, id: u32, count: u32) {
    const THREADS: u32 = 1 << 8;
    const CORES: u32 = 2 << 8;
    (entry.eax, entry.ebx, entry.ecx) = match entry.index {
        0 => (0, 1, THREADS),
        1 => (id_bits(count), count, CORES | 1),
        index => (0, 0, index),
    };
    entry.edx = id;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        let all = u32::MAX;
        kvm_cpuid_entry2 { function, index, eax: all, ebx: all, ecx: all, edx: all, ..Default::default() }
    }

    fn adapted(function: u32, index: u32, id: u8, count: u8) -> kvm_cpuid_entry2 {
        let mut entry = entry(function, index);
        adapt(&mut entry, id, count);
        entry
    }

    #[test]
    fn the_kernel_detects_kvm_and_skips_calibration() {
        let mut leaf = kvm_cpuid_entry2 { function: 1, ..Default::default() };
        adapt(&mut leaf, 0, 1);
        assert_eq!(leaf.ecx, 1 << 31 | 1 << 24 | 1 << 21);
        let mut leaf = kvm_cpuid_entry2 { function: 6, ..Default::default() };
        adapt(&mut leaf, 0, 1);
        assert_eq!(leaf.eax, 1 << 2);
    }

    #[test]
    fn each_vcpu_has_its_topology() {
        let leaf = adapted(1, 0, 3, 4);
        assert_eq!((leaf.ebx >> 24, leaf.ebx >> 16 & 0xff, leaf.edx >> 28 & 1), (3, 4, 1));
        assert_eq!(adapted(1, 0, 0, 1).edx >> 28 & 1, 0);
        let (threads, cores) = (adapted(0xb, 0, 3, 4), adapted(0xb, 1, 3, 4));
        assert_eq!((threads.eax, threads.ebx, threads.ecx, threads.edx), (0, 1, 0x100, 3));
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (2, 4, 0x201, 3));
        assert_eq!(adapted(0x8000_001e, 0, 3, 4).eax, 3);
        assert_eq!(adapted(0x8000_0008, 0, 3, 16).ecx, 15 | 4 << 12);
    }

    #[test]
    fn zero_leaves_are_omitted_unless_they_are_adapted() {
        let empty = |function| kvm_cpuid_entry2 { function, ..Default::default() };
        let supported = [entry(0, 0), empty(2), empty(6), entry(1, 0), empty(7), entry(7, 1)];
        let short = compact(&CpuId::from_entries(&supported).unwrap());
        let left: Vec<_> = short.as_slice().iter().map(|entry| (entry.function, entry.index)).collect();
        assert_eq!(left, [(1, 0), (7, 1), (0, 0), (6, 0)]);
    }

    #[test]
    fn performance_counters_are_not_offered() {
        for leaf in [0xa, 0x8000_0022] {
            let entry = adapted(leaf, 0, 0, 1);
            assert_eq!([entry.eax, entry.ebx, entry.ecx, entry.edx], [0; 4], "{leaf:#x}");
        }
        // Linux calls the bits pdcm, ds and dtes64, and perfctr_core, perfctr_nb and perfctr_llc.
        let first = adapted(1, 0, 0, 1);
        assert_eq!((first.ecx & (1 << 15 | 1 << 2), first.edx & 1 << 21), (0, 0));
        assert_eq!(adapted(0x8000_0001, 0, 0, 1).ecx & (1 << 23 | 1 << 24 | 1 << 28), 0);
    }

    #[test]
    fn nested_virtualization_is_not_offered() {
        assert_eq!(adapted(1, 0, 0, 1).ecx & 1 << 5, 0);
        assert_eq!(adapted(0x8000_0001, 0, 0, 1).ecx & 1 << 2, 0);
    }
}
