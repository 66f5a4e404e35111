//! A vCPU's state as plain data: read from KVM, and given to another KVM of the same kind.
//!
//! Which state there is, and in which order it must be set, is in Documentation/virt/kvm/api.rst: special
//! registers before the local APIC (they turn it on), the local APIC before the MSRs (the deadline of its
//! timer is one), pending events last.

use super::{KvmError, Vcpu, cpuid};
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
const TSC: u32 = 0x10;

/// Busy bit of a task state segment's type (AMD APM, volume 2, section 4.8.3).
const TSS_BUSY: u8 = 0x2;

/// The model-specific registers that are a guest's own, as far as the host's KVM has them: all that a
/// Linux guest may have written and will miss. What describes the processor follows from CPUID. The address of
/// KVM's wall clock is left out: KVM writes the time there when it is set, and a kernel sets it each time it
/// wants to know (`kvm_get_wallclock` in arch/x86/kernel/kvmclock.c).
const OWN_MSRS: [u32; 32] = [
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
    0x4b56_4d07, // their acknowledgement,
    0x4b56_4d08, // migration
    0xc000_0081, // SYSCALL: segments,
    0xc000_0082, // 64-bit target,
    0xc000_0083, // compatibility target,
    0xc000_0084, // flag mask
    0xc000_0102, // base that SWAPGS exchanges
    0xc000_0103, // what RDTSCP says of the processor
    0xc001_011f, // speculation control of a virtual processor
];

/// What there is to one vCPU.
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

/// Reads a structure of KVM's to where it stays. These are too large to be handed from function to function: each
/// that has one on its stack makes the host find memory for it.
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
    /// Finishes the instruction that the vCPU left with: KVM does so when it is entered the next time,
    /// and entering it with the wish to leave at once does that and no more.
    /// `false` where the instruction is not finished with it: an access of many bytes leaves several times.
    pub(crate) fn settle(&mut self) -> bool {
        self.fd.set_kvm_immediate_exit(1);
        let is_settled = self.fd.run().is_err_and(|error| error.errno() == libc::EINTR);
        self.fd.set_kvm_immediate_exit(0);
        is_settled
    }

    /// The time stamp counter as the guest reads it now.
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

    /// Reads the state of a vCPU that does not run and is [settled](Self::settle). `known` are the numbers
    /// of the MSRs that the host's KVM can read.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn state(&self, known: &[u32]) -> Result<VcpuState, KvmError> {
        let what = "read a vCPU's state";
        let fd = &self.fd;
        // This first: it takes in what other vCPUs have sent.
        let multiprocessing = fd.get_mp_state().map_err(KvmError::ioctl(what))?;
        let entries: Vec<_> = OWN_MSRS
            .into_iter()
            .filter(|index| known.contains(index))
            .map(|index| kvm_msr_entry { index, ..kvm_msr_entry::default() })
            .collect();
        let mut msrs = msr_list(&entries)?;
        let read = fd.get_msrs(&mut msrs).map_err(KvmError::ioctl(what))?;
        if read < entries.len() {
            return Err(refused_msr("read", &entries, read));
        }
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

    /// Makes a new vCPU go on where another stopped. `tsc` is the time stamp counter, which all vCPUs of a
    /// machine share; the first vCPU has to be restored first.
    ///
    /// # Errors
    /// When KVM refuses, for instance because this host cannot give the guest the frequency of its time
    /// stamp counter.
    #[expect(unsafe_code, reason = "KVM_SET_XSAVE reads behind its structure where a process asked for AMX")]
    pub fn restore(&self, state: &VcpuState, tsc: u64, is_first: bool) -> Result<(), KvmError> {
        let what = "set a vCPU's state";
        let fd = &self.fd;
        if self.tsc_khz()? != state.tsc_khz {
            fd.set_tsc_khz(state.tsc_khz).map_err(KvmError::ioctl("set a vCPU's clock rate"))?;
        }
        fd.set_mp_state(state.multiprocessing).map_err(KvmError::ioctl(what))?;
        fd.set_regs(&state.general).map_err(KvmError::ioctl(what))?;
        let mut special = state.special;
        if cpuid::host_has_svm() {
            // Processors with SVM do not keep this bit, KVM adds it when it is asked (`svm_get_segment` in
            // arch/x86/kvm/svm/svm.c), and QEMU's would refuse the guest all I/O ports for it.
            special.tr.type_ &= !TSS_BUSY;
        }
        fd.set_sregs(&special).map_err(KvmError::ioctl(what))?;
        // SAFETY: this process has not asked for a state of more than 4 KiB (ARCH_REQ_XCOMP_GUEST_PERM),
        // and KVM reads no more than that then.
        unsafe { fd.set_xsave(&state.floating_point) }.map_err(KvmError::ioctl(what))?;
        // Processors without XSAVE have none, and KVM refuses to set them.
        if state.extended_control.nr_xcrs > 0 {
            fd.set_xcrs(&state.extended_control).map_err(KvmError::ioctl(what))?;
        }
        fd.set_debug_regs(&state.debug).map_err(KvmError::ioctl(what))?;
        fd.set_lapic(&state.local_apic).map_err(KvmError::ioctl(what))?;
        let mut entries = state.msrs.clone();
        // The file that they came from names none that a guest could not write itself.
        entries.retain(|entry| OWN_MSRS.contains(&entry.index));
        for entry in entries.iter_mut().filter(|entry| entry.index == TSC) {
            entry.data = tsc;
        }
        // KVM before 6.7 takes a value that is within a second of its own for an attempt to bring a vCPU in
        // step, and leaves the counter as it is (`kvm_synchronize_tsc` in arch/x86/kvm/x86.c). A guest that
        // ran for some milliseconds is that close to a new machine. After a value that is far from both, the
        // counter's own is set, and the other vCPUs get the same.
        if is_first {
            const FAR_MS: u64 = 10_000;
            let far = tsc.wrapping_add(FAR_MS * u64::from(state.tsc_khz));
            let entry = kvm_msr_entry { index: TSC, data: far, ..kvm_msr_entry::default() };
            fd.set_msrs(&msr_list(&[entry])?).map_err(KvmError::ioctl(what))?;
        }
        let written = fd.set_msrs(&msr_list(&entries)?).map_err(KvmError::ioctl(what))?;
        if written < entries.len() {
            return Err(refused_msr("set", &entries, written));
        }
        fd.set_vcpu_events(&state.events).map_err(KvmError::ioctl(what))
    }

    /// Steps back over `out dx, al`, so that the vCPU executes it again; `false` where the last
    /// instruction was another one.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(crate) fn step_back_over_out(&self, byte_at: impl Fn(u64) -> Option<u8>) -> Result<bool, KvmError> {
        const OUT_DX_AL: u8 = 0xee;
        let what = "step back over an instruction";
        let mut registers = self.fd.get_regs().map_err(KvmError::ioctl(what))?;
        let Some(before) = registers.rip.checked_sub(1) else { return Ok(false) };
        // KVM looks addresses up as the guest's kernel would, which SMAP keeps from user pages unless this
        // flag is set.
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

fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|error| KvmError::Ioctl {
        what: "take a list of MSRs",
        source: std::io::Error::other(format!("{error:?}")),
    })
}

/// KVM stops at the first MSR that it does not take and says how many came before.
fn refused_msr(verb: &str, entries: &[kvm_msr_entry], position: usize) -> KvmError {
    let index = entries.get(position).map_or(0, |entry| entry.index);
    KvmError::Ioctl {
        what: "transfer a vCPU's MSRs",
        source: std::io::Error::other(format!("it does not {verb} MSR {index:#x}")),
    }
}
