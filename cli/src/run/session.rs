//! One guest of `kindling run`, from its plan to its end. The steps are called in the order in which they stand here.

use super::arguments::Arguments;
use super::client::{Service, Streams};
use super::detached::Starter;
use super::outcome::{MachineEnd, Outcome, StopCause, device_failure};
use super::signals::{self, Signals};
use crate::terminal::{self, RawTerminal};
use crate::{report, tell};
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

/// A guest with all that this command has for it.
pub(super) struct Session<'a> {
    arguments: &'a Arguments,
    guest: &'a GuestDir,
    /// The command that waits for a guest in the background to start.
    starter: Option<&'a Starter>,
    signals: Signals,
    config: Config,
    resources: Resources,
    /// Until the command has them.
    streams: Option<Streams>,
}

impl<'a> Session<'a> {
    /// Plans the machine, opens what is behind its devices and the streams of its command, and writes the guest's record.
    pub(super) fn prepare(
        arguments: &'a Arguments,
        guest: &'a GuestDir,
        prepared: &Prepared,
        starter: Option<&'a Starter>,
    ) -> Result<Self, LaunchError> {
        // Before any thread is started, and before there is something to clean up.
        let signals = Signals::keep(arguments.detach)
            .map_err(|error| LaunchError::Host("make a descriptor for signals", error))?;
        let Plan { config, record } = arguments.options().plan(guest, prepared)?;
        let resources = Resources::open_devices(&config)?;
        let streams = match starter {
            Some(_) => Log::create(guest.folder()).map(Streams::of_log),
            None => Streams::own(),
        };
        let streams = streams.map_err(|error| LaunchError::Host("open the program's streams", error))?;
        guest.write(&record)?;
        Ok(Self { arguments, guest, starter, signals, config, resources, streams: Some(streams) })
    }

    /// Pre-boots the kernel, if that was not done before. The guest boots itself where that fails. A signal meanwhile
    /// ends this command, and no partial file stays.
    pub(super) fn preboot(&mut self) -> Result<(), LaunchError> {
        if self.arguments.cold {
            return Ok(());
        }
        let mut leave = |cause: StopCause| {
            self.guest.forget();
            signals::leave(cause);
        };
        let mut service = Service::new(&mut self.signals, &mut leave);
        if let Some(reason) = launch::make_preboot(&self.config, |monitor| service.event(monitor))? {
            let reason = report::printable(&vmm::with_causes(&reason));
            tell(&format!("kindling: {reason}; this guest boots its kernel itself\n"));
        }
        Ok(())
    }

    /// Runs the machine in its monitor, and serves the guest's command; how both ended, or nothing where the machine's end
    /// need not be waited for.
    pub(super) fn run(
        mut self,
        mut monitor: Monitor,
        timeline: &Timeline,
    ) -> Result<Option<Outcome>, LaunchError> {
        let _terminal = (self.arguments.tty && !self.arguments.detach).then(RawTerminal::enter).flatten();
        loop {
            self.start(&mut monitor, timeline.clone())?;
            match self.serve(&monitor)? {
                Served::Outcome(outcome) => {
                    let has_stopped = matches!(outcome.machine, MachineEnd::Stopped(_));
                    if has_stopped && self.config.devices.are_private() {
                        monitor.forget();
                    }
                    return Ok(Some(outcome));
                }
                Served::Succeeded => {
                    tell_failures_so_far(&monitor);
                    monitor.forget();
                    return Ok(None);
                }
                Served::NoPreboot(reason) => {
                    tell_refusal(&reason);
                    self.config.preboot = None;
                    drop(monitor);
                    monitor = launch::spawn_monitor()?;
                    self.resources = Resources::open_devices(&self.config)?;
                }
            }
        }
    }

