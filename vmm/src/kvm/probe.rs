//! A probe of the host's KVM, which runs guest code.
//!
//! A KVM device can exist, open and create machines and still be unable to run Linux: a software KVM emulates the
//! guest's kernel mode slowly and incompletely. The probe therefore runs a few instructions in kernel mode, one of
//! which such emulators lack, and measures the time of a loop.

pub use super::restrictions::Restriction;

use super::{Hypervisor, KvmError, Vcpu, Vm, open_device, restrictions};
use crate::boot::{self, Entry};
use crate::config::InterruptControllers;
use crate::layout;
use crate::memory::GuestMemory;
use crate::timeline::Instant;
use kvm_ioctls::VcpuExit;
use std::time::Duration;
use vm_memory::GuestAddress;

/// The result of the probe.
#[derive(Debug)]
pub enum Probe {
    /// KVM runs guests at full speed.
    Hardware {
        /// Duration of the probe's loop of a million iterations.
        loop_time: Duration,
        /// What it cannot restrict.
        missing: Vec<Restriction>,
    },
    /// KVM emulates kernel mode in software.
    Software {
        /// What the detection is based on.
        failed_on: String,
    },
    /// The user has no permission to open the device.
    NoPermission,
    /// The device does not exist.
    Absent,
    /// The device exists, but does not work.
    Broken(KvmError),
}

impl Probe {
    /// Whether KVM can run guests.
    #[must_use]
    pub const fn is_good(&self) -> bool {
        matches!(self, Self::Hardware { .. })
    }
}

/// 64-bit code that counts bits, and then counts down from a million.
const CODE: [u8; 22] = [
    0xb9, 0x0f, 0x0f, 0x00, 0x00, // mov ecx, 0x0f0f
    0xf3, 0x0f, 0xb8, 0xc1, //       popcnt eax, ecx
    0xe6, 0x10, //                   out 0x10, al
    0xb9, 0x40, 0x42, 0x0f, 0x00, // mov ecx, 1000000
    0xff, 0xc9, //               1:  dec ecx
    0x75, 0xfc, //                   jnz 1b
    0xe6, 0x11, //                   out 0x11, al
];
const CODE_ADDRESS: GuestAddress = layout::HIGH_MEMORY;
const BITS_OF_0F0F: u8 = 8;
/// Hardware takes well below a millisecond, an emulator most of a second.
const SLOWEST_HARDWARE: Duration = Duration::from_millis(100);

/// Probes this host's KVM. Takes less than a millisecond on hardware, and about a second on a software KVM.
#[must_use]
pub fn probe() -> Probe {
    match run() {
        Ok(found) => found,
        Err(KvmError::Absent) => Probe::Absent,
        Err(KvmError::NoPermission) => Probe::NoPermission,
        Err(error) => Probe::Broken(error),
    }
}

fn run() -> Result<Probe, KvmError> {
    let kvm = open_device()?;
    let missing = restrictions::missing(&kvm);
    let supported_cpuid = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::ioctl("say which CPUID leaves it supports"))?;
    let vm = Vm::new(Hypervisor { kvm, supported_cpuid }, InterruptControllers::IoApic)?;
    let refused = |error| KvmError::Ioctl { what: "take guest memory", source: std::io::Error::other(error) };
    let memory = GuestMemory::anonymous(2 * layout::MIB).map_err(refused)?;
    memory.write(CODE_ADDRESS, &CODE).map_err(refused)?;
    boot::write_tables(&memory).map_err(refused)?;
    // SAFETY: the vCPU below is dropped before `memory`, which was declared before it.
    unsafe { vm.set_memory(&memory) }?;
    let mut vcpu = vm.create_vcpu(0, 1)?;
    vcpu.set_entry(Entry { instruction: CODE_ADDRESS })?;
    Ok(run_code(&mut vcpu, missing))
}

fn run_code(vcpu: &mut Vcpu, missing: Vec<Restriction>) -> Probe {
    let software = |failed_on: String| Probe::Software { failed_on };
    match next_output(vcpu) {
        Ok((0x10, BITS_OF_0F0F)) => {}
        Ok((port, value)) => return software(format!("POPCNT gave {value} on port {port:#x} instead of 8")),
        Err(exit) => return software(format!("a POPCNT instruction in kernel mode ended with {exit}")),
    }
    let start = Instant::now();
    match next_output(vcpu) {
        Ok((0x11, _)) => {}
        Ok((port, _)) => return software(format!("a loop ended at port {port:#x}")),
        Err(exit) => return software(format!("a loop in kernel mode ended with {exit}")),
    }
    let loop_time = Duration::from_nanos(Instant::now().since(start));
    if loop_time > SLOWEST_HARDWARE {
        return software(format!("a loop of a million iterations in kernel mode took {loop_time:.1?}"));
    }
    Probe::Hardware { loop_time, missing }
}

/// Runs until the guest writes a port; returns the port and the byte.
fn next_output(vcpu: &mut Vcpu) -> Result<(u16, u8), String> {
    /// Limit of interruptions by signals.
    const MAX_INTERRUPTIONS: u32 = 1000;
    for _ in 0..MAX_INTERRUPTIONS {
        match vcpu.fd.run() {
            Ok(VcpuExit::IoOut(port, &[value])) => return Ok((port, value)),
            Ok(VcpuExit::Intr) => {}
            Ok(VcpuExit::InternalError) => return Err("KVM_EXIT_INTERNAL_ERROR (emulation failure)".into()),
            Ok(exit) => return Err(format!("{exit:?}")),
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
    Err("interrupted by signals repeatedly".into())
}
