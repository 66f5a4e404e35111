//! The monitor's end of the socket: the program `kindling-vmm`.

use super::channel::Channel;
use super::requests::Requests;
use super::waiting::Waiting;
use super::{Control, ControlError, EVENT_MAX, Event, Failure, PROTOCOL, REQUEST_MAX, Request, Role, Start};
use crate::boot::BootFiles;
use crate::config::{Config, Console};
use crate::devices::virtio::backend::Backend;
use crate::entry;
use crate::error::{Error, with_causes};
use crate::jail::{Jail, Limits, Strictness, Thread};
use crate::kvm::Hypervisor;
use crate::layout;
use crate::machine::{Machine, Purpose};
use crate::preboot::capture::{self, Draft};
use crate::preboot::error::PrebootError;
use crate::resources::Resources;
use crate::spare::Spare;
use guest_protocol::BootMark;
use rustix::fs::{FlockOperation, fcntl_lock, fstat};
use rustix::process::{Signal, set_parent_process_death_signal};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Exit status of a guest that failed.
const STATUS_FAILURE: u8 = 125;

/// Address space of a monitor without guest memory and persistent memory, in bytes: its program, stacks of 16 vCPUs, and
/// buffers of vsock connections, most of which are never used.
const OWN_MEMORY_MAX: u64 = 1 << 30;

/// Serves the front at the other end of a socket: waits for its first request, runs the machine until it ends, and
/// reports the result. It is not an error if the front closes the socket before its first request.
///
/// The machine's memory and KVM objects are not released; the exit of the process does that.
///
/// # Errors
/// When the front sends an invalid request, or closes the socket before the end.
pub fn serve(socket: UnixStream) -> Result<(), ControlError> {
    let channel = Channel::new(socket);
    let Some((request, descriptors)) = channel.receive::<Request>(REQUEST_MAX)? else { return Ok(()) };
    match request {
        Request::Start(start) => answer(&channel, *start, |start| run(start, descriptors, &channel)),
        Request::Snapshot(start) => answer(&channel, *start, |start| snapshot(start, descriptors, &channel)),
        Request::Preboot(start) => answer(&channel, *start, |start| preboot(start, descriptors, &channel)),
        Request::Spare(start, idle) => {
            // Its front does not wait for it, and so gets no error.
            let Ok((spare, waiting)) = make_spare(*start, descriptors, idle) else { return Ok(()) };
            let Some((channel, start, descriptors)) = waiting.wait()? else { return Ok(()) };
            answer(&channel, start, |start| run_spare(spare, start, descriptors, &channel))
        }
        _ => Err(ControlError::Version),
    }
}

/// Serves a request of this version, and reports a failure to the front.
fn answer(
    channel: &Channel,
    start: Start,
    serve: impl FnOnce(Start) -> Result<(), Error>,
) -> Result<(), ControlError> {
    if start.version != PROTOCOL {
        return Err(ControlError::Version);
    }
    serve(start).or_else(|error| channel.send(&Event::Failed(Failure::of(&error)), EVENT_MAX, &[]))
}

/// Runs a machine.
fn run(start: Start, descriptors: Vec<OwnedFd>, channel: &Channel) -> Result<(), Error> {
    let received = Received::new(&start, descriptors)?.with_boot_files(&start.config)?;
    let Received { resources, _lock, limits, requests, .. } = received;
    let Start { config, mut timeline, .. } = start;
    timeline.reached("configuration received");
    entry::raise_descriptor_limit();
    report_missing(&config.jail.confine_process(limits)?, config.jail, channel);
    timeline.reached("process confined");
    let machine = Machine::with_resources(&config, resources, timeline, Purpose::Run)?;
    report_refusal(&machine, channel);
    run_machine(machine, config, channel, requests)
}

/// A spare machine in its jail.
struct JailedSpare {
    spare: Spare,
    jail: Jail,
    /// What the host cannot take away, and the jail does not require.
    missing: Vec<&'static str>,
}

