//! Creates a pre-booted kernel: boots a machine, stops it before init, saves its state, and runs trial guests from it.

use super::error::PrebootError;
use super::file;
use super::kernel::Preboot;
use super::state::{Inputs, Stage, State, features};
use super::trial_root;
use crate::boot::elf::Elf;
use crate::bus::lock;
use crate::config::{Config, Console, GuestConfig};
use crate::control::Control;
use crate::error::Error;
use crate::exit::ExitReason;
use crate::kvm::Hypervisor;
use crate::layout::MIB;
use crate::machine::{Machine, Purpose};
use crate::memory::{Extent, GuestMemory, MemoryError};
use crate::resources::Resources;
use crate::running::CapturedMachine;
use crate::timeline::{Instant, Timeline};
use guest_protocol::BootMark;
use std::fs::File;
use std::io;
use std::path::Path;

/// Number of trial guests, which run one after the other. The first shows which pages guests write to, and the next
/// starts as all later ones do. With several vCPUs the written pages differ slightly between runs; the pages that were
/// copied in advance count as written, so that the list has those of all trials.
const TRIALS: u32 = 2;

/// The payload of trial guests: init's own program, which every image has, and which exits immediately if it is not
/// process 1.
const TRIAL_PAYLOAD: &str = "/proc/self/exe";

/// The configuration of the machine that is captured in `path`: that of later guests, without the parts that differ
/// between guests.
pub(crate) fn configuration(config: &Config, path: &Path) -> Config {
    Config {
        console: Console::Null,
        guest: GuestConfig { arguments: vec![TRIAL_PAYLOAD.into()], ..GuestConfig::default() },
        profile: None,
        preboot: Some(path.into()),
        ..config.clone()
    }
}

/// Boots a machine up to init, writes its state to `file`, and runs trial guests from it. The disks of the booted
/// machine are zeroes, of the disks' size; the trial guests have the backends of `resources`. `control` creates each
/// machine's connection to the front.
///
/// # Errors
/// When a machine cannot be built, its guest does not reach init, the file cannot be written, or a trial guest does not
/// end with status 0.
pub(crate) fn capture(
    config: &Config,
    resources: &Resources,
    file: &File,
    control: &dyn Fn() -> Result<Control, Error>,
) -> Result<(), Error> {
    let path = config.preboot.clone().unwrap_or_default();
    let config = Config { preboot: None, ..config.clone() };
    let inputs = Inputs::of_config(&config)?;
    let copy = || resources.try_clone().map_err(Error::host("duplicate a descriptor"));
    let kvm = copy()?.kvm.ok_or(PrebootError::NotCapturable("KVM is not open"))?;
    let msrs = Hypervisor::from_descriptor(kvm)?.msr_indices()?;

    let timeline = Timeline::starting_at(Instant::now());
    let mut machine = Machine::with_resources(
        &config,
        copy()?.into_placeholders(),
        timeline,
        Purpose::Capture(inputs.stage.mark()),
    )?;
    machine.control = Some(control()?);
    let captured = machine.start()?.wait_for_capture();
    let captured = captured.map_err(|reason| PrebootError::Ended(reason.to_string()))?;
    let mut state = save(&captured, inputs, &msrs, file, &path)?;
    drop(captured);
    let failed = |source| PrebootError::Write { path: path.clone(), source };
    let trial = |config: &Config, purpose| -> Result<Machine, Error> {
        let preboot = Preboot::read(file.try_clone().map_err(failed)?, &path, config)?;
        let timeline = Timeline::starting_at(Instant::now());
        let mut machine = Machine::continue_from(config, copy()?, preboot, timeline, purpose)?;
        machine.control = Some(control()?);
        Ok(machine)
    };
    for _ in 0..TRIALS {
        state.written = run_trial(trial(&config, Purpose::Run)?)?;
        file::write_state(file, &state).map_err(failed)?;
    }
    if config.devices.root.is_some() && config.devices.vsock.is_some() {
        let mut config = config.clone();
        (config.guest.arguments, config.guest.agent) = (vec![trial_root::PROGRAM.into()], true);
        state.used = run_program(trial(&config, Purpose::Capture(BootMark::PayloadEnded))?)?;
        file::write_state(file, &state).map_err(failed)?;
    }
    let kernel = resources.boot.as_ref().and_then(|boot| {
        let length = boot.kernel.metadata().ok()?.len();
        Elf::parse(&boot.kernel, length).ok()
    });
    if let Some(kernel) = kernel {
        // Without huge pages the file is complete, too.
        let _ = use_huge_pages(&kernel, &state, file);
    }
    Ok(())
}