    /// Opens the rest and hands the machine over to its monitor.
    fn start(&mut self, monitor: &mut Monitor, timeline: Timeline) -> Result<(), LaunchError> {
        let mut resources = std::mem::take(&mut self.resources);
        if let Some(refusal) = resources.open_boot_files(&mut self.config)? {
            tell_refusal(&vmm::with_causes(&refusal));
        }
        monitor.start(&self.config, resources, Some(self.guest.monitor_lock()?), timeline)?;
        Ok(())
    }

    /// Serves the guest's command, and waits for the machine's end where that matters.
    fn serve(&mut self, monitor: &Monitor) -> Result<Served, LaunchError> {
        let stopper = monitor.stopper().map_err(|error| LaunchError::Host("duplicate a socket", error))?;
        let stopped_by = Cell::new(None);
        let mut stop = |cause| {
            stopped_by.set(Some(cause));
            stopper.stop();
        };
        let mut service = Service::new(&mut self.signals, &mut stop);
        let seconds = self.arguments.timeout;
        service.until = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
        let mut machine = match await_agent(&mut service, monitor) {
            Err(failure) if failure.is_restore_error && self.config.preboot.is_some() => {
                return Ok(Served::NoPreboot(failure.message));
            }
            result => result.map_err(LaunchError::Monitor)?,
        };
        let command = match (&machine, self.streams.take()) {
            (None, Some(streams)) => {
                serve_command(self.arguments, self.guest, self.starter, &mut service, streams)
            }
            _ => Err(AgentError::Lost),
        };
        if matches!(command, Ok(0)) && !self.arguments.report && self.config.devices.are_private() {
            // The output is delivered, and no disk, folder or network outlives the machine.
            return Ok(Served::Succeeded);
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

/// What came of a machine.
enum Served {
    /// Machine and command have ended.
    Outcome(Outcome),
    /// The command ended with status 0, and the machine's end need not be waited for.
    Succeeded,
    /// The machine could not continue from its pre-booted kernel, for this reason.
    NoPreboot(String),
}

/// Waits until the guest's agent accepts connections; otherwise how the machine ended.
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

/// Serves the guest's command to its end; its exit status.
fn serve_command(
    arguments: &Arguments,
    guest: &GuestDir,
    starter: Option<&Starter>,
    service: &mut Service<'_>,
    streams: Streams,
) -> Result<u8, AgentError> {
    let mut process = Process::payload(&guest.socket())?;
    if arguments.tty && starter.is_none() {
        // It may have changed since the plan was made.
        terminal::send_size(&process);
    }
    let streams = match starter {
        None => streams,
        Some(starter) if service.wait_for_start(&mut process)? => {
            starter.let_go(guest.name());
            streams
        }
        // The guest will have no log: what init prints goes to the command that started it.
        Some(_) => Streams::complaints().map_err(|_| AgentError::Lost)?,
    };
    service.serve(process, streams)
}

/// The end of the machine, if an event reports it.
fn end_of(event: Result<Event, ControlError>) -> Result<Option<MachineEnd>, Failure> {
    match event {
        Ok(Event::Stopped(exit)) => Ok(Some(MachineEnd::Stopped(exit))),
        Ok(Event::Failed(failure)) => Err(failure),
        Ok(Event::PrebootRefused(reason)) => {
            tell_refusal(&reason);
            Ok(None)
        }
        // A device that failed is reported at the end.
        Ok(_) => Ok(None),
        Err(error) => Ok(Some(MachineEnd::Lost(error))),
    }
}

/// Tells why the guest boots although its kernel was pre-booted.
fn tell_refusal(reason: &str) {
    tell(&format!("kindling: {}\n", report::printable(reason)));
}

/// Tells of devices that have failed until now, without waiting for more.
fn tell_failures_so_far(monitor: &Monitor) {
    while let Ok(Some(event)) = monitor.event_before(Instant::now()) {
        match event {
            Event::DeviceFailed(failure) => tell(&device_failure(&failure)),
            Event::Stopped(_) | Event::Failed(_) => return,
            _ => {}
        }
    }
}
