//! The start of a guest in its monitor, for each way to start one: [`GuestBuilder`](crate::GuestBuilder) and
//! [`Foreground`](crate::foreground::Foreground).

use super::program::spawn_monitor;
use super::{LaunchError, LaunchOptions, NextSpare, Plan, spare};
use crate::guest::{GuestDir, GuestRecord};
use crate::image::Prepared;
use kindling_vmm::config::Config;
use kindling_vmm::control::{ControlError, Event, Monitor};
use kindling_vmm::jail::CgroupLimits;
use kindling_vmm::{Error, Exit, Resources, Timeline, with_causes};
use std::cell::RefCell;
use std::fs::File;
use std::path::Path;

/// A guest that is being started: its configuration, and the resources that are open for it.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    pub(crate) guest: &'a GuestDir,
    pub(crate) config: Config,
    record: GuestRecord,
    resources: Resources,
    /// The lock of the assignment of ports, until passt has bound them.
    ports: Option<File>,
    /// The limits of the monitor's cgroup, if it has one.
    cgroup: Option<CgroupLimits>,
    /// The name of spare monitors for this guest, if it uses them.
    spare: Option<String>,
    /// The file for a snapshot of the guest, if one is to be taken.
    pub(crate) snapshot: Option<File>,
    /// The monitor of the machine. Dropping it stops the machine and waits for the process.
    pub(crate) monitor: Option<Monitor>,
}

/// The front of a guest, while the guest starts.
pub(crate) trait StartObserver {
    /// A machine is being started in this monitor.
    fn starting(&mut self, monitor: &Monitor) -> Result<(), LaunchError>;
    /// Waits for the next event of the monitor. An error ends the wait.
    fn next_event(&mut self, monitor: &Monitor) -> Result<Event, ControlError>;
}

/// The result of a start.
#[derive(Debug)]
pub(crate) enum Started {
    /// The guest's agent accepts connections. The timeline has the steps up to the first entry into the guest.
    Running(Timeline),
    /// The machine ended before.
    Ended(MachineEnd),
}

/// The end of a guest's machine, as its monitor reported it.
#[derive(Debug)]
pub enum MachineEnd {
    /// The machine stopped.
    Stopped(Box<Exit>),
    /// The monitor ended, did not stop in time, or sent an invalid event.
    Lost(ControlError),
}

impl<'a> Launch<'a> {
    /// Creates the configuration, and opens the files of the devices.
    pub(crate) fn new(
        options: &LaunchOptions,
        guest: &'a GuestDir,
        prepared: &Prepared,
    ) -> Result<Self, LaunchError> {
        let ports = options.lock_ports(guest)?;
        let Plan { config, record } = options.plan(guest, prepared)?;
        let resources = Resources::open_devices(&config)?;
        let cgroup = options.cgroup(&config);
        let uses_spares = options.uses_spares && cgroup.is_none();
        let spare = uses_spares.then(|| spare::name(&config)).flatten();
        Ok(Self { guest, config, record, resources, ports, cgroup, spare, snapshot: None, monitor: None })
    }

    /// A monitor for the guest: a spare one, if the guest uses spares and there is one, or else a new one.
    pub(crate) fn new_monitor(&mut self) -> Result<Monitor, LaunchError> {
        let Some(name) = &self.spare else { return spawn_monitor() };
        // A spare does not wait for its request.
        self.resources.wait_for_processes()?;
        Monitor::take_spare(name).map_or_else(spawn_monitor, Ok)
    }

    /// The spare monitor for the next guest of this kind, if the guest uses spares.
    pub(crate) fn next_spare(&mut self) -> Option<NextSpare> {
        let name = self.spare.take()?;
        Some(NextSpare { config: self.config.clone(), name })
    }

    /// Writes the guest's record, and pre-boots the kernel unless a pre-booted one exists. If that fails, the guest boots its
    /// kernel.
    pub(crate) fn preboot(
        &self,
        notify: &dyn Fn(&str),
        next_event: impl FnMut(&Monitor) -> Result<Event, ControlError>,
    ) -> Result<(), LaunchError> {
        self.guest.write(&self.record)?;
        if let Some(reason) = make_preboot(&self.config, next_event)? {
            notify(&format!("{}; booting the kernel in this guest instead", with_causes(&reason)));
        }
        Ok(())
    }