/// Runs a guest until it has frozen its processes, and writes its state to `file`, as a snapshot. `path` is for error messages.
///
/// # Errors
/// When the guest ends before, its state cannot be saved, or the file cannot be written.
pub(crate) fn snapshot(
    machine: Machine,
    config: &Config,
    msrs: &[u32],
    file: &File,
    path: &Path,
) -> Result<(), Error> {
    let inputs = Inputs { stage: Stage::Guest, ..Inputs::of_config(config)? };
    let captured = machine.start()?.wait_for_capture();
    let captured = captured.map_err(|reason| PrebootError::NotFrozen(reason.to_string()))?;
    save(&captured, inputs, msrs, file, path).map(drop)
}

/// Writes the state of a machine to a file, and returns it.
fn save(
    captured: &CapturedMachine,
    inputs: Inputs,
    msrs: &[u32],
    file: &File,
    path: &Path,
) -> Result<State, Error> {
    let state = captured.state(inputs, msrs)?;
    let failed = |source| PrebootError::Write { path: path.to_owned(), source };
    file::write_pages(file, &state.extents, &captured.machine().memory).map_err(|error| match error {
        file::WriteError::File(source) => failed(source),
        file::WriteError::Memory(error) => failed(io::Error::other(error)),
    })?;
    file::write_state(file, &state).map_err(failed)?;
    Ok(state)
}

/// Keeps the parts of the kernel that guests only read in huge pages of the host: a guest then takes one fault for 2 MiB
/// instead of one for each page that it reads, 700 of them in the kernel's text. Hosts that cannot do that keep small pages.
fn use_huge_pages(kernel: &Elf, state: &State, file: &File) -> Result<(), MemoryError> {
    const HUGE: u64 = 2 << 20;
    let memory = GuestMemory::anonymous(state.inputs.mem_size_mib * MIB)?;
    memory.map_contents(&state.extents, file, file::PAGES_OFFSET)?;
    let overlaps = |extent: &Extent, block: u64| {
        extent.start < block + HUGE && block < extent.start.saturating_add(extent.length())
    };
    let holds = |extent: &Extent, block: u64| {
        extent.start <= block && block + HUGE <= extent.start.saturating_add(extent.length())
    };
    let Some(first) = kernel.segments.first() else { return Ok(()) };
    let mut block = first.address.next_multiple_of(HUGE);
    while block + HUGE <= kernel.end() {
        let is_mapped = state.extents.iter().any(|extent| holds(extent, block));
        if is_mapped && !state.written.iter().any(|extent| overlaps(extent, block)) {
            let _ = memory.collapse(block..block + HUGE);
        }
        block += HUGE;
    }
    Ok(())
}

/// Runs a trial guest to its end, and returns the pages of the file that it wrote to.
fn run_trial(machine: Machine) -> Result<Vec<Extent>, Error> {
    let memory = machine.memory.clone();
    match machine.start()?.wait().reason {
        ExitReason::Payload(0) => Ok(memory.copied()?),
        reason => Err(PrebootError::Trial(reason.to_string()).into()),
    }
}

/// Runs a trial guest with a program on its disk up to the program's end, and returns the pages that it used: those of the
/// file that it wrote to, and others.
fn run_program(machine: Machine) -> Result<Vec<Extent>, Error> {
    let stopped = machine.start()?.wait_for_capture();
    let stopped = stopped.map_err(|reason| PrebootError::Trial(reason.to_string()))?;
    Ok(stopped.machine().memory.used()?)
}

impl CapturedMachine {
    fn state(&self, inputs: Inputs, msrs: &[u32]) -> Result<State, Error> {
        let clocks = self.clocks()?;
        let machine = self.machine();
        let byte_at = |address| {
            let mut byte = [0];
            machine.memory.read(vm_memory::GuestAddress(address), &mut byte).ok()?;
            Some(byte[0])
        };
        if !self.vcpus[self.init_vcpu].step_back_over_out(byte_at)? {
            return Err(
                PrebootError::NotCapturable("its init does not mark its start with `out dx, al`").into()
            );
        }
        let vcpus = self.vcpus.iter().map(|vcpu| vcpu.state(msrs)).collect::<Result<_, _>>()?;
        let virtio = machine.devices.virtio.iter().map(|device| lock(device).state());
        let virtio = virtio.collect::<Result<_, _>>().map_err(PrebootError::from)?;
        let io_apic = machine.devices.io_apic.as_ref().ok_or(PrebootError::NotAnImage)?;
        Ok(State {
            cpuid: features(&machine.vm.cpuid(inputs.vcpu_count)).copied().collect(),
            inputs,
            clocks,
            vcpus,
            init_vcpu: self.init_vcpu,
            io_apic: lock(io_apic).state(),
            serial: lock(&machine.devices.serial).state(),
            virtio,
            extents: machine.memory.contents()?,
            written: Vec::new(),
            used: Vec::new(),
        })
    }
}
