//! Pre-booted kernels: the state of a machine whose guest has reached init, kept in a file that later
//! machines continue from.
//!
//! A kernel's boot is the same every time as long as image, vCPUs, memory and processor are the same, so
//! it need not happen every time. [`make`] boots a machine and stops it in front of the first mark of init
//! ([`BootMark::InitEntered`]): nothing before that mark depends on the payload, and init executes it anew
//! in each machine. Later machines map or read the pages of guest memory and set the registers. What
//! must not be the same in two guests, random numbers and the time, init asks for afterwards and sets
//! before the payload runs.

mod file;
mod place;
mod verified;

use crate::bus::lock;
use crate::config::image::{Digests, sha256};
use crate::config::{Config, Console, GuestConfig};
use crate::devices::boot_mark::BootMarks;
use crate::devices::{io_apic, serial, virtio};
use crate::exit::ExitReason;
use crate::gate::Gate;
use crate::kvm::{self, Hypervisor, KvmError, Vcpu, VcpuState, Vm};
use crate::layout;
use crate::machine::{Error, Machine};
use crate::memory::{self, Extent, GuestMemory, MemoryError};
use crate::running::Frozen;
use crate::timeline::{Instant, Timeline};
use guest_protocol::BootMark;
use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use place::Place;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use verified::Verified;

/// Where init executes again what the frozen machine executed last.
const FREEZE_AT: BootMark = BootMark::InitEntered;

/// Guests that continue from a new file one after the other. The first tells which pages guests write to, and the
/// next starts as all later ones do; what vCPUs do side by side is not quite the same each time, and the list
/// has what either wrote to.
const TRIALS: u32 = 2;

/// What the guests run that try a kernel out: init's own program, which every image has and which ends at once where
/// it is not process 1.
const TRIAL_PAYLOAD: &str = "/proc/self/exe";

/// Why there is no pre-booted kernel to continue from, or none could be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrebootError {
    /// A file that cannot be opened or read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A file that is not what it should be.
    #[error("{} is not a pre-booted kernel: {what}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A file that was made for another configuration.
    #[error("{} was made {made}", path.display())]
    Other {
        /// The file.
        path: PathBuf,
        /// For what it was made.
        made: &'static str,
    },
    /// A kernel or initrd that does not come from an image.
    #[error("only the kernel and root filesystem of an image can be pre-booted")]
    NotAnImage,
    /// The file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The guest did not get as far as init.
    #[error("the guest did not reach init: {0}; `kindling boot --cold` shows more")]
    Ended(String),
    /// The machine cannot be written down where it stopped.
    #[error("the guest stopped where it cannot be kept: {0}")]
    NotKeepable(&'static str),
    /// A device has begun what those of later guests would know nothing of.
    #[error("the guest stopped where it cannot be kept")]
    Device(#[from] virtio::InFlight),
    /// A guest that continued from the new file did not end well.
    #[error("a guest that continued from it did not end as it should: {0}; build the image anew")]
    Trial(String),
    /// This host does not take what the file says of a machine.
    #[error("{} cannot be continued from", path.display())]
    Restore {
        /// The file.
        path: PathBuf,
        /// What stands in the way.
        source: Box<Error>,
    },
}

/// What a pre-booted kernel was made from. It serves the same and nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct MadeFor {
    /// Version of this program: devices and memory layout follow from it.
    vmm: String,
    /// Digests of kernel and root filesystem.
    image: String,
    boot_args: String,
    vcpu_count: u8,
    mem_size_mib: u64,
}