    /// Starts the machine in a monitor, and waits until the guest's agent accepts connections. Neither a spare monitor nor a
    /// pre-booted kernel that cannot be used prevents the start: the guest gets another monitor then, and boots its kernel.
    pub(crate) fn start(
        &mut self,
        monitor: Monitor,
        timeline: &Timeline,
        notify: &dyn Fn(&str),
        observer: &mut dyn StartObserver,
    ) -> Result<Started, LaunchError> {
        // Both monitors say what the host lacks.
        let notify = &once(notify);
        let is_spare = monitor.is_spare();
        let mut result = self.start_in(monitor, timeline.clone(), notify, observer);
        if is_spare && self.has_failed(&result) {
            let monitor = self.replacement()?;
            result = self.start_in(monitor, timeline.clone(), notify, observer);
        }
        if let Err(LaunchError::Monitor(failure)) = &result
            && failure.is_restore_error
            && self.config.preboot.is_some()
        {
            notify(&failure.message);
            self.config.preboot = None;
            let monitor = self.replacement()?;
            result = self.start_in(monitor, timeline.clone(), notify, observer);
        }
        result
    }

    /// Whether a spare monitor cannot run the guest, or has ended.
    #[inline(never)]
    fn has_failed(&self, result: &Result<Started, LaunchError>) -> bool {
        match result {
            Ok(Started::Ended(MachineEnd::Lost(error)))
            | Err(LaunchError::Machine(Error::Control(error))) => {
                matches!(error, ControlError::Disconnected | ControlError::Version)
            }
            Err(LaunchError::Monitor(failure)) => failure.is_restore_error,
            _ => false,
        }
    }

    /// A new monitor in place of one that has failed, with new resources.
    #[inline(never)]
    fn replacement(&mut self) -> Result<Monitor, LaunchError> {
        self.monitor = None;
        let monitor = spawn_monitor()?;
        self.resources = Resources::reopen_devices(&self.config)?;
        Ok(monitor)
    }

    /// Opens the remaining resources, and starts the machine.
    fn start_in(
        &mut self,
        monitor: Monitor,
        timeline: Timeline,
        notify: &dyn Fn(&str),
        observer: &mut dyn StartObserver,
    ) -> Result<Started, LaunchError> {
        let monitor = self.monitor.insert(monitor);
        if let Some(limits) = &self.cgroup {
            monitor.limit(limits, self.guest.name())?;
        }
        let mut resources = std::mem::take(&mut self.resources);
        if !monitor.is_spare()
            && let Some(refusal) = resources.open_boot_files(&mut self.config)?
        {
            notify(&with_causes(&refusal));
        }
        let endpoints = self.guest.endpoints()?;
        match &self.snapshot {
            Some(file) => {
                let file =
                    file.try_clone().map_err(|error| LaunchError::Host("duplicate a descriptor", error))?;
                monitor.start_for_snapshot(&self.config, resources, endpoints, timeline, file)?;
            }
            None => monitor.start(&self.config, resources, endpoints, timeline)?,
        }
        if !monitor.is_spare() {
            self.ports = None;
        }
        observer.starting(monitor)?;
        loop {
            match observer.next_event(monitor) {
                Ok(Event::Started(timeline)) => {
                    self.ports = None;
                    return Ok(Started::Running(timeline));
                }
                event => {
                    if let Some(end) = end_of(event, notify)? {
                        return Ok(Started::Ended(end));
                    }
                }
            }
        }
    }
}

/// Passes each different message on once.
fn once(notify: &dyn Fn(&str)) -> impl Fn(&str) {
    let passed = RefCell::new(Vec::new());
    move |message| {
        if !passed.borrow().iter().any(|before| before == message) {
            passed.borrow_mut().push(message.to_owned());
            notify(message);
        }
    }
}

