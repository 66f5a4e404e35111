//! `kindling run`: a program in a guest of its own, as if it ran here.

mod arguments;
pub(crate) mod client;
mod detached;
pub(crate) mod environment;
mod machine;
pub(crate) mod mounts;
pub(crate) mod signals;
pub(crate) mod source;

use crate::instances::log::Log;
use crate::instances::{Instance, InstanceError, Payload, Record, signal};
use crate::terminal::RawTerminal;
use crate::volumes::VolumeError;
use crate::{STATUS_BAD_REQUEST, STATUS_FAILURE, boot, complain, complain_of_machine, report, tell};
pub(crate) use arguments::{Arguments, PULL, TIMEOUT_SECONDS};
use client::{Outcome, Service, Streams};
use detached::Starter;
use environment::EnvironmentError;
use guest_protocol::BootMark;
use kindling::agent::{AgentError, Process};
use kindling::config::{Config, ConfigError};
use kindling::{Error, Exit, ExitReason, Instant, Machine, StopHandle, Timeline, preboot};
use mounts::{MountError, Wanted};
use signals::Signals;
use source::{Prepared, SourceError};
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::Duration;

const SIGTERM: u8 = 15;
/// The exit status of a guest that took too long.
const STATUS_TIMEOUT: u8 = 124;
/// Stands in for a signal where the time limit stopped the guest.
const BY_TIMEOUT: u8 = u8::MAX;

/// Why there is no process to wait for.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error(transparent)]
    Machine(#[from] Error),
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error("the cache of kernels cannot be used")]
    Cache(#[from] trusted_path::Error),
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    #[error("--publish needs a network, and --net none says that there is none")]
    NoNetwork,
    #[error("there is no network {0:?}: --net user reaches what the host does, and --publish lets in")]
    Network(std::ffi::OsString),
    #[error("the image names no command; write one behind its name")]
    NoCommand,
    #[error("the host refused to {0}")]
    Host(&'static str, #[source] std::io::Error),
}

impl From<ConfigError> for RunError {
    fn from(error: ConfigError) -> Self {
        Self::Machine(error.into())
    }
}

impl RunError {
    const fn status(&self) -> u8 {
        match self {
            Self::Machine(error) if !error.is_users() => STATUS_FAILURE,
            Self::Host(..)
            | Self::Source(SourceError::Failed(_))
            | Self::Instance(InstanceError::Host { .. })
            | Self::Volume(VolumeError::Host { .. }) => STATUS_FAILURE,
            _ => STATUS_BAD_REQUEST,
        }
    }
}

/// Runs the program; the exit status.
pub(crate) fn run(arguments: &Arguments, entered: Instant) -> u8 {
    let start = arguments.started_at.map_or(entered, Instant);
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
            RunError::Machine(error) => complain_of_machine(error),
            error => complain(error),
        }
        error.status()
    })
}

