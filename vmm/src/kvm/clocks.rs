//! The clocks of a machine that is stopped and continues later, without a guest that notices the time in between.

use super::state::{TSC, msr_list};
use super::{KvmError, Vcpu, Vm};
use crate::timeline::Instant;
use kvm_bindings::kvm_msr_entry;
use serde::{Deserialize, Serialize};

/// The clocks of a stopped machine.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Clocks {
    /// The time stamp counter of all vCPUs.
    pub(super) tsc: u64,
    /// The machine's clock at the time of `tsc`, in nanoseconds.
    clock: u64,
}

impl Clocks {
    /// The clocks of a machine whose vCPUs stopped when their time stamp counter was `tsc`.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(crate) fn at(tsc: u64, vm: &Vm, first: &Vcpu) -> Result<Self, KvmError> {
        // The clock is read later than `tsc`, and is set together with it: the time between them is subtracted.
        let (later, khz) = (first.tsc()?, first.tsc_khz()?);
        let since = u128::from(later.saturating_sub(tsc)) * 1_000_000 / u128::from(khz.max(1));
        let clock = vm.clock()?.saturating_sub(u64::try_from(since).unwrap_or(0));
        Ok(Self { tsc, clock })
    }

    /// The clocks of a machine whose time stamp counters were `tsc` at a time.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(crate) fn since(tsc: u64, at: Instant, vm: &Vm) -> Result<Self, KvmError> {
        let clock = vm.clock()?;
        let since = Instant::now().0.saturating_sub(at.0);
        Ok(Self { tsc, clock: clock.saturating_sub(since) })
    }

    /// Sets the machine's clock.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(crate) fn restore(&self, vm: &Vm) -> Result<(), KvmError> {
        vm.set_clock(self.clock)
    }

    /// Sets the clocks of a machine and of all its vCPUs.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(crate) fn restore_all(&self, vm: &Vm, vcpus: &[Vcpu]) -> Result<(), KvmError> {
        self.restore(vm)?;
        let mut numbered = vcpus.iter().enumerate();
        numbered.try_for_each(|(number, vcpu)| {
            self.prepare_tsc(vcpu, number == 0)?;
            vcpu.set_tsc(self.tsc)
        })
    }

    /// Makes the next value of a vCPU's time stamp counter count as a new one.
    ///
    /// KVM before 6.7 interprets a value within one second of its own as an attempt to synchronize vCPUs, and does not change
    /// the counter (`kvm_synchronize_tsc` in arch/x86/kvm/x86.c). A guest that ran for some milliseconds is that close to a
    /// new machine. Therefore the first vCPU gets a value that is far from both, then the actual one, and the other vCPUs get
    /// the same.
    pub(super) fn prepare_tsc(&self, vcpu: &Vcpu, is_first: bool) -> Result<(), KvmError> {
        const FAR_MS: u64 = 10_000;
        if !is_first {
            return Ok(());
        }
        vcpu.set_tsc(self.tsc.wrapping_add(FAR_MS * u64::from(vcpu.tsc_khz()?)))
    }
}

impl Vcpu {
    /// Sets the time stamp counter.
    fn set_tsc(&self, tsc: u64) -> Result<(), KvmError> {
        let entry = kvm_msr_entry { index: TSC, data: tsc, ..kvm_msr_entry::default() };
        let written = self.fd.set_msrs(&msr_list(&[entry])?);
        written.map(drop).map_err(KvmError::ioctl("set a vCPU's time stamp counter"))
    }
}
