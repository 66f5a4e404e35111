//! `kindling run`: a program in a guest of its own, as if it ran here.

mod arguments;
pub(crate) mod client;
mod detached;
pub(crate) mod signals;

use crate::terminal::RawTerminal;
use crate::{STATUS_FAILURE, boot, complain, complain_of_machine, report, tell};
pub(crate) use arguments::{Arguments, PULL, TIMEOUT_SECONDS};
use client::{Outcome, Service, Streams};
use detached::Starter;
use kindling::guest::GuestDir;
use kindling::image::{self, Prepared};
use kindling::launch::{self, LaunchError, LaunchOptions, Plan};
use kindling::log::Log;
use kindling::vmm::agent::{AgentError, Process};
use kindling::vmm::config::Config;
use kindling::vmm::{BootMark, Exit, ExitReason, Instant, Machine, StopHandle, Timeline};
use signals::Signals;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread;
use std::time::Duration;

/// The exit status of a guest that took too long.
const STATUS_TIMEOUT: u8 = 124;
/// Stands in for a signal where the time limit stopped the guest.
const BY_TIMEOUT: u8 = u8::MAX;

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
            LaunchError::Machine(error) => complain_of_machine(error),
            error => complain(error),
        }
        crate::status(error.is_users())
    })
}

/// Runs what was written to this process, which stays with a detached guest; the exit status.
pub(crate) fn stay(entered: Instant) -> u8 {
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
    let prepared = image::prepare(&arguments.image, arguments.user.as_deref(), &arguments.pull)?;
    timeline.reached("root filesystem found");
    let instance = GuestDir::create(arguments.name.as_deref())?;
    let starter = arguments.stay.then(|| Starter::new(&instance)).transpose();
    let starter = starter.map_err(|error| LaunchError::Host("make a file", error));
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
    instance: &GuestDir,
    prepared: &Prepared,
    starter: Option<Arc<Starter>>,
    timeline: Timeline,
) -> Result<u8, LaunchError> {
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
        .map_err(|error| LaunchError::Host("make a descriptor for signals", error))?;
    let Plan { config, record } = arguments.options().plan(instance, prepared)?;
    let streams = match &starter {
        Some(_) => Log::create(instance.folder()).map(Streams::of_log),
        None => Streams::own(),
    };
    let streams = streams.map_err(|error| LaunchError::Host("open the program's streams", error))?;
    boot::raise_descriptor_limit();
    instance.write(&record)?;
    if !arguments.cold {
        make_preboot(&config, &mut signals, instance)?;
    }

    let machine = Machine::new(&config, timeline)?;
    if let Some(refusal) = machine.preboot_refusal() {
        complain(refusal);
    }
    let (ready, said_ready) =
        UnixStream::pair().map_err(|error| LaunchError::Host("make a pair of sockets", error))?;
    let to_say = ready.try_clone().map_err(|error| LaunchError::Host("duplicate a socket", error))?;
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
    fn options(&self) -> LaunchOptions {
        LaunchOptions {
            image: self.image.clone(),
            command: self.command.clone(),
            entrypoint: self.entrypoint.clone(),
            env: self.env.clone(),
            env_files: self.env_file.clone(),
            working_directory: self.workdir.clone(),
            hostname: self.hostname.clone(),
            terminal: self.tty.then(client::new_terminal_size),
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
fn make_preboot(config: &Config, signals: &mut Signals, instance: &GuestDir) -> Result<(), LaunchError> {
    if config.preboot.as_ref().is_none_or(|path| path.exists()) {
        return Ok(());
    }
    let (done, is_done) =
        UnixStream::pair().map_err(|error| LaunchError::Host("make a pair of sockets", error))?;
    let made = thread::scope(|scope| {
        scope.spawn(|| {
            if let Some(signal) = client::signal_before(&is_done, signals) {
                instance.forget();
                signals::leave(signal);
            }
        });
        // Its end is that of the other thread, whatever happens here.
        let _done = done;
        launch::make_preboot(config)
    });
    if let Some(reason) = made? {
        let reason = report::printable(&crate::with_causes(&reason));
        tell(&format!("kindling: {reason}; this guest boots its kernel itself\n"));
    }
    Ok(())
}