/// Makes a spare machine, and prepares the wait for its front.
#[inline(never)]
fn make_spare(
    start: Start,
    descriptors: Vec<OwnedFd>,
    idle: Duration,
) -> Result<(JailedSpare, Waiting), Error> {
    if start.version != PROTOCOL {
        return Err(ControlError::Version.into());
    }
    let received = Received::new(&start, descriptors)?.with_boot_files(&start.config)?;
    let Received { resources, listener, .. } = received;
    let listener = listener.ok_or_else(|| missing("receive a socket"))?;
    let waiting = resources.files().and_then(|files| Waiting::new(listener, idle, files));
    let waiting = waiting.map_err(Error::host("watch the files of a machine"))?;
    entry::raise_descriptor_limit();
    let jail = start.config.jail;
    // The guest's limits follow.
    let missing = jail.confine_process(Limits::default())?;
    let spare = Spare::new(start.config, resources)?;
    Ok((JailedSpare { spare, jail, missing }, waiting))
}

/// Runs the guest of a spare machine.
#[inline(never)]
fn run_spare(
    spare: JailedSpare,
    start: Start,
    descriptors: Vec<OwnedFd>,
    channel: &Channel,
) -> Result<(), Error> {
    let Received { resources, _lock, limits, requests, .. } = Received::new(&start, descriptors)?;
    let Start { config, mut timeline, .. } = start;
    let JailedSpare { spare, jail, missing } = spare;
    timeline.reached("configuration received");
    if config.jail != jail {
        return Err(PrebootError::OtherDevices.into());
    }
    report_missing(&missing, jail, channel);
    let mut machine = spare.give_to(&config, resources, timeline).map_err(of_spare)?;
    // Until here, files in memory are mapped twice.
    jail.limit_process(limits).map_err(|error| of_spare(error.into()))?;
    machine.timeline.reached("process confined");
    run_machine(machine, config, channel, requests)
}

/// The error of a spare machine: the guest may start in another, unless its configuration or a device is at fault.
fn of_spare(error: Error) -> Error {
    match error {
        Error::Backend(_) | Error::Config(_) => error,
        _ => PrebootError::OtherDevices.into(),
    }
}

/// Tells the front what the host cannot take away from this process.
fn report_missing(missing: &[&str], jail: Jail, channel: &Channel) {
    if let (false, Strictness::BestEffort) = (missing.is_empty(), jail.strictness) {
        let text = format!("this host cannot {}: the guest's monitor runs without it", missing.join(", "));
        let _ = channel.send(&Event::JailReduced(text), EVENT_MAX, &[]);
    }
}

/// Tells the front why the machine boots although it has a pre-booted kernel.
fn report_refusal(machine: &Machine, channel: &Channel) {
    if let Some(refusal) = machine.preboot_refusal() {
        let _ = channel.send(&Event::PrebootRefused(with_causes(refusal)), EVENT_MAX, &[]);
    }
}

/// Connects a machine to its front, which is told when init accepts connections, and to the socket of other programs.
fn connect(machine: &mut Machine, channel: &Channel, requests: Option<OwnedFd>) -> Result<(), Error> {
    let mut control = Control::new(channel, machine.devices.balloon.clone())?;
    control.requests = requests.map(Requests::new);
    let started = control.send_at_start(machine.timeline.clone())?;
    machine.at_mark(BootMark::AgentReady, started);
    machine.control = Some(control);
    Ok(())
}

/// Runs a machine until it ends, and reports the result.
fn run_machine(
    mut machine: Machine,
    config: Config,
    channel: &Channel,
    requests: Option<OwnedFd>,
) -> Result<(), Error> {
    connect(&mut machine, channel, requests)?;
    machine.jail = config.jail;
    if let Some(control) = &mut machine.control {
        control.config = Some(Box::new(config));
    }
    let (exit, stopped) = machine.start()?.wait_for_end();
    // If the front has closed the socket, the machine has stopped for that reason, and there is no receiver.
    // What `kindling run` ends with in the same case.
    let status = if exit.reason.is_failure() { STATUS_FAILURE } else { exit.reason.status() };
    let _ = channel.send(&Event::Stopped(Box::new(exit)), EVENT_MAX, &[]);
    stopped.control().iter().for_each(|control| control.write_exit_status(status));
    stopped.leave_to_kernel();
    Ok(())
}

