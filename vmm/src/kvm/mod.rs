//! The interface to KVM: the only module that calls KVM's ioctls.
#![expect(unsafe_code, reason = "giving guest memory to KVM, reading its run structure")]

mod clocks;
mod coalesced;
mod cpuid;
mod pause;
mod prefault;
pub mod probe;
mod restrictions;
mod state;
mod vcpu;

pub(crate) use clocks::Clocks;
use coalesced::CoalescedWrites;
pub(crate) use pause::{Pause, SavedVcpu};
pub use state::VcpuState;
pub use vcpu::{ExitCounts, Registers, Vcpu, VcpuEnd};

use crate::config::InterruptControllers;
use crate::devices::io_apic::{Message, MessageSink};
use crate::devices::virtio::{ACKNOWLEDGE, ACKNOWLEDGE_QUEUES, DOORBELL, RegisterPages};
use crate::layout::{self, Gsi};
use crate::memory::GuestMemory;
use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY,
    KvmIrqRouting, kvm_clock_data, kvm_enable_cap, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VmFd};
use rustix::fs::{Mode, OFlags};
use rustix::io_uring::{
    IoringRegisterOp, IoringSetupFlags, io_uring_params, io_uring_register, io_uring_setup,
};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

/// Path of the KVM device.
pub const DEVICE: &str = "/dev/kvm";
/// The KVM API version, which has not changed since 2007.
const API_VERSION: i32 = 12;

/// Why KVM is not usable, or which operation it refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmError {
    /// There is no KVM device.
    #[error("{DEVICE} does not exist: this host offers no KVM, or its module is not loaded")]
    Absent,
    /// The user has no permission to open the device.
    #[error("no permission to open {DEVICE}: join the group that owns it, often kvm")]
    NoPermission,
    /// The device cannot be opened for another reason.
    #[error("cannot open {DEVICE}")]
    Open(#[source] io::Error),
    /// A KVM that emulates virtualization in software.
    #[error(
        "{DEVICE} is a software KVM: this processor has neither VMX nor SVM, and such a KVM \
         cannot run a Linux kernel"
    )]
    SoftwareOnly,
    /// A KVM with another API version.
    #[error("{DEVICE} has API version {0}, but version {API_VERSION} is required")]
    ApiVersion(i32),
    /// Memory beyond the physical address space of the processor.
    #[error(
        "memory would end at {end:#x}, but this processor's physical addresses have {bits} bits: give the \
         guest less memory, or smaller pmem files"
    )]
    OutOfReach {
        /// Guest-physical address of the end of the memory.
        end: u64,
        /// Width of the processor's physical addresses in bits.
        bits: u8,
    },
    /// An ioctl failed.
    #[error("KVM refused to {what}")]
    Ioctl {
        /// The operation.
        what: &'static str,
        /// KVM's error.
        source: io::Error,
    },
}

impl KvmError {
    fn ioctl(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Ioctl { what, source: error.into() }
    }
}

/// The host's KVM (`/dev/kvm`).
#[derive(Debug)]
pub struct Hypervisor {
    kvm: Kvm,
    supported_cpuid: CpuId,
}

impl Hypervisor {
    /// Opens KVM, and checks that the processor can run guests. `kindling doctor` checks more.
    ///
    /// # Errors
    /// The reason why KVM is not usable.
    pub fn open() -> Result<Self, KvmError> {
        Self::with(open_device()?)
    }

    /// Uses a descriptor of /dev/kvm.
    ///
    /// # Errors
    /// The reason why KVM is not usable.
    pub(crate) fn from_descriptor(descriptor: OwnedFd) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is owned, and its ownership is transferred here.
        Self::with(checked(unsafe { Kvm::from_raw_fd(descriptor.into_raw_fd()) })?)
    }

    /// Opens /dev/kvm for another process, which checks it.
    pub(crate) fn open_descriptor() -> Result<OwnedFd, KvmError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        rustix::fs::open("/dev/kvm", flags, Mode::empty()).map_err(|error| refused(error.into()))
    }

    fn with(kvm: Kvm) -> Result<Self, KvmError> {
        if !cpuid::host_has_virtualization() {
            return Err(KvmError::SoftwareOnly);
        }
        let supported_cpuid =
            supported_cpuid(&kvm).map_err(KvmError::ioctl("say which CPUID leaves it supports"))?;
        Ok(Self { kvm, supported_cpuid: cpuid::compact(&supported_cpuid) })
    }

    /// Indices of the model-specific registers that this KVM can save and restore.
    ///
    /// # Errors
    /// When KVM refuses.
    pub(crate) fn msr_indices(&self) -> Result<Vec<u32>, KvmError> {
        let list = self.kvm.get_msr_index_list().map_err(KvmError::ioctl("list its MSRs"))?;
        Ok(list.as_slice().to_vec())
    }

    /// CPUID of the first of `count` vCPUs on this host.
    #[must_use]
    pub fn cpuid(&self, count: u8) -> CpuId {
        cpuid::for_vcpu(&self.supported_cpuid, 0, count)
    }
}

