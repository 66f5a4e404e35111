//! `kindling run`: a program in a guest of its own, as if it ran here.

mod arguments;
pub(crate) mod client;
mod detached;
pub(crate) mod signals;

use crate::terminal::{self, RawTerminal};
use crate::{STATUS_FAILURE, complain, complain_of_kvm, complain_of_machine, report, tell};
pub(crate) use arguments::{Arguments, PULL, TIMEOUT_SECONDS};
use client::{BY_TIMEOUT, Service, Streams};
use detached::Starter;
use kindling::guest::GuestDir;
use kindling::image::{self, Prepared};
use kindling::launch::{self, LaunchError, LaunchOptions, Plan};
use kindling::log::Log;
use kindling::vmm;
use kindling::vmm::agent::{AgentError, Process};
use kindling::vmm::config::Config;
use kindling::vmm::control::{ControlError, Event, Failure, Monitor};
use kindling::vmm::{Exit, ExitReason, Resources, Timeline};
use signals::Signals;
use std::cell::Cell;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

/// The exit status of a guest that took too long.
const STATUS_TIMEOUT: u8 = 124;

/// Runs the program; the exit status.
pub(crate) fn run(arguments: &Arguments, entered: vmm::Instant) -> u8 {
    let start = arguments.started_at.map_or(entered, vmm::Instant);
    let mut timeline = Timeline::starting_at(start);
    timeline.reached_at("command entered", entered);
    if arguments.detach && !arguments.stay {
        return detached::start().unwrap_or_else(|error| {
            complain(&error);
            STATUS_FAILURE
        });
    }
    execute(arguments, timeline).unwrap_or_else(|error| {
        match &error {
            LaunchError::Machine(error) => complain_of_machine(error),
            LaunchError::Monitor(failure) => complain_of_kvm(&failure.message, failure.is_kvm),
            error => complain(error),
        }
        crate::status(error.is_users())
    })
}

/// Runs what was written to this process, which stays with a detached guest; the exit status.
pub(crate) fn stay(entered: vmm::Instant) -> u8 {
    let failed = |error: std::io::Error| {
        complain(&LaunchError::Host("read what is to be run", error));
        STATUS_FAILURE
    };
    match detached::line().map(crate::command) {
        Ok(crate::Command::Run(arguments)) if arguments.detach => {
            run(&Arguments { stay: true, ..*arguments }, entered)
        }
        Ok(_) => failed(std::io::ErrorKind::InvalidInput.into()),
        Err(error) => failed(error),
    }
}

fn execute(arguments: &Arguments, mut timeline: Timeline) -> Result<u8, LaunchError> {
    // It starts while the rest is found out.
    let monitor = launch::spawn_monitor();
    let prepared = image::prepare(&arguments.image, arguments.user.as_deref(), &arguments.pull)?;
    timeline.reached("root filesystem found");
    let guest = GuestDir::create(arguments.name.as_deref())?;
    let starter = arguments.stay.then(|| Starter::new(&guest)).transpose();
    let starter = starter.map_err(|error| LaunchError::Host("make a file", error));
    let result = starter.and_then(|starter| {
        let code = start(arguments, monitor?, &guest, &prepared, starter.as_ref(), timeline)?;
        Ok((code, starter.is_some_and(|starter| starter.has_gone())))
    });
    match result {
        Ok((code, true)) if !arguments.rm => {
            guest.finish(code)?;
            Ok(code)
        }
        result => {
            guest.remove();
            result.map(|(code, _)| code)
        }
    }
}

fn start(
    arguments: &Arguments,
    mut monitor: Monitor,
    guest: &GuestDir,
    prepared: &Prepared,
    starter: Option<&Starter>,
    timeline: Timeline,
) -> Result<u8, LaunchError> {
    // Before any thread is started, and before there is something to leave behind.
    let mut signals = Signals::keep(arguments.detach)
        .map_err(|error| LaunchError::Host("make a descriptor for signals", error))?;
    let Plan { config, record } = arguments.options().plan(guest, prepared)?;
    let mut resources = Resources::of_devices(&config)?;
    let streams = match starter {
        Some(_) => Log::create(guest.folder()).map(Streams::of_log),
        None => Streams::own(),
    };
    let streams = streams.map_err(|error| LaunchError::Host("open the program's streams", error))?;
    guest.write(&record)?;
    if !arguments.cold {
        make_preboot(&config, &mut signals, guest)?;
    }
    resources.open_rest(&config)?;
    monitor.start(&config, resources, Some(guest.monitor_lock()?), timeline)?;

    let (stopped_by, stopper) = (Cell::new(0), monitor.stopper());
    let stopper = stopper.map_err(|error| LaunchError::Host("duplicate a socket", error))?;
    let mut give_up = |signal| {
        stopped_by.set(signal);
        stopper.stop();
    };
    let mut service = Service::new(&mut signals, &mut give_up);
    service.until = arguments.timeout.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let terminal = (arguments.tty && !arguments.detach).then(RawTerminal::enter).flatten();
    let mut end = await_agent(&mut service, &monitor);
    let code = match &end {
        None => converse(arguments, guest, starter, &mut service, streams),
        Some(_) => Err(AgentError::Lost),
    };
    if matches!(code, Ok(0)) && !arguments.report && config.devices.are_private() {
        // The output is delivered, and no disk, folder or network outlives the machine: its end need not be waited
        // for.
        drop(terminal);
        monitor.leave();
        return Ok(0);
    }
    while end.is_none() {
        end = Ended::of(service.event(&monitor));
    }
    drop(terminal);
    let end = end.unwrap_or(Ended::Gone(ControlError::Gone));
    let code = arguments.finish(&end, code, stopped_by.get());
    if config.devices.are_private() && !matches!(end, Ended::Gone(_)) {
        monitor.leave();
    }
    code
}