/// The end of the machine, if an event reports it.
pub(crate) fn end_of(
    event: Result<Event, ControlError>,
    notify: &dyn Fn(&str),
) -> Result<Option<MachineEnd>, LaunchError> {
    match event {
        Ok(Event::Stopped(exit)) => Ok(Some(MachineEnd::Stopped(exit))),
        Ok(Event::Failed(failure)) => Err(LaunchError::Monitor(failure)),
        Ok(Event::PrebootRefused(reason) | Event::JailReduced(reason)) => {
            notify(&reason);
            Ok(None)
        }
        // A device that failed is reported at the end.
        Ok(_) => Ok(None),
        Err(error) => Ok(Some(MachineEnd::Lost(error))),
    }
}

/// Pre-boots the kernel of a configuration, unless the pre-booted kernel exists. If the kernel cannot be pre-booted, the
/// guest boots it; the reason is returned as `Ok(Some(_))`.
fn make_preboot(
    config: &Config,
    next_event: impl FnMut(&Monitor) -> Result<Event, ControlError>,
) -> Result<Option<LaunchError>, LaunchError> {
    let Some(path) = config.preboot.as_ref().filter(|path| !path.exists()) else { return Ok(None) };
    // Creates the directory, and fails if other users can change it.
    trusted_path::make_folder(path.parent().unwrap_or(path))?;
    match preboot(config, path, next_event) {
        Ok(()) => Ok(None),
        Err(error @ LaunchError::Machine(Error::Config(_) | Error::Kvm(_))) => Err(error),
        Err(LaunchError::Machine(error @ Error::Backend(_))) if error.is_user_error() => Err(error.into()),
        // The guest itself would fail for the same reason.
        Err(LaunchError::Monitor(failure)) if failure.is_kvm_error || failure.is_jail_error => {
            Err(LaunchError::Monitor(failure))
        }
        Err(error) => Ok(Some(error)),
    }
}

/// Pre-boots the kernel of a configuration in a monitor. The file appears at `path` after guests have continued from it.
/// `next_event` waits for an event of the monitor.
///
/// # Errors
/// When the kernel does not reach init, KVM cannot be used, or a file cannot be read or written.
pub fn preboot(
    config: &Config,
    path: &Path,
    mut next_event: impl FnMut(&Monitor) -> Result<Event, ControlError>,
) -> Result<(), LaunchError> {
    let mut monitor = spawn_monitor()?;
    let draft = monitor.start_preboot(config, path)?;
    loop {
        match next_event(&monitor).map_err(Error::from)? {
            Event::Prebooted => break,
            Event::Failed(failure) => return Err(LaunchError::Monitor(failure)),
            // The reason of a failure that follows.
            Event::DeviceFailed(_) => {}
            _ => return Err(Error::from(ControlError::Version).into()),
        }
    }
    // The monitor does not write to the file any more when it appears.
    drop(monitor);
    Ok(draft.publish()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kindling_vmm::{ExitReason, Instant};

    #[test]
    fn a_refused_kernel_is_reported_and_does_not_end_the_machine() {
        let messages = RefCell::new(Vec::new());
        let end =
            |event| end_of(event, &|message: &str| messages.borrow_mut().push(message.to_owned())).unwrap();
        assert!(end(Ok(Event::PrebootRefused("refused".to_owned()))).is_none());
        assert!(end(Ok(Event::DeviceFailed("disk".to_owned()))).is_none());
        assert_eq!(*messages.borrow(), ["refused"]);
        let exit = Exit::new(ExitReason::Reset, Timeline::starting_at(Instant(0)));
        assert!(matches!(end(Ok(Event::Stopped(Box::new(exit)))), Some(MachineEnd::Stopped(_))));
        assert!(matches!(end(Err(ControlError::Ended)), Some(MachineEnd::Lost(ControlError::Ended))));
    }

    #[test]
    fn a_message_is_passed_on_once() {
        let messages = RefCell::new(Vec::new());
        let notify = |message: &str| messages.borrow_mut().push(message.to_owned());
        let once = once(&notify);
        ["a", "b", "a", "b", "c"].into_iter().for_each(once);
        assert_eq!(*messages.borrow(), ["a", "b", "c"]);
    }
}