/// The CPUID leaves that KVM supports. The buffer is zeroed first, so that a large one is only used if KVM has many
/// leaves.
fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, kvm_ioctls::Error> {
    const USUAL_ENTRIES: usize = 96;
    match kvm.get_supported_cpuid(USUAL_ENTRIES) {
        Err(error) if error.errno() == libc::E2BIG => kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES),
        result => result,
    }
}

fn open_device() -> Result<Kvm, KvmError> {
    checked(Kvm::new().map_err(|error| refused(error.into()))?)
}

/// The reason why /dev/kvm cannot be opened.
fn refused(error: io::Error) -> KvmError {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => KvmError::Absent,
        Some(libc::EACCES | libc::EPERM) => KvmError::NoPermission,
        _ => KvmError::Open(error),
    }
}

fn checked(kvm: Kvm) -> Result<Kvm, KvmError> {
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        other => Err(KvmError::ApiVersion(other)),
    }
}

/// The interrupt routing table of a machine whose lines are messages.
#[derive(Debug)]
struct MessageRoutes(Arc<VmFd>);

impl MessageSink for MessageRoutes {
    fn set(&mut self, messages: &[Option<Message>]) -> io::Result<()> {
        let entry = |(gsi, message): (u32, &Option<Message>)| {
            let Message { address, data } = (*message)?;
            let [low, high] =
                [address & 0xffff_ffff, address >> 32].map(|half| u32::try_from(half).unwrap_or(0));
            let msi = kvm_irq_routing_msi {
                address_lo: low,
                address_hi: high,
                data,
                ..kvm_irq_routing_msi::default()
            };
            Some(kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
                ..kvm_irq_routing_entry::default()
            })
        };
        let entries: Vec<_> = (0..).zip(messages).filter_map(entry).collect();
        // KVM accepts 4096 entries, and there are at most 24.
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| io::ErrorKind::InvalidInput)?;
        Ok(self.0.set_gsi_routing(&table)?)
    }
}

/// A virtual machine with its memory and interrupt controllers.
#[derive(Debug)]
pub struct Vm {
    fd: Arc<VmFd>,
    supported_cpuid: CpuId,
    /// Whether there are registers with coalesced writes.
    coalesces: AtomicBool,
    /// The ring of coalesced writes, once there is a vCPU.
    coalesced: OnceLock<Arc<CoalescedWrites>>,
}

