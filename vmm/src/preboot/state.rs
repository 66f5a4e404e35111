//! The state of a pre-booted kernel: a captured machine as plain data.

use super::error::PrebootError;
use crate::config::Config;
use crate::config::image::{Digests, sha256};
use crate::control::PROTOCOL;
use crate::devices::{io_apic, serial, virtio};
use crate::kvm::{Clocks, KvmError, Vcpu, VcpuState, Vm};
use crate::memory::Extent;
use guest_protocol::BootMark;
use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

/// The inputs of a pre-booted kernel or a snapshot. Only a machine with equal inputs can continue from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Inputs {
    /// What the machine was saved as.
    pub(super) stage: Stage,
    /// Digest of this program's sources, which determine devices and memory layout.
    pub(super) vmm: String,
    /// Digests of kernel and root filesystem.
    pub(super) image: String,
    /// The kernel command line.
    pub(super) boot_args: String,
    pub(super) vcpu_count: u8,
    pub(super) mem_size_mib: u64,
}

/// What a machine was saved as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Stage {
    /// A pre-booted kernel.
    Kernel,
    /// A snapshot of a guest.
    Guest,
}

impl Stage {
    /// The boot mark at which the machine was saved. The vCPU is moved back before the instruction of the mark, which init
    /// executes again in each later machine.
    pub(super) const fn mark(self) -> BootMark {
        match self {
            Self::Kernel => BootMark::InitEntered,
            Self::Guest => BootMark::Frozen,
        }
    }
}

impl Inputs {
    /// The inputs of the snapshot or pre-booted kernel of a configuration.
    pub(super) fn of_config(config: &Config) -> Result<Self, PrebootError> {
        let Digests { kernel, initrd } = digests(config)?;
        Ok(Self {
            stage: if config.snapshot.is_some() { Stage::Guest } else { Stage::Kernel },
            vmm: PROTOCOL.to_owned(),
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

/// Version of the file, after its magic. Files of other versions are rejected.
pub(super) const FORMAT: u32 = 8;

/// The name of the directory of pre-booted kernels for this boot source: a digest of this program's sources, the version of
/// the files, the image and the kernel command line. `None` if the boot source does not belong to an image.
#[must_use]
pub fn key(config: &Config) -> Option<String> {
    let Inputs { vmm, image, boot_args, .. } = Inputs::of_config(config).ok()?;
    Some(sha256(format!("{vmm}\n{FORMAT}\n{image}\n{boot_args}").as_bytes()))
}

/// The CPUID entries that a kernel may be patched for. Descriptions of caches are left out: on hosts with different
/// kinds of cores, they depend on the core that executes CPUID.
pub(super) fn features(cpuid: &CpuId) -> impl Iterator<Item = &kvm_cpuid_entry2> {
    const CACHES: [u32; 5] = [0x2, 0x4, 0x8000_0005, 0x8000_0006, 0x8000_001d];
    cpuid.as_slice().iter().filter(|entry| !CACHES.contains(&entry.function))
}

/// A captured machine as plain data.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct State {
    pub(super) inputs: Inputs,
    /// The first vCPU's CPUID entries ([`features`]): the kernel was patched for this processor.
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    pub(super) clocks: Clocks,
    pub(crate) vcpus: Vec<VcpuState>,
    /// The index of the vCPU that is before init's boot mark.
    pub(super) init_vcpu: usize,
    pub(crate) io_apic: io_apic::State,
    pub(crate) serial: serial::State,
    /// The virtio devices, in the order of their registers.
    pub(crate) virtio: Vec<virtio::State>,
    /// The guest-physical pages in the file.
    pub(super) extents: Vec<Extent>,
    /// The pages that a guest with a program on its disk writes to, and those that it uses beside `extents`.
    pub(super) used: Vec<Extent>,
    /// The pages of `extents` that a copy of a snapshot reads.
    pub(super) read: Vec<Extent>,
    /// The pages of `extents` that a guest with a payload that does nothing writes to.
    pub(super) written: Vec<Extent>,
}

impl State {
    /// Sets the clocks and registers of a new machine.
    pub(crate) fn restore(&self, vm: &Vm, vcpus: &[Vcpu]) -> Result<(), KvmError> {
        self.clocks.restore(vm)?;
        // All vCPUs get the same value, so that KVM keeps them synchronized.
        let mut pairs = vcpus.iter().zip(&self.vcpus).enumerate();
        pairs.try_for_each(|(number, (vcpu, state))| vcpu.restore(state, &self.clocks, number == 0))
    }
}
