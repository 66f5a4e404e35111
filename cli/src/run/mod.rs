//! `kindling run`: runs a command in a new guest, with the streams, signals and exit status of a local command.

pub(crate) mod arguments;
mod detached;
pub(crate) mod restore;

use crate::command_line::Command;
use crate::signals::{self, Signals};
use crate::terminal::{self, RawTerminal};
use crate::{STATUS_FAILURE, print_error, print_launch_error, print_message, print_stderr, report};
pub(crate) use arguments::{Arguments, COMMAND};
use detached::Launcher;
use kindling::Template;
use kindling::attach::{Attachment, StopCause, Streams};
use kindling::exec::{AgentError, Process};
use kindling::foreground::{ExitReason, Foreground, MachineEnd, Outcome};
use kindling::guest::GuestDir;
use kindling::image::{self, ImageError, Prepared};
use kindling::launch::{self, LaunchError, LaunchOptions, Monitor, NextSpare};
use kindling::log::Log;
use kindling::template::TemplateError;
use kindling::timeline::{Instant, Timeline};
use std::ffi::OsString;
use std::sync::Arc;
use std::time::Duration;

/// The background process of `kindling run --detach`, which is not listed.
pub(crate) const STAY: Command<()> = Command::new("stay", "", stay);

/// Runs the command. Returns the exit status.
fn run(arguments: &Arguments, entered: Instant) -> u8 {
    let start = arguments.started_at.map_or(entered, Instant);
    let mut timeline = Timeline::starting_at(start);
    timeline.reached_at("command entered", entered);
    if arguments.detach && !arguments.stay {
        return detached::start().unwrap_or_else(|error| {
            print_error(&error);
            STATUS_FAILURE
        });
    }
    execute(arguments, timeline).unwrap_or_else(|error| {
        print_launch_error(&error);
        crate::status(error.is_user_error())
    })
}

/// Runs the command line on standard input, as the front of a detached guest. Returns the exit status.
fn stay((): &(), entered: Instant) -> u8 {
    let failed = |error: std::io::Error| {
        print_error(&LaunchError::Host("read the command line", error));
        STATUS_FAILURE
    };
    let parse = |mut words: Vec<OsString>| {
        let command = if words.is_empty() { OsString::new() } else { words.remove(0) };
        if command == "restore" { restore::COMMAND.parse(words) } else { COMMAND.parse(words) }
    };
    match detached::line().map(parse) {
        Ok(Ok(arguments)) if arguments.detach => run(&Arguments { stay: true, ..arguments }, entered),
        Ok(_) => failed(std::io::ErrorKind::InvalidInput.into()),
        Err(error) => failed(error),
    }
}

fn execute(arguments: &Arguments, mut timeline: Timeline) -> Result<u8, LaunchError> {
    // The monitor starts while this process prepares the guest.
    let monitor = (!arguments.uses_spares()).then(launch::spawn_monitor);
    let template = arguments.open_template()?;
    let prepared = arguments.prepare(template.as_ref())?;
    timeline.reached("root filesystem found");
    let guest = GuestDir::create(arguments.name.as_deref())?;
    let launcher = arguments.stay.then(|| Launcher::new(&guest)).transpose();
    let launcher = launcher.map_err(|error| LaunchError::Host("create a file", error));
    let result = launcher.and_then(|launcher| {
        let options = arguments.options(template);
        let outcome =
            run_guest(arguments, &options, &guest, &prepared, launcher.as_ref(), monitor, &timeline)?;
        print_outcome(&outcome, arguments);
        Ok((outcome.status(), launcher.is_some_and(|launcher| launcher.is_released()), outcome.spare))
    });
    let (code, spare) = match result {
        Ok((code, true, spare)) if !arguments.rm => {
            guest.finish(code)?;
            (code, spare)
        }
        result => {
            guest.remove();
            result.map(|(code, _, spare)| (code, spare))?
        }
    };
    spare.into_iter().for_each(NextSpare::start_after_exit);
    Ok(code)
}

/// Runs a guest from its configuration to its end.
fn run_guest(
    arguments: &Arguments,
    options: &LaunchOptions,
    guest: &GuestDir,
    prepared: &Prepared,
    launcher: Option<&Launcher>,
    monitor: Option<Result<Monitor, LaunchError>>,
    timeline: &Timeline,
) -> Result<Outcome, LaunchError> {
    // Before any thread is started, and before there are files to clean up.
    let mut signals = Signals::block(arguments.detach)
        .map_err(|error| LaunchError::Host("create a descriptor for signals", error))?;
    let mut foreground = Foreground::new(options, guest, prepared, &mut signals, Arc::new(print_message))?;
    let streams = match launcher {
        Some(_) => Log::create(guest.folder()).map(Streams::to_log),
        None => Streams::inherited(),
    };
    let streams = streams.map_err(|error| LaunchError::Host("open the command's streams", error))?;
    // A signal during this step ends the command, after a sync in progress, and leaves no partial file.
    foreground.preboot(&mut |cause| {
        guest.forget();
        signals::exit(cause);
    })?;
    let monitor = monitor.transpose()?;
    let _terminal = (arguments.process.tty && !arguments.detach).then(RawTerminal::enter).flatten();
    foreground.timeout = arguments.timeout.map(Duration::from_secs);
    foreground.waits_for_machine = arguments.report;
    foreground.is_detached = arguments.detach;
    foreground.run(monitor, timeline, |attachment, process| {
        serve(arguments, guest, launcher, attachment, process, streams)
    })
}

