//! A vCPU: its initial registers, and the loop that runs it and handles its exits.

use super::coalesced::CoalescedWrites;
use super::pause::Waited;
use super::restrictions;
use super::{KvmError, Pause, SavedVcpu};
use crate::boot::{CODE_SEGMENT, DATA_SEGMENT, Entry, GDT_ENTRIES};
use crate::bus::{Buses, GuestRequest};
use crate::function_marks::FunctionMarks;
use crate::jail::JailError;
use crate::layout;
use crate::memory::GuestMemory;
use crate::profile::{ExitKind, Recorder};
use crate::timeline::Instant;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vm_memory::GuestAddress;
use x86_64::registers::control::{Cr0Flags, Cr4Flags, EferFlags};
use x86_64::registers::rflags::RFlags;

/// Interval between attempts of a write that cannot complete yet.
const RETRY_INTERVAL: Duration = Duration::from_millis(1);

/// Counts how often in a row KVM has asked for another attempt to run a vCPU. It does so when another vCPU starts this
/// one; and without end if it cannot start a thread, because the user has as many processes as are allowed.
#[derive(Debug)]
struct Attempts(u32);

impl Attempts {
    const MAX: u32 = 10_000;

    fn note(&mut self, exit: &Result<VcpuExit<'_>, kvm_ioctls::Error>) {
        let is_again = exit.as_ref().is_err_and(|error| error.errno() == libc::EAGAIN);
        self.0 = if is_again { self.0 + 1 } else { 0 };
    }

    /// Whether KVM is called again after this error.
    const fn may_continue(&self, error: i32) -> bool {
        error == libc::EINTR || error == libc::EAGAIN && self.0 < Self::MAX
    }
}

/// Number of VM exits of a vCPU to user space, by the guest's operation. Exits that KVM handles itself are not
/// included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct ExitCounts {
    /// Reads of I/O ports.
    pub port_reads: u64,
    /// Writes of I/O ports.
    pub port_writes: u64,
    /// Reads of memory-mapped device registers.
    pub mmio_reads: u64,
    /// Writes of memory-mapped device registers.
    pub mmio_writes: u64,
    /// All other exits.
    pub other: u64,
}

impl ExitCounts {
    /// Total number of exits.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.port_reads + self.port_writes + self.mmio_reads + self.mmio_writes + self.other
    }

    /// Adds the exits of another vCPU.
    pub const fn add(&mut self, other: &Self) {
        self.port_reads += other.port_reads;
        self.port_writes += other.port_writes;
        self.mmio_reads += other.mmio_reads;
        self.mmio_writes += other.mmio_writes;
        self.other += other.other;
    }
}

/// Why a vCPU has stopped running.
#[derive(Debug)]
pub enum VcpuEnd {
    /// A request of the guest to the machine.
    Request(GuestRequest),
    /// A triple fault: the processor shuts down.
    TripleFault,
    /// KVM reported `KVM_EXIT_INTERNAL_ERROR`.
    InternalError {
        /// KVM's suberror; 1 (`KVM_INTERNAL_ERROR_EMULATION`) is an instruction that KVM cannot emulate.
        suberror: u32,
    },
    /// The processor refused to enter the guest (`KVM_EXIT_FAIL_ENTRY`).
    EntryFailed {
        /// The hardware's failure reason.
        reason: u64,
    },
    /// The guest kept the processor from its host, and its state is lost (`KVM_EXIT_NOTIFY`).
    HeldProcessor,
    /// An exit that is not possible on this machine.
    Unexpected(String),
    /// The ioctl itself failed.
    RunFailed(io::Error),
    /// The thread could not be confined, and has not run the guest.
    NotConfined(JailError),
    /// The machine was stopped.
    Stopped,
}

impl VcpuEnd {
    /// Whether the registers at this end help to find the cause.
    pub(crate) const fn is_failure(&self) -> bool {
        !matches!(self, Self::Request(_) | Self::NotConfined(_) | Self::Stopped)
    }

    /// Converts an exit that this machine does not handle.
    pub(crate) fn of_exit(exit: &VcpuExit<'_>) -> Self {
        match exit {
            // KVM fails with EFAULT when the host memory of a page is missing; newer versions also report the address.
            VcpuExit::MemoryFault { .. } => Self::RunFailed(io::Error::from_raw_os_error(libc::EFAULT)),
            exit if restrictions::is_held_processor(exit) => Self::HeldProcessor,
            other => Self::Unexpected(format!("{other:?}")),
        }
    }
}

/// The registers that show the state of a guest after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize)]
pub struct Registers {
    /// General registers, instruction pointer and flags.
    pub general: kvm_regs,
    /// Control registers 0, 2, 3 and 4.
    pub control: [u64; 4],
    /// Extended feature enable register.
    pub efer: u64,
}