impl MadeFor {
    fn config(config: &Config) -> Result<Self, PrebootError> {
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

fn digests(config: &Config) -> Result<&Digests, PrebootError> {
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
fn features(cpuid: &CpuId) -> impl Iterator<Item = &kvm_cpuid_entry2> {
    const CACHES: [u32; 5] = [0x2, 0x4, 0x8000_0005, 0x8000_0006, 0x8000_001d];
    cpuid.as_slice().iter().filter(|entry| !CACHES.contains(&entry.function))
}

/// A machine that stopped, as plain data.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct State {
    made_for: MadeFor,
    /// What CPUID says to the first vCPU: the kernel was patched for this processor.
    cpuid: Vec<kvm_cpuid_entry2>,
    /// Time stamp counter of all vCPUs.
    tsc: u64,
    /// Nanoseconds of the machine's clock at that time.
    clock: u64,
    pub(crate) vcpus: Vec<VcpuState>,
    /// Which of them is in front of init's mark.
    marked: usize,
    pub(crate) io_apic: io_apic::State,
    pub(crate) serial: serial::State,
    /// The virtio devices, in the order of their registers.
    pub(crate) virtio: Vec<virtio::State>,
    /// The pages in the file.
    extents: Vec<Extent>,
    /// Those among them that a guest writes to until the end of a payload that does nothing.
    written: Vec<Extent>,
}

/// A pre-booted kernel that a machine can continue from.
#[derive(Debug)]
pub(crate) struct Preboot {
    path: PathBuf,
    pub(crate) state: State,
    file: File,
}

impl Preboot {
    /// Opens the one that the configuration names; none where it names none or the file does not exist.
    pub(crate) fn open(config: &Config) -> Result<Option<Self>, PrebootError> {
        let Some(path) = &config.preboot else { return Ok(None) };
        match file::open(path) {
            Err(PrebootError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            file => Self::read(file?, path, config).map(Some),
        }
    }

    /// Reads one that is open; `path` is for messages.
    fn read(file: File, path: &Path, config: &Config) -> Result<Self, PrebootError> {
        let state = file::read(&file, path)?;
        let this = Self { path: path.into(), state, file };
        let asked = MadeFor::config(config)?;
        let made = &this.state.made_for;
        if made.vmm != asked.vmm {
            return Err(this.made("by another version of kindling"));
        }
        if made.image != asked.image || made.boot_args != asked.boot_args {
            return Err(this.made("from another image or with another command line"));
        }
        if *made != asked || this.state.vcpus.len() != usize::from(asked.vcpu_count) {
            return Err(this.made("for another number of vCPUs or another memory size"));
        }
        let ram = layout::ram_ranges(asked.mem_size_mib * layout::MIB);
        let ram: Vec<_> = ram.into_iter().map(|(start, size)| start.0..start.0 + size).collect();
        if this.state.marked >= this.state.vcpus.len() {
            let what = "none of its vCPUs runs init".to_owned();
            return Err(PrebootError::Invalid { path: this.path, what });
        }
        let pages = [&this.state.extents, &this.state.written];
        if !pages.into_iter().all(|extents| memory::are_valid(extents, &ram)) {
            let what = "its pages are not those of a guest".to_owned();
            return Err(PrebootError::Invalid { path: this.path, what });
        }
        Ok(this)
    }

    /// Why a machine cannot continue from it after all.
    pub(crate) fn not_restored(path: PathBuf, error: Error) -> PrebootError {
        PrebootError::Restore { path, source: Box::new(error) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the machine's devices can take the place of those that the kernel was booted with.
    pub(crate) fn check_devices(&self, shapes: impl Iterator<Item = virtio::Shape>) -> Option<PrebootError> {
        let is_same = shapes.eq(self.state.virtio.iter().map(|state| state.shape.clone()));
        (!is_same).then(|| self.made("for other devices"))
    }

    /// Whether this host's guests see the processor that the kernel was booted on.
    pub(crate) fn check_host(&self, hypervisor: &Hypervisor) -> Option<PrebootError> {
        let here = hypervisor.cpuid(self.state.made_for.vcpu_count);
        let is_same = features(&here).eq(&self.state.cpuid);
        (!is_same).then(|| self.made("on another kind of processor, or with another KVM"))
    }

    fn made(&self, made: &'static str) -> PrebootError {
        PrebootError::Other { path: self.path.clone(), made }
    }

    /// Puts the guest's pages into its memory.
    pub(crate) fn fill(&self, memory: &GuestMemory) -> Result<(), MemoryError> {
        memory.map_contents(&self.state.extents, &self.file, file::PAGES)
    }

    /// Has those pages copied that the guest is going to write to when its init has started, which so need not wait
    /// for them, and lets the other vCPUs start then.
    pub(crate) fn go_on_at_init(&self, memory: &GuestMemory, marks: &mut BootMarks) -> Arc<Gate> {
        let gate = Arc::new(Gate::closed_but_for(self.state.marked));
        let (memory, written, opened) = (memory.clone(), self.state.written.clone(), Arc::clone(&gate));
        marks.call_at(FREEZE_AT as u8, move || {
            // What cannot be copied is mapped.
            let _ = memory.copy_ahead(&written);
            opened.open();
        });
        gate
    }
}

/// Boots the machine of a configuration as far as init and keeps it in a file, which appears whole, and only
/// after a guest has continued from it. Console and payload of the configuration play no part. Kernel and initrd are
/// compared with the digests of their image first, and what was compared is booted.
///
/// # Errors
/// When kernel or initrd are others than their image names, the machine cannot be built, its guest does not reach init, the file cannot be written, or a guest that
/// continues from it does not end well.
pub fn make(config: &Config, path: &Path) -> Result<(), Error> {
    let config = Config {
        console: Console::Null,
        guest: GuestConfig { arguments: vec![TRIAL_PAYLOAD.into()], ..GuestConfig::default() },
        profile: None,
        preboot: None,
        ..config.clone()
    };
    let made_for = MadeFor::config(&config)?;
    // No kernel or initrd is larger than the memory that it goes into.
    let max = config.machine.mem_size_mib.saturating_mul(layout::MIB);
    let verified = Verified::read(&config.boot_source, digests(&config)?, max)?;
    let config = Config { boot_source: verified.source.clone(), ..config };
    let running = Machine::build(&config, Timeline::starting_at(Instant::now()), Some(FREEZE_AT))?.start()?;
    let mut frozen = running.freeze().map_err(|reason| PrebootError::Ended(reason.to_string()))?;
    let mut state = frozen.state(made_for)?;
    let failed = |source| PrebootError::Write { path: path.into(), source };
    let place = Place::of(path).map_err(failed)?;
    let file = place.file_without_a_name().map_err(failed)?;
    file::write_pages(&file, &state.extents, &frozen.machine().memory).map_err(|error| match error {
        file::WriteError::File(source) => failed(source),
        file::WriteError::Memory(error) => failed(io::Error::other(error)),
    })?;
    drop(frozen);
    file::write_state(&file, &state).map_err(failed)?;
    for _ in 0..TRIALS {
        let preboot = Preboot::read(file.try_clone().map_err(failed)?, path, &config)?;
        state.written = try_out(&config, preboot)?;
        file::write_state(&file, &state).map_err(failed)?;
    }
    place.publish(&file).map_err(failed)?;
    Ok(())
}

/// Lets a guest continue from a new file, to its end. Tells to which pages of the file it wrote.
fn try_out(config: &Config, preboot: Preboot) -> Result<Vec<Extent>, Error> {
    let machine = Machine::continue_from(config, preboot, Timeline::starting_at(Instant::now()))?;
    let memory = machine.memory.clone();
    match machine.start()?.wait().reason {
        ExitReason::Payload(0) => Ok(memory.copied()?),
        reason => Err(PrebootError::Trial(reason.to_string()).into()),
    }
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

impl Frozen {
    fn state(&mut self, made_for: MadeFor) -> Result<State, Error> {
        let known = kvm::msr_indices()?;
        if !self.vcpus.iter_mut().all(Vcpu::settle) {
            return Err(PrebootError::NotKeepable("a vCPU is in the middle of an access to a device").into());
        }
        let machine = self.machine();
        let byte_at = |address| {
            let mut byte = [0];
            machine.memory.read(vm_memory::GuestAddress(address), &mut byte).ok()?;
            Some(byte[0])
        };
        if !self.vcpus[self.marked].step_back_over_out(byte_at)? {
            return Err(PrebootError::NotKeepable("its init marks its start in another way").into());
        }
        let tsc = self.tsc.ok_or(PrebootError::NotKeepable("its time stamp counter could not be read"))?;
        // The clock is read after the counter was, and is set with it.
        let first = &self.vcpus[0];
        let (later, khz) = (first.tsc()?, first.tsc_khz()?);
        let since = u128::from(later.saturating_sub(tsc)) * 1_000_000 / u128::from(khz.max(1));
        let clock = machine.vm.clock()?.saturating_sub(u64::try_from(since).unwrap_or(0));
        let vcpus = self.vcpus.iter().map(|vcpu| vcpu.state(&known)).collect::<Result<_, _>>()?;
        let virtio = machine.devices.virtio.iter().map(|device| lock(device).state());
        let virtio = virtio.collect::<Result<_, _>>().map_err(PrebootError::from)?;
        let io_apic = machine.devices.io_apic.as_ref().ok_or(PrebootError::NotAnImage)?;
        Ok(State {
            cpuid: features(&machine.vm.cpuid(made_for.vcpu_count)).copied().collect(),
            made_for,
            tsc,
            clock,
            vcpus,
            marked: self.marked,
            io_apic: lock(io_apic).state(),
            serial: lock(&machine.devices.serial).state(),
            virtio,
            extents: machine.memory.contents()?,
            written: Vec::new(),
        })
    }
}
