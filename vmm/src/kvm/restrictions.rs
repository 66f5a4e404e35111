//! What of KVM a guest cannot use: performance counters, hypervisor interfaces that its CPUID does not offer,
//! model-specific registers that it has no business with, and the means to keep a processor from its host.

use kvm_bindings::{
    KVM_BUS_LOCK_DETECTION_EXIT, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_PMU_CAPABILITY,
    KVM_CAP_X86_BUS_LOCK_EXIT, KVM_CAP_X86_MSR_FILTER, KVM_CAP_X86_NOTIFY_VMEXIT, KVM_EXIT_NOTIFY,
    KVM_EXIT_X86_BUS_LOCK, KVM_PMU_CAP_DISABLE, KVM_X86_NOTIFY_VMEXIT_ENABLED, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuExit, VcpuFd, VmFd};
use std::time::Duration;

/// Pause of a vCPU after each bus lock. The processor asserts one for an atomic access that crosses a cache line, or to
/// uncached memory: it stops the memory accesses of all processors for about a thousand cycles.
const BUS_LOCK_PAUSE: Duration = Duration::from_millis(1);

/// Registers that a guest can neither read nor write, as first and count: accesses cause a general protection fault.
const REFUSED_MSRS: [(u32, u32); 8] = [
    (0xc1, 8),          // Intel's performance counters (SDM, volume 4): general,
    (0x186, 8),         // their events,
    (0x309, 3),         // fixed ones,
    (0x38d, 4),         // and control
    (0x480, 18),        // what VMX supports (SDM, volume 3, appendix A)
    (0x4000_0000, 256), // Hyper-V's (arch/x86/include/asm/hyperv-tlfs.h)
    (0xc001_0000, 8),   // AMD's performance counters (APM, volume 2, section 13.2): of older processors,
    (0xc001_0200, 12),  // and of newer ones
];

/// A restriction of guests that a host's KVM may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restriction {
    /// No performance counters.
    Counters,
    /// No interfaces of KVM that the guest's CPUID does not offer.
    Interfaces,
    /// No access to registers of Hyper-V and of nested virtualization.
    Registers,
    /// A limit of the time without interrupts of the host.
    NotifyExits,
    /// A limit of bus locks.
    BusLocks,
}

impl Restriction {
    /// All, with the capability of KVM that each needs.
    const ALL: [(Self, u32); 5] = [
        (Self::Counters, KVM_CAP_PMU_CAPABILITY),
        (Self::Interfaces, KVM_CAP_ENFORCE_PV_FEATURE_CPUID),
        (Self::Registers, KVM_CAP_X86_MSR_FILTER),
        (Self::NotifyExits, KVM_CAP_X86_NOTIFY_VMEXIT),
        (Self::BusLocks, KVM_CAP_X86_BUS_LOCK_EXIT),
    ];

    /// Whether the processor must have it as well as the kernel.
    #[must_use]
    pub const fn needs_processor(self) -> bool {
        matches!(self, Self::NotifyExits | Self::BusLocks)
    }

    /// What a guest can do without the restriction, as a phrase after "can".
    #[must_use]
    pub const fn without(self) -> &'static str {
        match self {
            Self::Counters => "time other users of the processor by performance counters",
            Self::Interfaces => "use interfaces of KVM that its CPUID does not offer",
            Self::Registers => "use registers of Hyper-V and of nested virtualization",
            Self::NotifyExits => "keep a processor from its host by exceptions without end",
            Self::BusLocks => "stop the memory accesses of all processors by bus locks",
        }
    }
}

/// The restrictions that a KVM does not have.
pub(super) fn missing(kvm: &Kvm) -> Vec<Restriction> {
    let all = Restriction::ALL.into_iter();
    all.filter(|(_, capability)| kvm.check_extension_raw((*capability).into()) <= 0)
        .map(|(restriction, _)| restriction)
        .collect()
}

/// Restricts a machine that has no vCPUs. Older kernels, and processors without a feature, refuse some of it; errors are
/// ignored.
pub(super) fn restrict_machine(vm: &VmFd) {
    let enable = |cap, value: u64| {
        let mut capability = kvm_enable_cap { cap, ..kvm_enable_cap::default() };
        capability.args[0] = value;
        let _ = vm.enable_cap(&capability);
    };
    // Hiding the counters in CPUID is not sufficient: KVM gives guests of AMD processors four of them in any case
    // (`amd_pmu_refresh` in arch/x86/kvm/svm/pmu.c), with which a guest can time other users of the processor.
    enable(KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE.into());
    // An exit when no interrupt of the host can be delivered for a while, for instance because exceptions repeat. The
    // high half of the value is added to the window that the processor has by itself.
    enable(KVM_CAP_X86_NOTIFY_VMEXIT, KVM_X86_NOTIFY_VMEXIT_ENABLED.into());
    enable(KVM_CAP_X86_BUS_LOCK_EXIT, KVM_BUS_LOCK_DETECTION_EXIT.into());
    let _ = refuse_msrs(vm);
}

fn refuse_msrs(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    /// No bit is set: none of the registers is allowed.
    const NONE: [u8; 32] = [0; 32];
    let range = |(base, count): (u32, u32)| MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base,
        msr_count: count,
        bitmap: &NONE[..(count as usize).div_ceil(8)],
    };
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &REFUSED_MSRS.map(range))
}

/// Restricts a vCPU, after its CPUID is set, to those of KVM's own interfaces that the CPUID offers.
pub(super) fn restrict_vcpu(vcpu: &VcpuFd) {
    let mut capability =
        kvm_enable_cap { cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID, ..kvm_enable_cap::default() };
    capability.args[0] = 1;
    // Linux before 5.10 refuses.
    let _ = vcpu.enable_cap(&capability);
}

/// Whether a vCPU left the guest because that asserted a bus lock.
pub(super) const fn is_bus_lock(exit: &VcpuExit<'_>) -> bool {
    matches!(exit, VcpuExit::Unsupported(KVM_EXIT_X86_BUS_LOCK))
}

/// Whether a vCPU left the guest because that kept the processor from its host, and the guest's state is lost: KVM continues
/// the guest otherwise.
pub(super) const fn is_held_processor(exit: &VcpuExit<'_>) -> bool {
    matches!(exit, VcpuExit::Unsupported(KVM_EXIT_NOTIFY))
}

/// Pauses a vCPU that has asserted a bus lock.
pub(super) fn pause_after_bus_lock() {
    std::thread::park_timeout(BUS_LOCK_PAUSE);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_of_the_restrictions_are_recognized() {
        let exit = VcpuExit::Unsupported;
        assert!(is_bus_lock(&exit(33)) && !is_bus_lock(&exit(37)) && !is_bus_lock(&VcpuExit::Hlt));
        assert!(is_held_processor(&exit(37)) && !is_held_processor(&exit(33)));
    }
}