/// Runs what was written to this process, which stays with a detached guest; the exit status.
pub(crate) fn stay(entered: Instant) -> u8 {
    let failed = |error: std::io::Error| {
        complain(&RunError::Host("read what is to be run", error));
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

fn execute(arguments: &Arguments, mut timeline: Timeline) -> Result<u8, RunError> {
    let prepared = source::prepare(&arguments.image, arguments.user.as_deref(), &arguments.pull)?;
    timeline.reached("root filesystem found");
    let instance = Instance::create(arguments.name.as_deref())?;
    let starter = arguments.stay.then(|| Starter::new(&instance)).transpose();
    let starter = starter.map_err(|error| RunError::Host("make a file", error));
    let result = starter.and_then(|starter| {
        let starter = starter.map(Arc::new);
        let code = start(arguments, &instance, &prepared, starter.clone(), timeline)?;
        Ok((code, starter.is_some_and(|starter| starter.has_gone())))
    });
    match result {
        Ok((code, true)) if !arguments.rm => {
            instance.finish(code)?;
            Ok(code)
        }
        result => {
            instance.remove();
            result.map(|(code, _)| code)
        }
    }
}

fn start(
    arguments: &Arguments,
    instance: &Instance,
    prepared: &Prepared,
    starter: Option<Arc<Starter>>,
    timeline: Timeline,
) -> Result<u8, RunError> {
    let wanted = mounts::parse_all(&arguments.volume)?;
    // Before any thread is started, and before there is something to leave behind.
    let stopped_by = Arc::new(AtomicU8::new(0));
    let stop: Arc<OnceLock<StopHandle>> = Arc::default();
    let (tell, told) = mpsc::channel();
    let give_up = {
        let (stopped_by, stop, tell) = (Arc::clone(&stopped_by), Arc::clone(&stop), tell.clone());
        move |signal| {
            stopped_by.store(signal, Ordering::Release);
            stop.get().map(StopHandle::stop);
            let _ = tell.send(Outcome::GivenUp);
        }
    };
    let mut signals = Signals::keep(arguments.detach)
        .map_err(|error| RunError::Host("make a descriptor for signals", error))?;
    let config = arguments.config(instance, prepared, &wanted)?;
    let streams = match &starter {
        Some(_) => Log::create(instance.folder()).map(Streams::of_log),
        None => Streams::own(),
    };
    let streams = streams.map_err(|error| RunError::Host("open the program's streams", error))?;
    boot::raise_descriptor_limit();
    instance.write(&arguments.record(&config, prepared, &wanted))?;
    if !arguments.cold {
        make_preboot(&config, &mut signals, instance)?;
    }

    let machine = Machine::new(&config, timeline)?;
    if let Some(refusal) = machine.preboot_refusal() {
        complain(refusal);
    }
    let (ready, said_ready) =
        UnixStream::pair().map_err(|error| RunError::Host("make a pair of sockets", error))?;
    let to_say = ready.try_clone().map_err(|error| RunError::Host("duplicate a socket", error))?;
    machine.at_mark(BootMark::AgentReady, move || drop((&to_say).write(&[1])));
    let running = machine.start()?;
    let handle = running.stop_handle()?;
    // A signal that came before had nothing to stop yet.
    let handle = stop.get_or_init(|| handle);
    if stopped_by.load(Ordering::Acquire) != 0 {
        handle.stop();
    }
    if let Some(seconds) = arguments.timeout {
        let give_up = give_up.clone();
        thread::spawn(move || {
            thread::sleep(Duration::from_secs(seconds));
            give_up(BY_TIMEOUT);
        });
    }
    let terminal = (arguments.tty && !arguments.detach).then(RawTerminal::enter).flatten();
    let (name, socket, tty, mut give_up) =
        (instance.name().to_owned(), instance.socket(), arguments.tty, give_up);
    let converse = move || {
        let mut service = Service { signals: &mut signals, give_up: &mut give_up };
        if !client::wait_for_ready(&said_ready, &mut service) {
            return Err(AgentError::Lost);
        }
        let mut process = Process::payload(&socket)?;
        if tty && starter.is_none() {
            // It may have changed since it was asked for.
            client::send_size(&process);
        }
        let streams = match starter {
            None => streams,
            Some(starter) if service.wait_for_start(&mut process)? => {
                starter.let_go(&name);
                streams
            }
            // There will be nobody who reads a log; what init has to say is for whoever waits.
            Some(_) => Streams::complaints().map_err(|_| AgentError::Lost)?,
        };
        service.serve(process, streams)
    };
    thread::spawn(move || tell.send(Outcome::Process(converse())));
    let (exit, remains) = running.wait_for_end();
    // One that has never been ready is not waited for any longer.
    let _ = ready.shutdown(Shutdown::Both);
    let code = client::outcome(&told);
    drop(terminal);
    remains.leave_to_kernel();
    Ok(arguments.finish(&exit, code, stopped_by.load(Ordering::Acquire)))
}

impl Arguments {
    fn record(&self, config: &Config, prepared: &Prepared, wanted: &[Wanted]) -> Record {
        let stop_signal = prepared.config.stop_signal.as_deref().and_then(|name| signal::parse(name).ok());
        let text = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).into_owned();
        let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Record {
            image: self.image.to_string_lossy().into_owned(),
            directory: std::env::current_dir().unwrap_or_default(),
            command: config.guest.arguments.iter().map(text).collect(),
            payload: Payload {
                environment: config.guest.environment.iter().map(text).collect(),
                working_directory: config.guest.working_directory.as_ref().map(text),
                user: prepared.config.user.clone(),
            },
            started: since_1970.map_or(0, |time| time.as_secs()),
            memory_mib: config.machine.mem_size_mib,
            vcpus: config.machine.vcpu_count,
            stop_signal: stop_signal.unwrap_or(SIGTERM),
            is_kept: self.detach && !self.rm,
            volumes: wanted.iter().filter_map(Wanted::volume).map(str::to_owned).collect(),
            status: None,
        }
    }

    /// Says what went wrong, if something did; the exit status.
    fn finish(&self, exit: &Exit, code: Result<u8, AgentError>, stopped_by: u8) -> u8 {
        tell(&report::device_failures(exit));
        if self.report {
            tell(&report::timeline(exit));
        }
        match (code, &exit.reason) {
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
        }
    }
}

/// Boots the kernel for later guests, where that has not been done. Where it cannot be done this guest boots itself.
/// Meanwhile a signal ends this process at once: nothing is left of what is not whole.
fn make_preboot(config: &Config, signals: &mut Signals, instance: &Instance) -> Result<(), RunError> {
    let Some(path) = config.preboot.as_ref().filter(|path| !path.exists()) else { return Ok(()) };
    let (done, is_done) =
        UnixStream::pair().map_err(|error| RunError::Host("make a pair of sockets", error))?;
    let made = thread::scope(|scope| {
        scope.spawn(|| {
            if let Some(signal) = client::signal_before(&is_done, signals) {
                instance.forget();
                signals::leave(signal);
            }
        });
        // Its end is that of the other thread, whatever happens here.
        let _done = done;
        preboot_in_own_folder(config, path)
    });
    match made {
        Ok(()) => Ok(()),
        // A kernel that is not what its image says is not run at all, and without KVM there is no guest.
        Err(RunError::Machine(error @ (Error::Config(_) | Error::Kvm(_)))) => Err(error.into()),
        Err(error @ RunError::Cache(_)) => Err(error),
        Err(error) => {
            let error = report::printable(&crate::with_causes(&error));
            tell(&format!("kindling: {error}; this guest boots its kernel itself\n"));
            Ok(())
        }
    }
}

fn preboot_in_own_folder(config: &Config, path: &Path) -> Result<(), RunError> {
    // Others could change a kernel that they may write to.
    trusted_path::make_folder(path.parent().unwrap_or(path))?;
    Ok(preboot::make(config, path)?)
}
