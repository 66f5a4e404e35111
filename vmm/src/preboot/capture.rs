//! Creates a pre-booted kernel: boots a machine, stops it before init, saves its state, and runs trial guests from it. Creates a
//! snapshot in the same way, of a guest that has frozen its processes.

use super::error::PrebootError;
use super::file;
use super::kernel::Preboot;
use super::snapshot::state_of;
use super::state::{Inputs, Stage, State};
use super::trial_root;
use crate::boot::elf::Elf;
use crate::config::{Config, Console, GuestConfig};
use crate::control::Control;
use crate::error::Error;
use crate::exit::ExitReason;
use crate::layout::MIB;
use crate::machine::{Machine, Purpose};
use crate::memory::{Extent, GuestMemory, MemoryError};
use crate::resources::Resources;
use crate::running::CapturedMachine;
use crate::timeline::{Instant, Timeline};
use guest_protocol::BootMark;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

/// Number of trial guests, which run one after the other. The first shows which pages guests write to, and the next
/// starts as all later ones do. With several vCPUs the written pages differ slightly between runs; the pages that were
/// copied in advance count as written, so that the list has those of all trials.
const TRIALS: u32 = 2;

/// The payload of trial guests: init's own program, which every image has, and which exits immediately if it is not
/// process 1.
const TRIAL_PAYLOAD: &str = "/proc/self/exe";

/// The configuration of a machine that is captured, a trial guest or a spare: that of later guests, without the parts that
/// differ between guests.
pub(crate) fn configuration(config: &Config) -> Config {
    Config {
        console: Console::Null,
        guest: GuestConfig { arguments: vec![TRIAL_PAYLOAD.into()], ..GuestConfig::default() },
        profile: None,
        ..config.clone()
    }
}

/// A file that is written, and what its trial guests need.
#[derive(Clone, Copy)]
pub(crate) struct Draft<'a> {
    pub(crate) file: &'a File,
    /// For error messages.
    pub(crate) path: &'a Path,
    /// KVM, the kernel, and the backends of the trial guests.
    pub(crate) resources: &'a Resources,
    /// The MSRs that KVM can read.
    pub(crate) msrs: &'a [u32],
    /// Creates each machine's connection to the front.
    pub(crate) control: &'a dyn Fn() -> Result<Control, Error>,
}

/// Boots a machine up to init, writes its state to the file, and runs trial guests from it. The disks of the booted
/// machine are zeroes, of the disks' size.
///
/// # Errors
/// When a machine cannot be built, its guest does not reach init, the file cannot be written, or a trial guest does not
/// end with status 0.
pub(crate) fn capture(config: &Config, draft: Draft<'_>) -> Result<(), Error> {
    let config = Config { preboot: None, ..config.clone() };
    let inputs = Inputs::of_config(&config)?;
    let resources = draft.resources()?.into_placeholders();
    let timeline = Timeline::starting_at(Instant::now());
    let purpose = Purpose::Capture(inputs.stage.mark());
    let mut machine = Machine::with_resources(&config, resources, timeline, purpose)?;
    machine.control = Some((draft.control)()?);
    let captured = machine.start()?.wait_for_capture();
    let captured = captured.map_err(|reason| PrebootError::Ended(reason.to_string()))?;
    let mut state = draft.save(&captured, inputs)?;
    drop(captured);
    for _ in 0..TRIALS {
        state.written = run_trial(draft.trial(&config, Purpose::Run)?)?;
        draft.save_state(&state)?;
    }
    if config.devices.root.is_some() && config.devices.vsock.is_some() {
        let mut config = config.clone();
        (config.guest.arguments, config.guest.agent) = (vec![trial_root::PROGRAM.into()], true);
        let stopped = run_program(draft.trial(&config, Purpose::Capture(BootMark::PayloadEnded))?)?;
        state.used = stopped.machine().memory.used()?;
        draft.save_state(&state)?;
    }
    draft.use_huge_pages(&state);
    Ok(())
}

/// Runs a guest until it has frozen its processes, writes its state to the file, as a snapshot, and runs copies as trials.
///
/// # Errors
/// When the guest ends before, its state cannot be saved, the file cannot be written, or a copy fails.
pub(crate) fn snapshot(machine: Machine, config: &Config, draft: Draft<'_>) -> Result<(), Error> {
    let inputs = Inputs { stage: Stage::Guest, ..Inputs::of_config(config)? };
    let captured = machine.start()?.wait_for_capture();
    let captured = captured.map_err(|reason| PrebootError::NotFrozen(reason.to_string()))?;
    let mut state = draft.save(&captured, inputs)?;
    drop(captured);
    let path = Some(draft.path.to_owned());
    let mut config = Config { preboot: None, snapshot: path, ..configuration(config) };
    // As copies have it, so that init writes to the same pages.
    (config.guest.agent, config.guest.hostname) = (true, Some(b"copy".to_vec()));
    for _ in 0..TRIALS {
        let machine = draft.trial(&config, Purpose::Capture(BootMark::PayloadEnded))?;
        machine.memory.separate_pages(&state.extents);
        let stopped = run_program(machine)?;
        let memory = &stopped.machine().memory;
        (state.used, state.read) = (memory.used()?, memory.read_pages()?);
        draft.save_state(&state)?;
    }
    let huge = draft.use_huge_pages(&state);
    // One page makes KVM enter the huge page.
    state.read.retain(|extent| !huge.iter().any(|block| block.contains(&extent.start)));
    state.read.extend(huge.iter().map(|block| Extent { start: block.start, pages: 1 }));
    state.read.sort_unstable_by_key(|extent| extent.start);
    draft.save_state(&state)
}