/// Waits until the guest's agent can be connected to; otherwise how the guest has ended.
fn await_agent(service: &mut Service<'_>, monitor: &Monitor) -> Option<Ended> {
    loop {
        match service.event(monitor) {
            Ok(Event::AgentReady) => return None,
            event => {
                if let Some(end) = Ended::of(event) {
                    return Some(end);
                }
            }
        }
    }
}

/// Serves the guest's command to its end; its exit status.
fn converse(
    arguments: &Arguments,
    guest: &GuestDir,
    starter: Option<&Starter>,
    service: &mut Service<'_>,
    streams: Streams,
) -> Result<u8, AgentError> {
    let mut process = Process::payload(&guest.socket())?;
    if arguments.tty && starter.is_none() {
        // It may have changed since it was asked for.
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

/// How a guest ended, as its monitor says or does not.
enum Ended {
    Exit(Box<Exit>),
    Failed(Failure),
    Gone(ControlError),
}

impl Ended {
    /// What an event says of the end, if it is that.
    fn of(event: Result<Event, ControlError>) -> Option<Self> {
        match event {
            Ok(Event::Stopped(exit)) => Some(Self::Exit(exit)),
            Ok(Event::Failed(failure)) => Some(Self::Failed(failure)),
            Ok(Event::PrebootRefused(reason)) => {
                tell(&format!("kindling: {}\n", report::printable(&reason)));
                None
            }
            Ok(_) => None,
            Err(error) => Some(Self::Gone(error)),
        }
    }
}

impl Arguments {
    fn options(&self) -> LaunchOptions {
        LaunchOptions {
            image: self.image.clone(),
            has_payload: true,
            command: self.command.clone(),
            entrypoint: self.entrypoint.clone(),
            env: self.env.clone(),
            env_files: self.env_file.clone(),
            working_directory: self.workdir.clone(),
            hostname: self.hostname.clone(),
            terminal: self.tty.then(terminal::new_terminal_size),
            memory_mib: self.memory,
            vcpus: self.cpus,
            network: self.net.clone(),
            publish: self.publish.clone(),
            volumes: self.volume.clone(),
            is_root_read_only: self.read_only,
            is_cold: self.cold,
            is_kept: self.detach && !self.rm,
        }
    }

    /// Says what went wrong, if something did; the exit status.
    fn finish(&self, end: &Ended, code: Result<u8, AgentError>, stopped_by: u8) -> Result<u8, LaunchError> {
        let exit = match end {
            Ended::Exit(exit) => exit,
            Ended::Failed(failure) => return Err(LaunchError::Monitor(failure.clone())),
            // What the process said counts, and then what was asked for.
            Ended::Gone(error) => {
                complain(error);
                return Ok(match code {
                    Ok(code) => code,
                    Err(_) if stopped_by == BY_TIMEOUT => STATUS_TIMEOUT,
                    Err(_) if stopped_by != 0 => 128_u8.saturating_add(stopped_by),
                    Err(_) => STATUS_FAILURE,
                });
            }
        };
        tell(&report::device_failures(exit));
        if self.report {
            tell(&report::timeline(exit));
        }
        Ok(match (code, &exit.reason) {
            // What the process said counts, whatever the machine did afterwards.
            (Ok(code), _) => code,
            (Err(_), ExitReason::Stopped) if stopped_by == BY_TIMEOUT => {
                let seconds = self.timeout.unwrap_or_default();
                tell(&format!("kindling: killed after {seconds} s, as --timeout says\n"));
                STATUS_TIMEOUT
            }
            (Err(_), ExitReason::Stopped) if stopped_by != 0 => 128_u8.saturating_add(stopped_by),
            (Err(_), ExitReason::Payload(code)) => *code,
            (Err(_), _) => {
                tell(&report::failure(exit));
                STATUS_FAILURE
            }
        })
    }
}

/// Boots the kernel for later guests, where that has not been done. Where it cannot be done this guest boots itself.
/// Meanwhile a signal ends this process at once: nothing is left of what is not whole.
fn make_preboot(config: &Config, signals: &mut Signals, guest: &GuestDir) -> Result<(), LaunchError> {
    if config.preboot.as_ref().is_none_or(|path| path.exists()) {
        return Ok(());
    }
    let (done, is_done) =
        UnixStream::pair().map_err(|error| LaunchError::Host("make a pair of sockets", error))?;
    let made = thread::scope(|scope| {
        scope.spawn(|| {
            if let Some(signal) = client::signal_before(&is_done, signals) {
                guest.forget();
                signals::leave(signal);
            }
        });
        // Its end is that of the other thread, whatever happens here.
        let _done = done;
        launch::make_preboot(config)
    });
    if let Some(reason) = made? {
        let reason = report::printable(&vmm::with_causes(&reason));
        tell(&format!("kindling: {reason}; this guest boots its kernel itself\n"));
    }
    Ok(())
}