/// A vCPU.
#[derive(Debug)]
pub struct Vcpu {
    pub(super) fd: VcpuFd,
    /// The machine's coalesced writes, which precede the next access.
    coalesced: Option<Arc<CoalescedWrites>>,
    counts: ExitCounts,
    attempts: Attempts,
    /// Records exits and samples, if the boot is profiled.
    pub(crate) recorder: Option<Recorder>,
    /// The guest's memory, for the stacks of samples.
    pub(crate) memory: Option<GuestMemory>,
    /// Kernel functions whose first call is recorded.
    pub(crate) marks: Option<Arc<FunctionMarks>>,
}

impl Vcpu {
    pub(super) const fn new(fd: VcpuFd, coalesced: Option<Arc<CoalescedWrites>>) -> Self {
        Self {
            fd,
            coalesced,
            recorder: None,
            memory: None,
            marks: None,
            attempts: Attempts(0),
            counts: ExitCounts { port_reads: 0, port_writes: 0, mmio_reads: 0, mmio_writes: 0, other: 0 },
        }
    }

    /// Number of exits so far.
    #[must_use]
    pub const fn counts(&self) -> &ExitCounts {
        &self.counts
    }

    /// Starts to count exits anew.
    pub(crate) fn forget_counts(&mut self) {
        self.counts = ExitCounts::default();
    }

