//! `kindling run`: runs a command in a new guest, with the streams, signals and exit status of a local command.

mod arguments;
pub(crate) mod client;
mod detached;
mod outcome;
mod session;
pub(crate) mod signals;

use crate::command_line::Command;
use crate::{STATUS_FAILURE, print_error, print_launch_error};
pub(crate) use arguments::{Arguments, COMMAND};
use detached::Launcher;
use kindling::guest::GuestDir;
use kindling::image;
use kindling::launch::{self, LaunchError, LaunchOptions};
use kindling::vmm;
use kindling::vmm::Timeline;
pub(crate) use outcome::StopCause;
use session::Session;

/// The background process of `kindling run --detach`, which is not listed.
pub(crate) const STAY: Command<()> = Command::new("stay", "", stay);

/// Runs the command. Returns the exit status.
fn run(arguments: &Arguments, entered: vmm::Instant) -> u8 {
    let start = arguments.started_at.map_or(entered, vmm::Instant);
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
fn stay((): &(), entered: vmm::Instant) -> u8 {
    let failed = |error: std::io::Error| {
        print_error(&LaunchError::Host("read the command line", error));
        STATUS_FAILURE
    };
    match detached::line().map(|words| COMMAND.parse(words)) {
        Ok(Ok(arguments)) if arguments.detach => run(&Arguments { stay: true, ..arguments }, entered),
        Ok(_) => failed(std::io::ErrorKind::InvalidInput.into()),
        Err(error) => failed(error),
    }
}

fn execute(arguments: &Arguments, mut timeline: Timeline) -> Result<u8, LaunchError> {
    // The monitor starts while this process prepares the guest.
    let monitor = launch::spawn_monitor();
    let prepared = image::prepare(&arguments.image, arguments.process.user.as_deref(), &arguments.pull)?;
    timeline.reached("root filesystem found");
    let guest = GuestDir::create(arguments.name.as_deref())?;
    let launcher = arguments.stay.then(|| Launcher::new(&guest)).transpose();
    let launcher = launcher.map_err(|error| LaunchError::Host("create a file", error));
    let result = launcher.and_then(|launcher| {
        let mut session = Session::prepare(arguments, &guest, &prepared, launcher.as_ref())?;
        session.preboot()?;
        let outcome = session.run(monitor?, &timeline)?;
        outcome.iter().for_each(|outcome| outcome.report(arguments));
        let code = outcome.map_or(0, |outcome| outcome.status());
        Ok((code, launcher.is_some_and(|launcher| launcher.is_released())))
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

impl Arguments {
    fn options(&self) -> LaunchOptions {
        LaunchOptions {
            image: self.image.clone(),
            has_payload: true,
            command: self.command.clone(),
            entrypoint: self.entrypoint.clone(),
            env: self.process.env.clone(),
            env_files: self.process.env_file.clone(),
            working_directory: self.process.workdir.clone(),
            hostname: self.hostname.clone(),
            terminal: self.process.terminal(),
            memory_mib: self.memory,
            vcpus: self.cpus,
            network: self.net.clone(),
            publish: self.publish.clone(),
            volumes: self.volume.clone(),
            is_root_read_only: self.read_only,
            is_cold: self.cold,
            is_kept: self.detach && !self.rm,
            jail: self.jail,
        }
    }
}
