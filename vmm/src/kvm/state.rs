//! The state of a vCPU as plain data, for saving and restoring it on a KVM of the same kind.
//!
//! The parts of the state and the order of restoring them follow Documentation/virt/kvm/api.rst: special registers
//! before the local APIC (they enable it), the local APIC before the MSRs (which include the deadline of its timer),
//! pending events last.

use super::{Clocks, KvmError, Vcpu, cpuid};
use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::marker::PhantomData;
use x86_64::registers::rflags::RFlags;
use zerocopy::{FromBytes, IntoBytes};

/// Time stamp counter.
pub(super) const TSC: u32 = 0x10;

/// Busy bit in the type of a task state segment (AMD APM, volume 2, section 4.8.3).
const TSS_BUSY: u8 = 0x2;

/// The model-specific registers that belong to a guest, if the host's KVM supports them: those that a Linux guest may
/// have written and depends on. Registers that describe the processor follow from CPUID. The register of KVM's wall
/// clock is excluded: KVM writes the time to guest memory when it is set, and the kernel sets it before each use
/// (`kvm_get_wallclock` in arch/x86/kernel/kvmclock.c).
const GUEST_MSRS: [u32; 31] = [
    TSC,
    0x3b,        // TSC adjust
    0x48,        // speculation control
    0xe1,        // UMWAIT control
    0x122,       // TSX control
    0x174,       // SYSENTER: code segment,
    0x175,       // stack pointer
    0x176,       // and instruction pointer
    0x1a0,       // miscellaneous enables
    0x1c4,       // extended feature disable
    0x1c5,       // and what it caught
    0x1d9,       // debug control
    0x277,       // page attribute table
    0x6a0,       // control-flow enforcement, user
    0x6a2,       // and supervisor
    0x6e0,       // deadline of the local APIC's timer
    0xda0,       // extended states of the supervisor
    0x4b56_4d01, // KVM's MSRs (arch/x86/include/uapi/asm/kvm_para.h): system time,
    0x4b56_4d02, // asynchronous page faults,
    0x4b56_4d03, // steal time,
    0x4b56_4d04, // end of interrupt,
    0x4b56_4d05, // polling,
    0x4b56_4d06, // interrupt of asynchronous page faults,
    0x4b56_4d07, // their acknowledgement
    0xc000_0081, // SYSCALL: segments,
    0xc000_0082, // 64-bit target,
    0xc000_0083, // compatibility target,
    0xc000_0084, // flag mask
    0xc000_0102, // base that SWAPGS exchanges
    0xc000_0103, // what RDTSCP says of the processor
    0xc001_011f, // speculation control of a virtual processor
];

/// KVM's own MSRs.
const KVM_MSRS: std::ops::RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4dff;

/// Length of the instruction with which init writes boot marks.
const OUT_DX_AL_LEN: u64 = 1;

/// The complete state of a vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    general: kvm_regs,
    special: kvm_sregs,
    #[serde(deserialize_with = "boxed")]
    floating_point: Box<kvm_xsave>,
    extended_control: kvm_xcrs,
    debug: kvm_debugregs,
    #[serde(deserialize_with = "boxed")]
    local_apic: Box<kvm_lapic_state>,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    multiprocessing: kvm_mp_state,
    /// Frequency of the time stamp counter in kHz.
    tsc_khz: u32,
}

impl VcpuState {
    /// The guest-physical address of the page tables.
    pub(crate) const fn page_tables(&self) -> u64 {
        // The lower bits are flags, or a process context (Intel SDM, volume 3, "Paging Control Registers").
        self.special.cr3 & !0xfff
    }

    /// The time stamp counter; 0 if KVM did not report it.
    pub(crate) fn tsc(&self) -> u64 {
        self.msrs.iter().find(|entry| entry.index == TSC).map_or(0, |entry| entry.data)
    }

    /// Moves the vCPU back before the instruction `out dx, al` that it has executed last.
    pub(crate) const fn step_back_over_out(&mut self) {
        self.general.rip = self.general.rip.wrapping_sub(OUT_DX_AL_LEN);
    }
}