    /// Makes this the boot vCPU, which starts the kernel: 64-bit mode with paging, and the address of the zero page in
    /// RSI (Documentation/arch/x86/boot.rst, "64-bit boot protocol"). The other vCPUs wait until the kernel starts
    /// them.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn set_entry(&self, entry: Entry) -> Result<(), KvmError> {
        let mut special = self.fd.get_sregs().map_err(KvmError::ioctl("read a vCPU's registers"))?;
        enter_long_mode(&mut special);
        self.fd.set_sregs(&special).map_err(KvmError::ioctl("set a vCPU's special registers"))?;
        let general = kvm_regs {
            // Bit 1 of RFLAGS is always set.
            rflags: RFlags::empty().bits() | 1 << 1,
            rip: entry.instruction.0,
            rsi: layout::ZERO_PAGE.0,
            ..kvm_regs::default()
        };
        self.fd.set_regs(&general).map_err(KvmError::ioctl("set a vCPU's registers"))
    }

    /// Runs the guest until it ends, or until `stopping` is set and a signal interrupts the vCPU. Waits between two
    /// entries while the machine is paused, and saves its state before if that is requested, for the vCPU with this `id`.
    pub(crate) fn run(&mut self, id: usize, buses: &Buses, stopping: &AtomicBool, pause: &Pause) -> VcpuEnd {
        while !stopping.load(Ordering::Acquire) {
            let Some(saves) = self.prepare_entry(pause) else { continue };
            let (counts, recorder) = (&mut self.counts, &mut self.recorder);
            let coalesced = self.coalesced.as_deref();
            let flush_coalesced = || coalesced.inspect(|writes| writes.flush(&buses.memory));
            let mut record = |kind, address| {
                if let Some(recorder) = recorder {
                    recorder.exit(kind, address);
                }
            };
            let exit = self.fd.run();
            self.attempts.note(&exit);
            match exit {
                Ok(VcpuExit::IoOut(port, &[byte])) if self.marks.is_some() => {
                    if !self.handle_mark()
                        && let Some(request) = self.write_port(buses, port, &[byte])
                    {
                        return VcpuEnd::Request(request);
                    }
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    counts.port_writes += 1;
                    record(ExitKind::PortWrite, port.into());
                    if let Some(request) = buses.ports.write(port, data) {
                        return VcpuEnd::Request(request);
                    }
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    counts.port_reads += 1;
                    record(ExitKind::PortRead, port.into());
                    buses.ports.read(port, data);
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    counts.mmio_reads += 1;
                    record(ExitKind::MmioRead, address);
                    flush_coalesced();
                    buses.memory.read(address, data);
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    counts.mmio_writes += 1;
                    record(ExitKind::MmioWrite, address);
                    flush_coalesced();
                    if let Some(request) = write_memory(buses, address, data, stopping) {
                        return VcpuEnd::Request(request);
                    }
                }
                Ok(exit) if pass_over(&exit) => counts.other += 1,
                Ok(VcpuExit::Shutdown) => return VcpuEnd::TripleFault,
                Ok(VcpuExit::FailEntry(reason, _)) => return VcpuEnd::EntryFailed { reason },
                Ok(VcpuExit::InternalError) => return VcpuEnd::InternalError { suberror: self.suberror() },
                Ok(other) => return VcpuEnd::of_exit(&other),
                Err(error) if saves && error.errno() == libc::EINTR => self.save(id, pause),
                Err(error) if self.attempts.may_continue(error.errno()) => counts.other += 1,
                Err(error) => return VcpuEnd::RunFailed(error.into()),
            }
        }
        VcpuEnd::Stopped
    }

    /// Prepares the next entry into the guest, and returns whether it only completes the instruction of the last exit, so that the
    /// state can be saved. Returns `None` after a pause.
    fn prepare_entry(&mut self, pause: &Pause) -> Option<bool> {
        let saves = match pause.wait(false) {
            Waited::No => false,
            Waited::Save => true,
            Waited::Resumed => {
                self.forgive_pause();
                return None;
            }
        };
        self.fd.set_kvm_immediate_exit(saves.into());
        self.sample_if_due();
        Some(saves)
    }

    /// Saves the state, and waits until the machine continues.
    fn save(&self, id: usize, pause: &Pause) {
        pause.save(SavedVcpu { id, state: self.state(None), at: Instant::now() });
        if pause.wait(true) == Waited::Resumed {
            self.forgive_pause();
        }
    }

    /// Keeps the guest's watchdogs from counting the time of a pause (Documentation/virt/kvm/api.rst,
    /// `KVM_KVMCLOCK_CTRL`). For a guest without kvm-clock KVM refuses.
    fn forgive_pause(&self) {
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Whether the exit was caused by the mark of a function. If so, the function is recorded, and runs next.
    fn handle_mark(&mut self) -> bool {
        let at = Instant::now();
        let Some(marks) = &self.marks else { return false };
        let Ok(mut registers) = self.fd.get_regs() else { return false };
        let function = registers.rip;
        if !marks.remove(function) {
            return false;
        }
        let _ = self.settle();
        registers.rip = function;
        // Reading the registers has just succeeded.
        let _ = self.fd.set_regs(&registers);
        if let Some(recorder) = &mut self.recorder {
            recorder.mark(at, function);
        }
        true
    }

    /// Handles a write of a port after the exit structure has been released.
    fn write_port(&mut self, buses: &Buses, port: u16, data: &[u8]) -> Option<GuestRequest> {
        self.counts.port_writes += 1;
        if let Some(recorder) = &mut self.recorder {
            recorder.exit(ExitKind::PortWrite, port.into());
        }
        buses.ports.write(port, data)
    }

    /// Records a sample, if one is due.
    fn sample_if_due(&mut self) {
        if !self.recorder.as_ref().is_some_and(Recorder::sample_is_due) {
            return;
        }
        let Ok(registers) = self.fd.get_regs() else { return };
        let stack = self.return_addresses(registers.rsp);
        if let Some(recorder) = &mut self.recorder {
            recorder.sample(registers.rip, stack);
        }
    }

    /// The values on a kernel stack that look like addresses of the kernel's text. Stacks are aligned to their size
    /// (THREAD_SIZE in arch/x86/include/asm/page_64_types.h, without KASAN).
    fn return_addresses(&self, stack_pointer: u64) -> Vec<u64> {
        const STACK: u64 = 16 * 1024;
        /// The last 2 GiB of the address space, where x86-64 kernels are linked.
        const TEXT: u64 = 0xffff_ffff_8000_0000;
        /// Kernel addresses have the highest bit set.
        const KERNEL: u64 = 1 << 63;
        let mut found = Vec::new();
        let Some(memory) = self.memory.as_ref().filter(|_| stack_pointer & KERNEL != 0) else {
            return found;
        };
        let mut at = stack_pointer & !7;
        let end = at.saturating_add(1) | (STACK - 1);
        while at < end {
            let page_end = (at | (layout::PAGE_SIZE - 1)).min(end);
            let Ok(translation) = self.fd.translate_gva(at) else { return found };
            if translation.valid == 0 {
                return found;
            }
            let mut bytes = vec![0; usize::try_from(page_end - at + 1).unwrap_or(0)];
            if memory.read(GuestAddress(translation.physical_address), &mut bytes).is_err() {
                return found;
            }
            let words =
                bytes.chunks_exact(8).filter_map(|word| Some(u64::from_le_bytes(word.try_into().ok()?)));
            found.extend(words.filter(|&word| word >= TEXT));
            // The guest controls the address of its stack, which may be at the end of the address space.
            let Some(next) = page_end.checked_add(1) else { return found };
            at = next;
        }
        found
    }

    fn suberror(&mut self) -> u32 {
        // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, for which KVM fills this member; it
        // is plain data whatever it holds.
        unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror }
    }

    /// The registers, if KVM can provide them. On AMD processors KVM resets a vCPU that has shut down before it reports
    /// the exit (`shutdown_interception` in arch/x86/kvm/svm/svm.c); the registers are lost in that case.
    #[must_use]
    pub fn registers(&self) -> Option<Registers> {
        /// The instruction pointer after a reset, which a running 64-bit guest never has.
        const RESET_VECTOR: u64 = 0xfff0;
        let general = self.fd.get_regs().ok().filter(|general| general.rip != RESET_VECTOR)?;
        let special = self.fd.get_sregs().ok()?;
        let control = [special.cr0, special.cr2, special.cr3, special.cr4];
        Some(Registers { general, control, efer: special.efer })
    }
}