impl Vm {
    /// Creates a machine without memory and vCPUs. The local APICs are emulated by KVM; the other interrupt controllers
    /// are as configured.
    ///
    /// There is no PIT: kernels take the time from kvm-clock and timers from the local APIC.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn new(hypervisor: Hypervisor, controllers: InterruptControllers) -> Result<Self, KvmError> {
        let fd = hypervisor.kvm.create_vm().map_err(KvmError::ioctl("create a VM"))?;
        restrictions::restrict_machine(&fd);
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP.0)
            .map_err(KvmError::ioctl("place its identity map"))?;
        fd.set_tss_address(usize::try_from(layout::KVM_TSS.0).unwrap_or(usize::MAX))
            .map_err(KvmError::ioctl("place its task state segment"))?;
        let what = "create the interrupt controllers";
        match controllers {
            InterruptControllers::Pc => fd.create_irq_chip().map_err(KvmError::ioctl(what))?,
            InterruptControllers::IoApic => {
                let mut capability =
                    kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..kvm_enable_cap::default() };
                capability.args[0] = layout::IO_APIC_PINS.into();
                fd.enable_cap(&capability).map_err(KvmError::ioctl(what))?;
            }
        }
        Ok(Self {
            fd: Arc::new(fd),
            coalesces: AtomicBool::new(false),
            coalesced: OnceLock::new(),
            supported_cpuid: hypervisor.supported_cpuid,
        })
    }

    /// CPUID of the first of `count` vCPUs.
    #[must_use]
    pub fn cpuid(&self, count: u8) -> CpuId {
        cpuid::for_vcpu(&self.supported_cpuid, 0, count)
    }

    /// The machine's clock in nanoseconds, which the guest reads as kvm-clock.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn clock(&self) -> Result<u64, KvmError> {
        Ok(self.fd.get_clock().map_err(KvmError::ioctl("read the machine's clock"))?.clock)
    }

    /// Sets the machine's clock in nanoseconds.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn set_clock(&self, nanoseconds: u64) -> Result<(), KvmError> {
        let clock = kvm_clock_data { clock: nanoseconds, ..kvm_clock_data::default() };
        self.fd.set_clock(&clock).map_err(KvmError::ioctl("set the machine's clock"))
    }

    /// The receiver for the messages of an I/O APIC in user space.
    #[must_use]
    pub fn message_routes(&self) -> Box<dyn MessageSink> {
        Box::new(MessageRoutes(Arc::clone(&self.fd)))
    }

    /// Makes `memory` the RAM of the machine.
    ///
    /// # Safety
    /// `memory` lives at least as long as the last vCPU of this machine.
    ///
    /// # Errors
    /// When KVM refuses.
    pub unsafe fn set_memory(&self, memory: &GuestMemory) -> Result<(), KvmError> {
        memory.exclude_from_core_dumps();
        for (slot, region) in (0..).zip(memory.inner().iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the region is mapped for `memory_size` bytes, slots do not overlap by the
            // layout, and the caller keeps the mapping alive.
            unsafe { self.fd.set_user_memory_region(slot) }.map_err(KvmError::ioctl("take guest memory"))?;
        }
        Ok(())
    }

    /// Maps the registers of the virtio devices into the guest as read-only memory: writes exit to the VMM.
    ///
    /// # Safety
    /// `pages` lives at least as long as the last vCPU of this machine.
    ///
    /// # Errors
    /// When KVM refuses.
    pub unsafe fn map_registers(&self, pages: &RegisterPages) -> Result<(), KvmError> {
        /// After the slots of RAM.
        const SLOT: u32 = 16;
        let slot = kvm_userspace_memory_region {
            slot: SLOT,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: layout::VIRTIO_MMIO.0,
            memory_size: pages.size(),
            userspace_addr: pages.mapping().as_ptr() as u64,
        };
        // SAFETY: the pages are mapped for `memory_size` bytes, lie outside RAM by the layout, and the caller
        // keeps the mapping alive.
        unsafe { self.fd.set_user_memory_region(slot) }
            .map_err(KvmError::ioctl("show the registers of devices"))
    }

    /// Maps the files beside `memory` into the guest. Writes to a read-only file exit to this process, which ignores
    /// them.
    ///
    /// # Safety
    /// The files lie at addresses outside RAM and each other, and `memory` lives at least as long as the last vCPU
    /// of this machine.
    ///
    /// # Errors
    /// When the guest's processor cannot reach one, or KVM refuses.
    pub unsafe fn map_files(&self, memory: &GuestMemory) -> Result<(), KvmError> {
        /// After the slot of the registers.
        const FIRST_SLOT: u32 = 17;
        let bits = cpuid::physical_address_bits(&self.supported_cpuid);
        for (slot, (start, file)) in (FIRST_SLOT..).zip(memory.mapped_files()) {
            let end = start.0.saturating_add(file.size());
            if end > 1 << bits {
                return Err(KvmError::OutOfReach { end, bits });
            }
            let slot = kvm_userspace_memory_region {
                slot,
                flags: if file.is_writable() { 0 } else { KVM_MEM_READONLY },
                guest_phys_addr: start.0,
                memory_size: file.size(),
                userspace_addr: file.as_ptr() as u64,
            };
            // SAFETY: the file is mapped for `memory_size` bytes, and the caller guarantees its address and keeps the
            // mapping alive.
            unsafe { self.fd.set_user_memory_region(slot) }
                .map_err(KvmError::ioctl("take a file as memory"))?;
        }
        Ok(())
    }

    /// The doorbell of a virtio device whose registers are at `registers`: an eventfd that KVM signals without an exit,
    /// unless `to_vcpu` requests exits to the vCPU's thread. Acknowledgments of interrupts, which the devices do not
    /// need, are also discarded by KVM without an exit.
    ///
    /// # Errors
    /// When the host has no descriptor left, or KVM refuses.
    pub fn doorbell(&self, registers: GuestAddress, to_vcpu: bool) -> Result<EventFd, KvmError> {
        let what = "connect a device's doorbell";
        let eventfd = || {
            EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(|source| KvmError::Ioctl { what, source })
        };
        let doorbell = eventfd()?;
        if !to_vcpu {
            self.fd
                .register_ioevent(&doorbell, &IoEventAddress::Mmio(registers.0 + DOORBELL), NoDatamatch)
                .map_err(KvmError::ioctl(what))?;
        }
        // KVM keeps this eventfd, which is never read.
        self.fd
            .register_ioevent(
                &eventfd()?,
                &IoEventAddress::Mmio(registers.0 + ACKNOWLEDGE),
                ACKNOWLEDGE_QUEUES,
            )
            .map_err(KvmError::ioctl(what))?;
        Ok(doorbell)
    }

    /// Coalesces writes of these registers until the next access that exits to this process. A KVM without coalescing
    /// exits for each write. The setup takes KVM as long as about three exits (exact lab), and must precede the
    /// creation of vCPUs: it is useful for guests that boot.
    pub fn coalesce_writes(&self, start: GuestAddress, length: u32) {
        let result = self.fd.register_coalesced_mmio(IoEventAddress::Mmio(start.0), length);
        self.coalesces.fetch_or(result.is_ok(), Ordering::Relaxed);
    }

    /// Delays the destruction of the machine, which takes milliseconds, until after the end of this process; also that
    /// of `other`, whose close takes as long.
    ///
    /// The end of a process closes its files, and closing the last descriptor of a VM waits for RCU
    /// (`kvm_mmu_uninit_tdp_mmu` in arch/x86/kvm/mmu/tdp_mmu.c). An io_uring with registered files holds references to
    /// them, and is destroyed by a kernel thread after the end of the process (`io_ring_exit_work` in
    /// io_uring/io_uring.c). The result must stay open until then.
    ///
    /// # Errors
    /// When the host has no io_uring or does not allow this user to create one.
    pub fn outlive_process(&self, other: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
        const FILES: u32 = 2;
        // An entry of -1 is empty.
        let files = [Some(self.fd.as_raw_fd()), other.map(|fd| fd.as_raw_fd())].map(|fd| fd.unwrap_or(-1));
        // A ring that is never enabled executes nothing, so that a guest which has taken this process over has no use
        // for it.
        let mut parameters = io_uring_params::default();
        parameters.flags = IoringSetupFlags::R_DISABLED;
        // SAFETY: the other parameters are zero. Registering reads the two descriptors, and no memory of this process is
        // shared with the ring.
        unsafe {
            let ring = io_uring_setup(1, &mut parameters)?;
            io_uring_register(&ring, IoringRegisterOp::RegisterFiles, files.as_ptr().cast(), FILES)?;
            Ok(ring)
        }
    }

    /// An eventfd (irqfd) whose writes raise an edge on an interrupt line.
    ///
    /// # Errors
    /// When the host has no descriptor left, or KVM refuses.
    pub fn interrupt(&self, line: Gsi) -> Result<EventFd, KvmError> {
        let what = "connect an interrupt line";
        let fd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|source| KvmError::Ioctl { what, source })?;
        self.fd.register_irqfd(&fd, line.0).map_err(KvmError::ioctl(what))?;
        Ok(fd)
    }

    /// Creates vCPU `id` of a machine that has `count` of them.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn create_vcpu(&self, id: u8, count: u8) -> Result<Vcpu, KvmError> {
        let fd = self.fd.create_vcpu(id.into()).map_err(KvmError::ioctl("create a vCPU"))?;
        let cpuid = cpuid::for_vcpu(&self.supported_cpuid, id, count);
        fd.set_cpuid2(&cpuid).map_err(KvmError::ioctl("set a vCPU's CPUID"))?;
        restrictions::restrict_vcpu(&fd);
        if self.coalesces.load(Ordering::Relaxed)
            && self.coalesced.get().is_none()
            && let Ok(ring) = CoalescedWrites::of(&fd)
        {
            let _ = self.coalesced.set(Arc::new(ring));
        }
        Ok(Vcpu::new(fd, self.coalesced.get().cloned()))
    }
}