/// Deserializes a KVM structure directly into a box. The structures are too large to be moved: each function with one
/// on its stack would cause page faults.
fn boxed<'de, T: FromBytes + IntoBytes, D: Deserializer<'de>>(deserializer: D) -> Result<Box<T>, D::Error> {
    struct Bytes<T>(PhantomData<T>);

    impl<T: FromBytes + IntoBytes> Visitor<'_> for Bytes<T> {
        type Value = Box<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{} bytes", size_of::<T>())
        }

        fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Self::Value, E> {
            let mut value = T::new_box_zeroed().map_err(|_| E::custom("there is no memory for it"))?;
            let target = value.as_mut_bytes();
            if bytes.len() != target.len() {
                return Err(E::invalid_length(bytes.len(), &self));
            }
            target.copy_from_slice(bytes);
            Ok(value)
        }
    }

    deserializer.deserialize_bytes(Bytes(PhantomData))
}

impl Vcpu {
    /// Completes the instruction of the last exit. KVM does so on the next entry, and an entry with `immediate_exit`
    /// set does only that. Returns `false` if the instruction has not completed, because a large access causes several
    /// exits.
    pub(crate) fn settle(&mut self) -> bool {
        self.fd.set_kvm_immediate_exit(1);
        let is_complete = self.fd.run().is_err_and(|error| error.errno() == libc::EINTR);
        self.fd.set_kvm_immediate_exit(0);
        is_complete
    }

