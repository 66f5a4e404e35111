//! What a pre-booted kernel is: a machine that stopped, as plain data.

use super::error::PrebootError;
use crate::config::Config;
use crate::config::image::{Digests, sha256};
use crate::devices::{io_apic, serial, virtio};
use crate::kvm::{KvmError, Vcpu, VcpuState, Vm};
use crate::memory::Extent;
use guest_protocol::BootMark;
use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

/// Where init executes again what the frozen machine executed last.
pub(super) const FREEZE_AT: BootMark = BootMark::InitEntered;

/// What a pre-booted kernel was made from. It serves the same and nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MadeFor {
    /// Version of this program: devices and memory layout follow from it.
    pub(super) vmm: String,
    /// Digests of kernel and root filesystem.
    pub(super) image: String,
    pub(super) boot_args: String,
    pub(super) vcpu_count: u8,
    pub(super) mem_size_mib: u64,
}

impl MadeFor {
    pub(super) fn config(config: &Config) -> Result<Self, PrebootError> {
        let Digests { kernel, initrd } = digests(config)?;
        Ok(Self {
            vmm: env!("CARGO_PKG_VERSION").to_owned(),
            image: format!("{kernel} {initrd}"),
            boot_args: config.boot_source.boot_args.clone(),
            vcpu_count: config.machine.vcpu_count,
            mem_size_mib: config.machine.mem_size_mib,
        })
    }
}

pub(super) fn digests(config: &Config) -> Result<&Digests, PrebootError> {
    config.boot_source.image_digests.as_ref().ok_or(PrebootError::NotAnImage)
}

/// A name for the folder of the kernels that guests with this boot source can continue from: a digest of this program's
/// version and of all that [`make`] reads. Nothing where they do not come from an image.
#[must_use]
pub fn key(config: &Config) -> Option<String> {
    let MadeFor { vmm, image, boot_args, .. } = MadeFor::config(config).ok()?;
    Some(sha256(format!("{vmm}\n{image}\n{boot_args}").as_bytes()))
}

/// What a kernel is patched for. Descriptions of caches are left out: where cores of a host are of different
/// kinds, they depend on the core that was asked.
pub(super) fn features(cpuid: &CpuId) -> impl Iterator<Item = &kvm_cpuid_entry2> {
    const CACHES: [u32; 5] = [0x2, 0x4, 0x8000_0005, 0x8000_0006, 0x8000_001d];
    cpuid.as_slice().iter().filter(|entry| !CACHES.contains(&entry.function))
}

/// A machine that stopped, as plain data.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct State {
    pub(super) made_for: MadeFor,
    /// What CPUID says to the first vCPU: the kernel was patched for this processor.
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    /// Time stamp counter of all vCPUs.
    pub(super) tsc: u64,
    /// Nanoseconds of the machine's clock at that time.
    pub(super) clock: u64,
    pub(crate) vcpus: Vec<VcpuState>,
    /// Which of them is in front of init's mark.
    pub(super) marked: usize,
    pub(crate) io_apic: io_apic::State,
    pub(crate) serial: serial::State,
    /// The virtio devices, in the order of their registers.
    pub(crate) virtio: Vec<virtio::State>,
    /// The pages in the file.
    pub(super) extents: Vec<Extent>,
    /// Those among them that a guest writes to until the end of a payload that does nothing.
    pub(super) written: Vec<Extent>,
}

impl State {
    /// Sets the clocks and registers of a new machine.
    pub(crate) fn restore(&self, vm: &Vm, vcpus: &[Vcpu]) -> Result<(), KvmError> {
        vm.set_clock(self.clock)?;
        // All vCPUs get one value: KVM sees that they belong together and keeps them in step.
        let mut pairs = vcpus.iter().zip(&self.vcpus).enumerate();
        pairs.try_for_each(|(number, (vcpu, state))| vcpu.restore(state, self.tsc, number == 0))
    }
}
