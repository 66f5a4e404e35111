//! Making a pre-booted kernel: a machine boots, stops in front of init, is captured, and guests try the result.

use super::error::PrebootError;
use super::file;
use super::kernel::Preboot;
use super::state::{FREEZE_AT, MadeFor, State, features};
use crate::bus::lock;
use crate::config::{Config, Console, GuestConfig};
use crate::control::Control;
use crate::error::Error;
use crate::exit::ExitReason;
use crate::kvm::{Hypervisor, Vcpu};
use crate::machine::{Machine, Purpose};
use crate::memory::Extent;
use crate::resources::Resources;
use crate::running::Frozen;
use crate::timeline::{Instant, Timeline};
use std::fs::File;
use std::io;
use std::path::Path;

/// Guests that continue from a new file one after the other. The first tells which pages guests write to, and the
/// next starts as all later ones do; what vCPUs do side by side is not quite the same each time, and the list
/// has what either wrote to.
const TRIALS: u32 = 2;

/// What the guests run that try a kernel out: init's own program, which every image has and which ends at once where
/// it is not process 1.
const TRIAL_PAYLOAD: &str = "/proc/self/exe";

/// The configuration of the machine that is captured in `path`: that of later guests, without what is theirs alone.
pub(crate) fn configuration(config: &Config, path: &Path) -> Config {
    Config {
        console: Console::Null,
        guest: GuestConfig { arguments: vec![TRIAL_PAYLOAD.into()], ..GuestConfig::default() },
        profile: None,
        preboot: Some(path.into()),
        ..config.clone()
    }
}

/// Boots a machine as far as init, writes it to `file`, and lets guests continue from that. Its disks are zeroes of
/// their size; what the guests that continue have is in `resources`. `control` makes the handle with which the front
/// ends each machine.
///
/// # Errors
/// When a machine cannot be built, its guest does not reach init, the file cannot be written, or a guest that continues
/// from it does not end with status 0.
pub(crate) fn capture(
    config: &Config,
    resources: &Resources,
    file: &File,
    control: &dyn Fn() -> Result<Control, Error>,
) -> Result<(), Error> {
    let path = config.preboot.clone().unwrap_or_default();
    let config = Config { preboot: None, ..config.clone() };
    let made_for = MadeFor::config(&config)?;
    let copy = || resources.try_clone().map_err(Error::host("duplicate a descriptor"));
    let kvm = copy()?.kvm.ok_or(PrebootError::NotKeepable("its KVM is not open"))?;
    let msrs = Hypervisor::from_descriptor(kvm)?.msr_indices()?;

    let timeline = Timeline::starting_at(Instant::now());
    let mut machine =
        Machine::with_resources(&config, copy()?.blank(), timeline, Purpose::Freeze(FREEZE_AT))?;
    machine.control = Some(control()?);
    let frozen = machine.start()?.freeze();
    let mut frozen = frozen.map_err(|reason| PrebootError::Ended(reason.to_string()))?;
    let mut state = frozen.state(made_for, &msrs)?;
    let failed = |source| PrebootError::Write { path: path.clone(), source };
    file::write_pages(file, &state.extents, &frozen.machine().memory).map_err(|error| match error {
        file::WriteError::File(source) => failed(source),
        file::WriteError::Memory(error) => failed(io::Error::other(error)),
    })?;
    drop(frozen);
    file::write_state(file, &state).map_err(failed)?;
    for _ in 0..TRIALS {
        let preboot = Preboot::read(file.try_clone().map_err(failed)?, &path, &config)?;
        let timeline = Timeline::starting_at(Instant::now());
        let mut machine = Machine::continue_from(&config, copy()?, preboot, timeline)?;
        machine.control = Some(control()?);
        state.written = try_out(machine)?;
        file::write_state(file, &state).map_err(failed)?;
    }
    Ok(())
}

/// Runs a guest that continues from a new file to its end; the pages of the file that it wrote to.
fn try_out(machine: Machine) -> Result<Vec<Extent>, Error> {
    let memory = machine.memory.clone();
    match machine.start()?.wait().reason {
        ExitReason::Payload(0) => Ok(memory.copied()?),
        reason => Err(PrebootError::Trial(reason.to_string()).into()),
    }
}

impl Frozen {
    fn state(&mut self, made_for: MadeFor, msrs: &[u32]) -> Result<State, Error> {
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
        let vcpus = self.vcpus.iter().map(|vcpu| vcpu.state(msrs)).collect::<Result<_, _>>()?;
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
