//! Snapshots of machines that continue: the state is read while all vCPUs wait, and sent to the program that requested it. The
//! monitor itself opens and writes no file.

use super::error::PrebootError;
use super::file::{self, WriteError};
use super::state::{Inputs, Stage, State, features};
use crate::bus::lock;
use crate::config::Config;
use crate::control::PART_MAX;
use crate::error::Error;
use crate::kvm::{Clocks, SavedVcpu, VcpuState};
use crate::layout::MIB;
use crate::machine::Machine;
use crate::memory::Extent;
use std::io;
use std::time::Duration;

/// Receives a part of the file, with its offset.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(u64, &[u8]) -> io::Result<()>;

/// The greatest length of a snapshot of a guest with this many MiB of memory.
#[must_use]
pub fn length_max(memory_mib: u64) -> u64 {
    file::length_max(memory_mib.saturating_mul(MIB))
}

/// Time limit for taking a snapshot of a guest with this many MiB of memory, on a disk that takes 50 MiB per second.
#[must_use]
pub fn time_limit(memory_mib: u64) -> Duration {
    Duration::from_secs(120 + memory_mib / 50)
}

/// Sends the snapshot of a machine whose vCPUs wait, and have saved these states; the one with the given id is after init's boot
/// mark. The state is sent last, so that a file is invalid before it is complete.
pub(crate) fn send(
    machine: &Machine,
    config: &Config,
    saved: Option<(Vec<SavedVcpu>, usize)>,
    sink: Sink<'_>,
) -> Result<(), Error> {
    let missing = || PrebootError::NotCapturable("a vCPU was paused before");
    let (vcpus, init_vcpu) = saved.ok_or_else(missing)?;
    let inputs = Inputs { stage: Stage::Guest, ..Inputs::of_config(config)? };
    let mut states = Vec::new();
    let mut latest = None;
    for SavedVcpu { state, at, .. } in vcpus {
        let state = state?;
        latest = latest.max(Some((state.tsc(), at)));
        states.push(state);
    }
    let (tsc, at) = latest.ok_or_else(missing)?;
    let clocks = Clocks::since(tsc, at, &machine.vm)?;
    states.get_mut(init_vcpu).ok_or_else(missing)?.step_back_over_out();
    let extents = machine.memory.contents_read()?;
    let state = state_of(machine, inputs, clocks, (states, init_vcpu), extents)?;
    let mut part = Part { start: 0, bytes: Vec::with_capacity(PART_MAX), sink };
    let pages =
        file::each_page(&state.extents, &machine.memory, &mut |offset, page| Ok(part.add(offset, page)?));
    pages.and_then(|()| Ok(part.finish()?)).map_err(|error| match error {
        WriteError::File(error) => Error::host("send the snapshot")(error),
        WriteError::Memory(error) => error.into(),
    })?;
    let beginning = file::beginning(&state).map_err(Error::host("encode the snapshot"))?;
    let mut parts = (0..).step_by(PART_MAX).zip(beginning.chunks(PART_MAX));
    parts.try_for_each(|(offset, bytes)| (part.sink)(offset, bytes)).map_err(Error::host("send the snapshot"))
}

/// The state of a machine whose vCPUs do not run, and are in these states, and whose memory has content in these pages.
pub(super) fn state_of(
    machine: &Machine,
    inputs: Inputs,
    clocks: Clocks,
    (vcpus, init_vcpu): (Vec<VcpuState>, usize),
    extents: Vec<Extent>,
) -> Result<State, Error> {
    let virtio = machine.devices.virtio.iter().map(|device| lock(device).state());
    let virtio = virtio.collect::<Result<_, _>>().map_err(PrebootError::from)?;
    let io_apic = machine.devices.io_apic.as_ref().ok_or(PrebootError::NotAnImage)?;
    Ok(State {
        cpuid: features(&machine.vm.cpuid(inputs.vcpu_count)).copied().collect(),
        inputs,
        clocks,
        vcpus,
        init_vcpu,
        io_apic: lock(io_apic).state(),
        serial: lock(&machine.devices.serial).state(),
        virtio,
        extents,
        written: Vec::new(),
        used: Vec::new(),
        read: Vec::new(),
    })
}

/// Neighbouring pages that are sent together.
struct Part<'a> {
    start: u64,
    bytes: Vec<u8>,
    sink: Sink<'a>,
}

impl Part<'_> {
    fn add(&mut self, offset: u64, page: &[u8]) -> io::Result<()> {
        if self.start + self.bytes.len() as u64 != offset || self.bytes.len() + page.len() > PART_MAX {
            self.finish()?;
            self.start = offset;
        }
        self.bytes.extend_from_slice(page);
        Ok(())
    }

    fn finish(&mut self) -> io::Result<()> {
        if !self.bytes.is_empty() {
            (self.sink)(self.start, &self.bytes)?;
            self.bytes.clear();
        }
        Ok(())
    }
}