/// Writes to a device's register, and again as long as the device asks for that.
fn write_memory(buses: &Buses, address: u64, data: &[u8], stopping: &AtomicBool) -> Option<GuestRequest> {
    loop {
        match buses.memory.write(address, data) {
            Some(GuestRequest::Retry) if stopping.load(Ordering::Acquire) => return None,
            Some(GuestRequest::Retry) => std::thread::park_timeout(RETRY_INTERVAL),
            request => return request,
        }
    }
}

fn enter_long_mode(registers: &mut kvm_sregs) {
    registers.gdt.base = layout::GDT.0;
    registers.gdt.limit = u16::try_from(size_of_val(&GDT_ENTRIES) - 1).unwrap_or(u16::MAX);
    registers.idt.limit = 0;
    registers.cs = segment(CODE_SEGMENT);
    for data in
        [&mut registers.ds, &mut registers.es, &mut registers.fs, &mut registers.gs, &mut registers.ss]
    {
        *data = segment(DATA_SEGMENT);
    }
    registers.cr3 = layout::PAGE_TABLES.0;
    registers.cr4 |= Cr4Flags::PHYSICAL_ADDRESS_EXTENSION.bits();
    registers.cr0 |= (Cr0Flags::PROTECTED_MODE_ENABLE | Cr0Flags::PAGING).bits();
    registers.efer |= (EferFlags::LONG_MODE_ENABLE | EferFlags::LONG_MODE_ACTIVE).bits();
}

/// The segment register for an entry of the GDT: KVM expects unpacked descriptors.
fn segment(index: u16) -> kvm_segment {
    let descriptor = GDT_ENTRIES[usize::from(index)];
    let bits = |from: u32, count: u32| (descriptor >> from) & ((1 << count) - 1);
    let byte = |from, count| bits(from, count).to_le_bytes()[0];
    kvm_segment {
        base: bits(16, 24) | bits(56, 8) << 24,
        // The granularity is a page: the limit in the descriptor is in units of 4 KiB.
        limit: u32::MAX,
        selector: index << 3,
        type_: byte(40, 4),
        s: byte(44, 1),
        dpl: byte(45, 2),
        present: byte(47, 1),
        avl: byte(52, 1),
        l: byte(53, 1),
        db: byte(54, 1),
        g: byte(55, 1),
        ..kvm_segment::default()
    }
}

/// Handles an exit after which the guest continues as if there had been none: a signal arrived, or it asserted a bus lock, for
/// which it is held up. Returns whether it was such an exit.
fn pass_over(exit: &VcpuExit<'_>) -> bool {
    if restrictions::is_bus_lock(exit) {
        restrictions::pause_after_bus_lock();
        return true;
    }
    matches!(exit, VcpuExit::Intr)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_that_cannot_be_run_ends() {
        let mut attempts = Attempts(0);
        let again = || Err(kvm_ioctls::Error::new(libc::EAGAIN));
        for _ in 1..Attempts::MAX {
            attempts.note(&again());
            assert!(attempts.may_continue(libc::EAGAIN) && attempts.may_continue(libc::EINTR));
        }
        attempts.note(&again());
        assert!(!attempts.may_continue(libc::EAGAIN), "it would never end");
        attempts.note(&Ok(VcpuExit::Hlt));
        assert!(attempts.may_continue(libc::EAGAIN) && !attempts.may_continue(libc::EFAULT));
    }

    #[test]
    fn segments_are_flat_and_64_bit() {
        let code = segment(CODE_SEGMENT);
        // Type 11: code, execute and read, accessed (Intel SDM, volume 3, table 3-1).
        assert_eq!((code.selector, code.base, code.type_, code.s, code.dpl), (0x10, 0, 11, 1, 0));
        assert_eq!((code.present, code.l, code.db, code.g), (1, 1, 0, 1));
        let data = segment(DATA_SEGMENT);
        assert_eq!((data.selector, data.base, data.type_, data.s, data.dpl), (0x18, 0, 3, 1, 0));
        assert_eq!((data.present, data.l), (1, 0));
    }
}
