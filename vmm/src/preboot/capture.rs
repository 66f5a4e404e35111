//! How a pre-booted kernel is made: a machine that is booted, stopped, written down and tried out.

use super::error::PrebootError;
use super::file;
use super::kernel::Preboot;
use super::place::Place;
use super::state::{FREEZE_AT, MadeFor, State, digests, features};
use super::verified::Verified;
use crate::bus::lock;
use crate::config::{Config, Console, GuestConfig};
use crate::error::Error;
use crate::exit::ExitReason;
use crate::kvm::{self, Vcpu};
use crate::layout;
use crate::machine::{Machine, Purpose};
use crate::memory::Extent;
use crate::running::Frozen;
use crate::timeline::{Instant, Timeline};
use std::io;
use std::path::Path;

/// Guests that continue from a new file one after the other. The first tells which pages guests write to, and the
/// next starts as all later ones do; what vCPUs do side by side is not quite the same each time, and the list
/// has what either wrote to.
const TRIALS: u32 = 2;

/// What the guests run that try a kernel out: init's own program, which every image has and which ends at once where
/// it is not process 1.
const TRIAL_PAYLOAD: &str = "/proc/self/exe";

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
    let running = Machine::build(&config, Timeline::starting_at(Instant::now()), Purpose::Freeze(FREEZE_AT))?
        .start()?;
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