impl Draft<'_> {
    fn resources(&self) -> Result<Resources, Error> {
        self.resources.try_clone().map_err(Error::host("duplicate a descriptor"))
    }

    fn failed(&self, source: io::Error) -> PrebootError {
        PrebootError::Write { path: self.path.to_owned(), source }
    }

    /// Writes the state of a machine, and returns it.
    fn save(&self, captured: &CapturedMachine, inputs: Inputs) -> Result<State, Error> {
        let state = captured.state(inputs, self.msrs)?;
        file::write_pages(self.file, &state.extents, &captured.machine().memory).map_err(
            |error| match error {
                file::WriteError::File(source) => self.failed(source),
                file::WriteError::Memory(error) => self.failed(io::Error::other(error)),
            },
        )?;
        self.save_state(&state)?;
        Ok(state)
    }

    fn save_state(&self, state: &State) -> Result<(), Error> {
        Ok(file::write_state(self.file, state).map_err(|source| self.failed(source))?)
    }

    /// A machine that continues from the file.
    fn trial(&self, config: &Config, purpose: Purpose) -> Result<Machine, Error> {
        let file = self.file.try_clone().map_err(|source| self.failed(source))?;
        let preboot = Preboot::read(file, self.path, config)?;
        let timeline = Timeline::starting_at(Instant::now());
        let mut machine = Machine::continue_from(config, self.resources()?, preboot, timeline, purpose)?;
        machine.control = Some((self.control)()?);
        Ok(machine)
    }

    /// Uses huge pages for the kernel, and returns where. Without them the file is complete, too.
    fn use_huge_pages(&self, state: &State) -> Vec<Range<u64>> {
        let kernel = self.resources.boot.as_ref().and_then(|boot| {
            let length = boot.kernel.metadata().ok()?.len();
            Elf::parse(&boot.kernel, length).ok()
        });
        kernel.and_then(|kernel| use_huge_pages(&kernel, state, self.file).ok()).unwrap_or_default()
    }
}

/// Keeps the parts of the kernel that guests only read in huge pages of the host: a guest then takes one fault for 2 MiB
/// instead of one for each page that it reads, 700 of them in the kernel's text. Hosts that cannot do that keep small pages.
fn use_huge_pages(kernel: &Elf, state: &State, file: &File) -> Result<Vec<Range<u64>>, MemoryError> {
    const HUGE: u64 = 2 << 20;
    let memory = GuestMemory::anonymous(state.inputs.mem_size_mib * MIB)?;
    memory.map_contents(&state.extents, file, file::PAGES_OFFSET)?;
    let overlaps = |extent: &Extent, block: u64| {
        extent.start < block + HUGE && block < extent.start.saturating_add(extent.length())
    };
    let holds = |extent: &Extent, block: u64| {
        extent.start <= block && block + HUGE <= extent.start.saturating_add(extent.length())
    };
    // Those of a snapshot are all in `used`, those of a kernel all in `written`, if guests without a program count.
    let written = match state.inputs.stage {
        Stage::Kernel => &state.written,
        Stage::Guest => &state.used,
    };
    let Some(first) = kernel.segments.first() else { return Ok(Vec::new()) };
    let mut blocks = Vec::new();
    let mut block = first.address.next_multiple_of(HUGE);
    while block + HUGE <= kernel.end() {
        let is_mapped = state.extents.iter().any(|extent| holds(extent, block));
        let range = block..block + HUGE;
        if is_mapped
            && !written.iter().any(|extent| overlaps(extent, block))
            && memory.collapse(range.clone())
        {
            blocks.push(range);
        }
        block += HUGE;
    }
    Ok(blocks)
}

/// Runs a trial guest to its end, and returns the pages of the file that it wrote to.
fn run_trial(machine: Machine) -> Result<Vec<Extent>, Error> {
    let memory = machine.memory.clone();
    match machine.start()?.wait().reason {
        ExitReason::Payload(0) => Ok(memory.copied()?),
        reason => Err(PrebootError::Trial(reason.to_string()).into()),
    }
}

/// Runs a trial guest up to the end of its program.
fn run_program(machine: Machine) -> Result<CapturedMachine, Error> {
    let stopped = machine.start()?.wait_for_capture();
    Ok(stopped.map_err(|reason| PrebootError::Trial(reason.to_string()))?)
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
        let vcpus = self.vcpus.iter().map(|vcpu| vcpu.state(Some(msrs))).collect::<Result<_, _>>()?;
        state_of(machine, inputs, clocks, (vcpus, self.init_vcpu), machine.memory.contents()?)
    }
}