/// Serves the guest's command to its end. Returns its exit status.
fn serve(
    arguments: &Arguments,
    guest: &GuestDir,
    launcher: Option<&Launcher>,
    attachment: &mut Attachment<'_>,
    mut process: Process,
    streams: Streams,
) -> Result<u8, AgentError> {
    let streams = match launcher {
        None => {
            if arguments.process.tty {
                // The size may have changed since the configuration was created.
                terminal::send_size(&process);
            }
            streams
        }
        Some(launcher) if attachment.wait_for_start(&mut process)? => {
            launcher.release(guest.name());
            streams
        }
        // The program was not executed, so that the guest is removed: init's message goes to the command that started it.
        Some(_) => Streams::stderr_only()
            .map_err(|source| AgentError::Host { what: "duplicate the standard error", source })?,
    };
    attachment.serve(process, streams)
}

/// Prints what failed, and with `--report` the times of the steps.
fn print_outcome(outcome: &Outcome, arguments: &Arguments) {
    let exit = match &outcome.machine {
        Some(MachineEnd::Stopped(exit)) => exit,
        Some(MachineEnd::Lost(error)) => return print_error(error),
        None => return,
    };
    print_stderr(&report::device_failures(exit));
    if arguments.report {
        print_stderr(&report::timeline(exit));
    }
    match (&outcome.command, &exit.reason, outcome.stopped_by) {
        (Err(error), ExitReason::Payload(_), _) if outcome.is_output_unknown() => print_error(error),
        (Err(error), ExitReason::Stopped, Some(StopCause::Lost)) => print_error(error),
        (Ok(_), ..) | (Err(_), ExitReason::Payload(_), _) => {}
        (Err(_), ExitReason::Stopped, Some(StopCause::Timeout)) => {
            let seconds = arguments.timeout.unwrap_or_default();
            print_stderr(&format!("kindling: killed after {seconds} s (--timeout)\n"));
        }
        (Err(_), ExitReason::Stopped, Some(StopCause::Signal(_))) => {}
        (Err(_), ..) => print_stderr(&report::failure(exit)),
    }
}

impl Arguments {
    fn uses_spares(&self) -> bool {
        self.spare || std::env::var_os("KINDLING_SPARE").is_some_and(|value| value == "1")
    }

    fn open_template(&self) -> Result<Option<Template>, TemplateError> {
        let template = self.template.as_deref().map(Template::open);
        template.or_else(|| self.snapshot.as_deref().map(Template::of_snapshot)).transpose()
    }

    /// The root filesystem and the settings of the image, or of the template.
    fn prepare(&self, template: Option<&Template>) -> Result<Prepared, ImageError> {
        let user = self.process.user.as_deref();
        let Some(template) = template else { return image::prepare(&self.image, user, &self.pull) };
        let mut prepared = template.image().prepared().clone();
        if user.is_some() {
            // Names are not looked up.
            prepared.config.user = image::prepare(prepared.rootfs.as_os_str(), user, &self.pull)?.config.user;
        }
        Ok(prepared)
    }

    fn options(&self, template: Option<Template>) -> LaunchOptions {
        LaunchOptions {
            image: template.as_ref().map_or(&*self.image, |template| template.image_name()).to_owned(),
            has_payload: true,
            command: self.command(),
            entrypoint: self.entrypoint.clone(),
            env: self.process.env.clone(),
            env_files: self.process.env_file.clone(),
            working_directory: self.process.workdir.clone(),
            hostname: self.hostname.clone(),
            terminal: self.process.terminal(),
            memory_mib: self.memory.unwrap_or(512),
            vcpus: self.cpus.unwrap_or(1),
            continues: self.snapshot.is_some(),
            template,
            limits: self.limits,
            cgroup_parent: self.cgroup_parent.clone(),
            network: self.net.clone(),
            publish: self.publish.clone(),
            volumes: self.volume.clone(),
            is_root_read_only: self.read_only,
            is_cold: self.cold,
            uses_spares: self.uses_spares(),
            is_kept: self.detach && !self.rm,
            jail: self.jail,
        }
    }
}
