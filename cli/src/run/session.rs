//! One guest of `kindling run`, from its configuration to its end. The steps are called in the order of this file.

use super::arguments::Arguments;
use super::client::{Service, Streams};
use super::detached::Launcher;
use super::outcome::{MachineEnd, Outcome, StopCause};
use super::signals::{self, Signals};
use crate::terminal::{self, RawTerminal};
use crate::{print_stderr, report};
use kindling::guest::GuestDir;
use kindling::image::Prepared;
use kindling::launch::{self, LaunchError, Plan};
use kindling::log::Log;
use kindling::vmm;
use kindling::vmm::agent::{AgentError, Process};
use kindling::vmm::config::Config;
use kindling::vmm::control::{ControlError, Event, Failure, Monitor};
use kindling::vmm::{Resources, Timeline};
use std::cell::Cell;
use std::time::{Duration, Instant};

/// A guest, with the resources that this command has opened for it.
pub(super) struct Session<'a> {
    arguments: &'a Arguments,
    guest: &'a GuestDir,
    /// The command that waits for the start of a detached guest.
    launcher: Option<&'a Launcher>,
    signals: Signals,
    config: Config,
    resources: Resources,
    /// `None` once the guest's command has them.
    streams: Option<Streams>,
}

impl<'a> Session<'a> {
    /// Creates the configuration, opens the files of the devices and the streams of the command, and writes the guest's
    /// record.
    pub(super) fn prepare(
        arguments: &'a Arguments,
        guest: &'a GuestDir,
        prepared: &Prepared,
        launcher: Option<&'a Launcher>,
    ) -> Result<Self, LaunchError> {
        // Before any thread is started, and before there are files to clean up.
        let signals = Signals::block(arguments.detach)
            .map_err(|error| LaunchError::Host("create a descriptor for signals", error))?;
        let Plan { config, record } = arguments.options().plan(guest, prepared)?;
        let resources = Resources::open_devices(&config)?;
        let streams = match launcher {
            Some(_) => Log::create(guest.folder()).map(Streams::to_log),
            None => Streams::inherited(),
        };
        let streams = streams.map_err(|error| LaunchError::Host("open the command's streams", error))?;
        guest.write(&record)?;
        Ok(Self { arguments, guest, launcher, signals, config, resources, streams: Some(streams) })
    }

    /// Pre-boots the kernel, unless a pre-booted one exists. If that fails, the guest boots its kernel. A signal meanwhile
    /// ends this command, at the latest when a file is synced, and leaves no partial file.
    pub(super) fn preboot(&mut self) -> Result<(), LaunchError> {
        if self.arguments.cold {
            return Ok(());
        }
        let mut stop = |cause: StopCause| {
            self.guest.forget();
            signals::exit(cause);
        };
        let mut service = Service::new(&mut self.signals, &mut stop);
        if let Some(reason) = launch::make_preboot(&self.config, |monitor| service.event(monitor))? {
            let reason = report::printable(&vmm::with_causes(&reason));
            print_stderr(&format!("kindling: {reason}; booting the kernel in this guest instead\n"));
        }
        Ok(())
    }

    /// Runs the machine in its monitor, and serves the guest's command. Returns the outcome of both, or `None` if the
    /// command succeeded and the machine's end need not be waited for.
    pub(super) fn run(
        mut self,
        mut monitor: Monitor,
        timeline: &Timeline,
    ) -> Result<Option<Outcome>, LaunchError> {
        let _terminal =
            (self.arguments.process.tty && !self.arguments.detach).then(RawTerminal::enter).flatten();
        let seconds = self.arguments.timeout;
        let deadline = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
        loop {
            self.start(&mut monitor, timeline.clone())?;
            match self.serve(&monitor, deadline)? {
                Served::Outcome(outcome) => {
                    let has_stopped = matches!(outcome.machine, MachineEnd::Stopped(_));
                    if has_stopped && self.config.devices.are_private() {
                        monitor.forget();
                    }
                    return Ok(Some(outcome));
                }
                Served::Succeeded => {
                    print_failures_so_far(&monitor);
                    monitor.forget();
                    return Ok(None);
                }
                Served::NoPreboot(reason) => {
                    print_refusal(&reason);
                    self.config.preboot = None;
                    drop(monitor);
                    monitor = launch::spawn_monitor()?;
                    self.resources = Resources::reopen_devices(&self.config)?;
                }
            }
        }
    }

    /// Opens the remaining resources, and starts the machine in its monitor.
    fn start(&mut self, monitor: &mut Monitor, timeline: Timeline) -> Result<(), LaunchError> {
        let mut resources = std::mem::take(&mut self.resources);
        if let Some(refusal) = resources.open_boot_files(&mut self.config)? {
            print_refusal(&vmm::with_causes(&refusal));
        }
        monitor.start(&self.config, resources, Some(self.guest.monitor_lock()?), timeline)?;
        Ok(())
    }

