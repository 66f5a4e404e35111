//! A spare machine: it has continued from a pre-booted kernel as far as init's request for its configuration, and waits
//! there for a guest. So far it has executed the kernel and init, and nothing of a guest. Its devices are placeholders.

use crate::attach::DeviceSet;
use crate::bus::lock;
use crate::config::Config;
use crate::devices::boot_mark::BootMarks;
use crate::error::Error;
use crate::kvm::Clocks;
use crate::machine::{Machine, Purpose, guest_config};
use crate::preboot::error::PrebootError;
use crate::resources::Resources;
use crate::running::{CapturedMachine, Running};
use crate::timeline::{Instant, Timeline};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Time limit for the guest to reach init's request.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A spare machine.
#[derive(Debug)]
pub(crate) struct Spare {
    machine: Machine,
    /// The clocks when the machine stopped: a guest does not notice how long the spare waited.
    clocks: Clocks,
    /// What the machine was made for.
    config: Config,
}

impl Spare {
    /// Makes a spare machine of the pre-booted kernel, or the snapshot, that the configuration names.
    ///
    /// # Errors
    /// When the pre-booted kernel cannot be used, or the guest does not request its configuration in time.
    pub(crate) fn new(config: Config, resources: Resources) -> Result<Self, Error> {
        let timeline = Timeline::starting_at(Instant::now());
        let machine = Machine::with_resources(&config, resources, timeline, Purpose::Wait)?;
        if let Some(refusal) = machine.preboot_refusal() {
            return Err(PrebootError::Ended(refusal.to_string()).into());
        }
        let stopped = run(machine.start()?)?;
        let clocks = stopped.clocks()?;
        let machine = stopped.into_machine();
        machine.prefault();
        Ok(Self { machine, clocks, config })
    }

    /// Gives the machine to a guest. Its devices, its random numbers and its time are the guest's from here on.
    ///
    /// # Errors
    /// When the guest needs another machine, or a device cannot be created.
    pub(crate) fn give_to(
        self,
        config: &Config,
        resources: Resources,
        timeline: Timeline,
    ) -> Result<Machine, Error> {
        let Self { mut machine, clocks, config: made } = self;
        if config.machine != made.machine
            || config.boot_source != made.boot_source
            || config.snapshot != made.snapshot
            || config.profile.is_some()
        {
            return Err(PrebootError::OtherDevices.into());
        }
        let device_set = DeviceSet::new(config, resources.backends)?;
        machine.devices.balloon = device_set.balloon.clone();
        device_set.replace(&machine.devices.virtio, &machine.memory)?;
        lock(&machine.devices.configuration)
            .set(guest_config(config), Instant::now())
            .map_err(crate::config::ConfigError::from)?;
        *lock(&machine.devices.marks) = BootMarks::default();
        clocks.restore_all(&machine.vm, &machine.vcpus)?;
        machine.vcpus.iter_mut().for_each(crate::kvm::Vcpu::forget_counts);
        machine.timeline = timeline;
        machine.timeline.reached("spare machine configured");
        machine.purpose = Purpose::Run;
        Ok(machine)
    }
}

/// Runs the machine until init requests its configuration.
fn run(running: Running) -> Result<CapturedMachine, Error> {
    let stop = running.stop_handle()?;
    let (reached, is_reached) = mpsc::channel::<()>();
    thread::scope(|scope| {
        // The other end is dropped when the machine has stopped.
        let limit = move || {
            if is_reached.recv_timeout(TIMEOUT) == Err(mpsc::RecvTimeoutError::Timeout) {
                stop.stop();
            }
        };
        thread::Builder::new().spawn_scoped(scope, limit).map_err(Error::host("start a thread"))?;
        let captured = running.wait_for_capture();
        drop(reached);
        captured.map_err(|reason| PrebootError::Ended(reason.to_string()).into())
    })
}