/// Runs a machine up to its snapshot.
fn snapshot(start: Start, descriptors: Vec<OwnedFd>, channel: &Channel) -> Result<(), Error> {
    let received = Received::new(&start, descriptors)?.with_boot_files(&start.config)?;
    let Received { resources, _lock, limits, snapshot, requests, .. } = received;
    let file = snapshot.ok_or_else(|| missing("receive the file for the snapshot"))?;
    let Start { config, mut timeline, .. } = start;
    timeline.reached("configuration received");
    entry::raise_descriptor_limit();
    let msrs = msr_indices(&resources)?;
    let _ = crate::memory::page_map();
    // The threads read the machine's state after the guest has run, so that all have the filter of pre-booting.
    let jail = config.jail.without_root();
    report_missing(&jail.confine_process(Limits { file: None, ..limits })?, jail, channel);
    timeline.reached("process confined");
    jail.hide_memory();
    jail.confine_thread(Thread::Preboot)?;
    let purpose = Purpose::Capture(BootMark::Frozen);
    let trials = resources.for_trials().map_err(Error::host("duplicate a descriptor"))?;
    let mut machine = Machine::with_resources(&config, resources, timeline, purpose)?;
    report_refusal(&machine, channel);
    connect(&mut machine, channel, requests)?;
    let path = Path::new("the snapshot");
    let control = || Control::new(channel, None);
    let draft = Draft { file: &file, path, resources: &trials, msrs: &msrs, control: &control };
    capture::snapshot(machine, &config, draft)?;
    Ok(channel.send(&Event::Saved, EVENT_MAX, &[])?)
}

/// Pre-boots a kernel.
fn preboot(start: Start, descriptors: Vec<OwnedFd>, channel: &Channel) -> Result<(), Error> {
    let received = Received::new(&start, descriptors)?.with_boot_files(&start.config)?;
    let Received { mut resources, limits, .. } = received;
    let config = start.config;
    // Sparse files in memory, of any length, replace disks and persistent memory, of which both mappings exist for a moment.
    let mapped: u64 = resources.backends.iter().map(Backend::memory_len).sum();
    let limits = Limits { file: None, memory: limits.memory.map(|bytes| bytes.saturating_add(mapped)) };
    let file =
        resources.preboot.take().ok_or_else(|| missing("receive the file for the pre-booted kernel"))?;
    let _ = crate::memory::page_map();
    // Trial guests are started after the first guest, so that all threads have one filter.
    let jail = config.jail.without_root();
    jail.confine_process(limits)?;
    // The front's thread waits for the result. The kernel ends this process with it, even if a trial guest has taken the
    // process over; no other program is connected to such a guest. It fails for no signal that exists.
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    jail.hide_memory();
    jail.confine_thread(Thread::Preboot)?;
    let path = config.preboot.clone().unwrap_or_default();
    let (msrs, control) = (msr_indices(&resources)?, || Control::new(channel, None));
    let draft = Draft { file: &file, path: &path, resources: &resources, msrs: &msrs, control: &control };
    capture::capture(&config, draft)?;
    Ok(channel.send(&Event::Prebooted, EVENT_MAX, &[])?)
}

/// The MSRs that KVM can read.
fn msr_indices(resources: &Resources) -> Result<Vec<u32>, Error> {
    let kvm = resources.kvm.as_ref().ok_or_else(|| missing("receive a descriptor of KVM"))?.try_clone();
    let kvm = kvm.map_err(Error::host("duplicate a descriptor"))?;
    Ok(Hypervisor::from_descriptor(kvm)?.msr_indices()?)
}

/// The descriptors of a [`Start`], assigned to their uses.
struct Received {
    resources: Resources,
    limits: Limits,
    /// Locked while this process lives.
    _lock: Option<OwnedFd>,
    /// The socket of a spare.
    listener: Option<OwnedFd>,
    /// The file for a snapshot.
    snapshot: Option<File>,
    /// The socket of requests of other programs.
    requests: Option<OwnedFd>,
}