    /// The current time stamp counter of the guest.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(crate) fn tsc(&self) -> Result<u64, KvmError> {
        let what = "read a vCPU's time stamp counter";
        let mut msrs = msr_list(&[kvm_msr_entry { index: TSC, ..kvm_msr_entry::default() }])?;
        self.fd.get_msrs(&mut msrs).map_err(KvmError::ioctl(what))?;
        Ok(msrs.as_slice().first().map_or(0, |entry| entry.data))
    }

    /// Frequency of the time stamp counter in kHz.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(crate) fn tsc_khz(&self) -> Result<u32, KvmError> {
        self.fd.get_tsc_khz().map_err(KvmError::ioctl("say how fast the time stamp counter is"))
    }

    /// Saves the state of a vCPU that is not running and has been [settled](Self::settle). `known` are the indices of
    /// the MSRs that the host's KVM can read; without them, those that it refuses to read are left out.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn state(&self, known: Option<&[u32]>) -> Result<VcpuState, KvmError> {
        let what = "read a vCPU's state";
        let fd = &self.fd;
        // First, because it also processes pending INIT and SIPI from other vCPUs.
        let multiprocessing = fd.get_mp_state().map_err(KvmError::ioctl(what))?;
        let msrs = self.guest_msrs(known)?;
        Ok(VcpuState {
            general: fd.get_regs().map_err(KvmError::ioctl(what))?,
            special: fd.get_sregs().map_err(KvmError::ioctl(what))?,
            floating_point: Box::new(fd.get_xsave().map_err(KvmError::ioctl(what))?),
            extended_control: fd.get_xcrs().map_err(KvmError::ioctl(what))?,
            debug: fd.get_debug_regs().map_err(KvmError::ioctl(what))?,
            local_apic: Box::new(fd.get_lapic().map_err(KvmError::ioctl(what))?),
            msrs: msrs.as_slice().to_vec(),
            events: fd.get_vcpu_events().map_err(KvmError::ioctl(what))?,
            multiprocessing,
            tsc_khz: self.tsc_khz()?,
        })
    }

    /// The guest's MSRs among those that the host's KVM knows.
    fn guest_msrs(&self, known: Option<&[u32]>) -> Result<Msrs, KvmError> {
        let entry = |index| kvm_msr_entry { index, ..kvm_msr_entry::default() };
        let is_known = |index: &u32| known.is_none_or(|known| known.contains(index));
        let mut entries: Vec<_> = GUEST_MSRS.into_iter().filter(is_known).map(entry).collect();
        loop {
            let mut msrs = msr_list(&entries)?;
            let read = self.fd.get_msrs(&mut msrs).map_err(KvmError::ioctl("read a vCPU's state"))?;
            match entries.get(read) {
                None => return Ok(msrs),
                // One of KVM's own that the guest's CPUID does not offer.
                Some(refused) if known.is_none() || KVM_MSRS.contains(&refused.index) => {
                    entries.remove(read);
                }
                Some(_) => return Err(refused_msr("read", &entries, read)),
            }
        }
    }

    /// Restores a state to a new vCPU. `clocks` are common to all vCPUs of a machine; the first vCPU must be restored first.
    ///
    /// # Errors
    /// When KVM refuses, for instance because this host does not support the guest's time stamp counter frequency.
    #[expect(unsafe_code, reason = "KVM_SET_XSAVE reads beyond its structure if the process has enabled AMX")]
    pub(crate) fn restore(&self, state: &VcpuState, clocks: &Clocks, is_first: bool) -> Result<(), KvmError> {
        let what = "set a vCPU's state";
        let fd = &self.fd;
        if self.tsc_khz()? != state.tsc_khz {
            fd.set_tsc_khz(state.tsc_khz).map_err(KvmError::ioctl("set a vCPU's clock rate"))?;
        }
        fd.set_mp_state(state.multiprocessing).map_err(KvmError::ioctl(what))?;
        fd.set_regs(&state.general).map_err(KvmError::ioctl(what))?;
        let mut special = state.special;
        if cpuid::host_has_svm() {
            // Processors with SVM do not store this bit. KVM adds it to the state that it reports (`svm_get_segment` in
            // arch/x86/kvm/svm/svm.c), and QEMU's KVM would refuse the guest all I/O ports because of it.
            special.tr.type_ &= !TSS_BUSY;
        }
        fd.set_sregs(&special).map_err(KvmError::ioctl(what))?;
        // SAFETY: this process has not enabled a state of more than 4 KiB (ARCH_REQ_XCOMP_GUEST_PERM), so that KVM
        // reads no more than that.
        unsafe { fd.set_xsave(&state.floating_point) }.map_err(KvmError::ioctl(what))?;
        // Processors without XSAVE have no such registers, and KVM refuses to set them.
        if state.extended_control.nr_xcrs > 0 {
            fd.set_xcrs(&state.extended_control).map_err(KvmError::ioctl(what))?;
        }
        fd.set_debug_regs(&state.debug).map_err(KvmError::ioctl(what))?;
        fd.set_lapic(&state.local_apic).map_err(KvmError::ioctl(what))?;
        let mut entries = state.msrs.clone();
        // The state may come from a file: registers that a guest cannot write itself are ignored.
        entries.retain(|entry| GUEST_MSRS.contains(&entry.index));
        for entry in entries.iter_mut().filter(|entry| entry.index == TSC) {
            entry.data = clocks.tsc;
        }
        clocks.prepare_tsc(self, is_first)?;
        let written = fd.set_msrs(&msr_list(&entries)?).map_err(KvmError::ioctl(what))?;
        if written < entries.len() {
            return Err(refused_msr("set", &entries, written));
        }
        fd.set_vcpu_events(&state.events).map_err(KvmError::ioctl(what))
    }

    /// Moves the instruction pointer back to a preceding `out dx, al`, so that the vCPU executes it again; `false` if
    /// the last instruction was a different one.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(crate) fn step_back_over_out(&self, byte_at: impl Fn(u64) -> Option<u8>) -> Result<bool, KvmError> {
        const OUT_DX_AL: u8 = 0xee;
        let what = "step back over an instruction";
        let mut registers = self.fd.get_regs().map_err(KvmError::ioctl(what))?;
        let Some(before) = registers.rip.checked_sub(1) else { return Ok(false) };
        // KVM translates addresses as the guest's kernel would, which SMAP prevents for user pages unless this flag is
        // set.
        let with_access = kvm_regs { rflags: registers.rflags | RFlags::ALIGNMENT_CHECK.bits(), ..registers };
        self.fd.set_regs(&with_access).map_err(KvmError::ioctl(what))?;
        let place = self.fd.translate_gva(before).map_err(KvmError::ioctl(what))?;
        if place.valid == 0 || byte_at(place.physical_address) != Some(OUT_DX_AL) {
            return Ok(false);
        }
        registers.rip = before;
        self.fd.set_regs(&registers).map_err(KvmError::ioctl(what))?;
        Ok(true)
    }
}

pub(super) fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|error| KvmError::Ioctl {
        what: "take a list of MSRs",
        source: std::io::Error::other(format!("{error:?}")),
    })
}

/// The error for the first MSR that KVM does not support; KVM reports the number of those before it.
fn refused_msr(verb: &str, entries: &[kvm_msr_entry], position: usize) -> KvmError {
    let index = entries.get(position).map_or(0, |entry| entry.index);
    KvmError::Ioctl {
        what: "transfer a vCPU's MSRs",
        source: std::io::Error::other(format!("cannot {verb} MSR {index:#x}")),
    }
}