    /// Serves the guest's command, and waits for the machine's end unless it has no effect on the outcome.
    fn serve(&mut self, monitor: &Monitor, deadline: Option<Instant>) -> Result<Served, LaunchError> {
        let stopper = monitor.stopper().map_err(|error| LaunchError::Host("duplicate a socket", error))?;
        let stopped_by = Cell::new(None);
        let mut stop = |cause| {
            stopped_by.set(Some(cause));
            stopper.stop();
        };
        let mut service = Service::new(&mut self.signals, &mut stop);
        service.deadline = deadline.map(|deadline| (deadline, StopCause::Timeout));
        let mut machine = match await_agent(&mut service, monitor) {
            Err(failure) if failure.is_restore_error && self.config.preboot.is_some() => {
                match stopped_by.get() {
                    None => return Ok(Served::NoPreboot(failure.message)),
                    Some(_) => Some(MachineEnd::Lost(ControlError::Ended)),
                }
            }
            result => result.map_err(LaunchError::Monitor)?,
        };
        let command = match (&machine, self.streams.take()) {
            (None, Some(streams)) => {
                serve_command(self.arguments, self.guest, self.launcher, &mut service, streams)
            }
            _ => Err(AgentError::Lost),
        };
        if matches!(command, Ok(0)) && !self.arguments.report && self.config.devices.are_private() {
            // The output is delivered, and the machine has no disk, folder or network that must be left consistent.
            return Ok(Served::Succeeded);
        }
        if let (Err(error), None) = (&command, &machine) {
            service.abandon(error);
        }
        let machine = loop {
            match machine {
                Some(end) => break end,
                None => machine = end_of(service.event(monitor)).map_err(LaunchError::Monitor)?,
            }
        };
        Ok(Served::Outcome(Outcome { machine, command, stopped_by: stopped_by.get() }))
    }
}

/// The result of serving a machine.
enum Served {
    /// Machine and command have ended.
    Outcome(Outcome),
    /// The command ended with status 0, and the machine's end need not be waited for.
    Succeeded,
    /// The machine could not continue from its pre-booted kernel, for this reason.
    NoPreboot(String),
}

/// Waits until the guest's agent accepts connections. Returns the machine's end if it comes first.
fn await_agent(service: &mut Service<'_>, monitor: &Monitor) -> Result<Option<MachineEnd>, Failure> {
    loop {
        match service.event(monitor) {
            Ok(Event::Started(_)) => return Ok(None),
            event => {
                if let Some(end) = end_of(event)? {
                    return Ok(Some(end));
                }
            }
        }
    }
}

/// Serves the guest's command to its end. Returns its exit status.
fn serve_command(
    arguments: &Arguments,
    guest: &GuestDir,
    launcher: Option<&Launcher>,
    service: &mut Service<'_>,
    streams: Streams,
) -> Result<u8, AgentError> {
    let mut process = Process::payload(&guest.socket())?;
    if arguments.process.tty && launcher.is_none() {
        // The size may have changed since the configuration was created.
        terminal::send_size(&process);
    }
    let streams = match launcher {
        None => streams,
        Some(launcher) if service.wait_for_start(&mut process)? => {
            launcher.release(guest.name());
            streams
        }
        // The program was not executed, so that the guest is removed: init's message goes to the command that started it.
        Some(_) => Streams::stderr_only()
            .map_err(|source| AgentError::Host { what: "duplicate the standard error", source })?,
    };
    service.serve(process, streams)
}

/// The end of the machine, if an event reports it.
fn end_of(event: Result<Event, ControlError>) -> Result<Option<MachineEnd>, Failure> {
    match event {
        Ok(Event::Stopped(exit)) => Ok(Some(MachineEnd::Stopped(exit))),
        Ok(Event::Failed(failure)) => Err(failure),
        Ok(Event::PrebootRefused(reason)) => {
            print_refusal(&reason);
            Ok(None)
        }
        // A device that failed is reported at the end.
        Ok(_) => Ok(None),
        Err(error) => Ok(Some(MachineEnd::Lost(error))),
    }
}

/// Prints why the guest boots its kernel although there is a pre-booted one.
fn print_refusal(reason: &str) {
    print_stderr(&format!("kindling: {}\n", report::printable(reason)));
}

/// Prints the failures of devices that have been reported so far.
fn print_failures_so_far(monitor: &Monitor) {
    while let Ok(Some(event)) = monitor.event_before(Instant::now()) {
        match event {
            Event::DeviceFailed(failure) => print_stderr(&report::device_failure(&failure)),
            Event::Stopped(_) | Event::Failed(_) => return,
            _ => {}
        }
    }
}