impl Received {
    fn new(start: &Start, descriptors: Vec<OwnedFd>) -> Result<Self, Error> {
        let Start { config, descriptors: roles, backends, .. } = start;
        if roles.len() != descriptors.len() || backends.len() != config.devices.count() {
            return Err(missing("receive as many descriptors and backends as the request lists"));
        }
        let (mut resources, mut lock, mut devices) = (Resources::default(), None, Vec::new());
        let (mut kernel, mut initrd, mut snapshot) = (None, None, None);
        let (mut listener, mut requests) = (None, None);
        for (role, descriptor) in roles.iter().zip(descriptors) {
            match role {
                Role::Kvm => resources.kvm = Some(descriptor),
                Role::Kernel => kernel = Some(File::from(descriptor)),
                Role::Initrd => initrd = Some(File::from(descriptor)),
                Role::Preboot => resources.preboot = Some(File::from(descriptor)),
                Role::Lock => {
                    // Without the lock, `kindling stats` and `kindling kill` do not find this process, but the guest
                    // runs.
                    let _ = fcntl_lock(&descriptor, FlockOperation::NonBlockingLockShared);
                    lock = Some(descriptor);
                }
                Role::Listener => listener = Some(descriptor),
                Role::Requests => requests = Some(descriptor),
                Role::Snapshot => snapshot = Some(File::from(descriptor)),
                Role::Stderr => {
                    // Without it, the front does not get the reason of a crash.
                    let _ = rustix::stdio::dup2_stderr(&descriptor);
                }
                Role::Device => devices.push(descriptor),
            }
        }
        resources.boot = kernel.map(|kernel| BootFiles { kernel, initrd });
        // This process's standard streams are not the console's.
        if config.console != Console::Null {
            return Err(missing("receive a descriptor of the console"));
        }
        let size =
            |file: &OwnedFd| fstat(file).map_or(0, |status| u64::try_from(status.st_size).unwrap_or(0));
        let file = devices.iter().map(size).max().unwrap_or(0);
        let mut memory =
            config.machine.mem_size_mib.saturating_mul(layout::MIB).saturating_add(OWN_MEMORY_MAX);
        let window = config.devices.root.as_ref().and_then(|root| root.access.window());
        memory = memory.saturating_add(window.unwrap_or(0));
        let mut devices = devices.into_iter();
        let mut next = || devices.next().ok_or_else(|| missing("receive a descriptor for each device"));
        for kind in backends {
            let backend = Backend::receive(*kind, &mut next)?;
            memory = memory.saturating_add(backend.memory_len());
            resources.backends.push(backend);
        }
        if devices.next().is_some() {
            return Err(missing("find a device for each descriptor"));
        }
        let limits = Limits { file: Some(file), memory: Some(memory) };
        Ok(Self { resources, limits, _lock: lock, listener, snapshot, requests })
    }

    /// Checks that all descriptors from which a machine is built are there: paths in the configuration are not opened.
    fn with_boot_files(self, config: &Config) -> Result<Self, Error> {
        let Resources { kvm, boot, preboot, .. } = &self.resources;
        // A snapshot has the kernel.
        if config.snapshot.is_none() {
            let boot = boot.as_ref().ok_or_else(|| missing("receive a descriptor of the kernel"))?;
            if config.boot_source.initrd_path.is_some() != boot.initrd.is_some() {
                return Err(missing("receive a descriptor of the initrd"));
            }
        }
        let has_file = config.preboot.is_some() || config.snapshot.is_some();
        if kvm.is_none() || has_file != preboot.is_some() {
            return Err(missing("receive descriptors of KVM and the pre-booted kernel"));
        }
        Ok(self)
    }
}

fn missing(what: &'static str) -> Error {
    Error::host(what)(std::io::ErrorKind::NotFound.into())
}

impl Failure {
    fn of(error: &Error) -> Self {
        Self {
            is_user_error: error.is_user_error(),
            is_kvm_error: matches!(error, Error::Kvm(_)),
            is_jail_error: matches!(error, Error::Jail(_)),
            is_restore_error: matches!(
                error,
                Error::Preboot(PrebootError::Restore { .. } | PrebootError::OtherDevices)
            ),
            message: with_causes(error),
        }
    }
}
