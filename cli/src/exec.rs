//! `kindling exec`: runs a command in a running guest.

use crate::command_line::{Argument, Command, Opt, Store, flag, one, option, rest_required};
use crate::run::client::{Service, Streams};
use crate::run::signals::{self, Signals};
use crate::terminal::{self, RawTerminal};
use crate::{STATUS_FAILURE, print_error};
use kindling::exec::{ExecError, ExecOptions};
use kindling::guest::{Guest, GuestError};
use kindling::vmm::agent::AgentError;
use std::ffi::OsString;
use std::path::PathBuf;

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    pub(crate) name: String,
    pub(crate) env: Vec<OsString>,
    pub(crate) env_file: Vec<PathBuf>,
    pub(crate) workdir: Option<OsString>,
    pub(crate) user: Option<String>,
    pub(crate) tty: bool,
    pub(crate) interactive: bool,
    pub(crate) command: Vec<OsString>,
}

pub(crate) const COMMAND: Command<Arguments> =
    Command::new("exec", "Run a command in a running guest", run).options(OPTIONS).arguments(ARGUMENTS);

#[rustfmt::skip]
const OPTIONS: &[Opt<Arguments>] = &[
    option("e", "env", "NAME[=VALUE]", |all, word| all.env.store(word),
        "Set an environment variable; NAME alone takes the value from the environment of kindling \
         (repeatable)"),
    option("", "env-file", "FILE", |all, word| all.env_file.store(word),
        "Read environment variables from a file, one a line; --env overrides them (repeatable)"),
    option("w", "workdir", "DIR", |all, word| all.workdir.store(word),
        "Working directory in the guest [default: the guest's]"),
    option("u", "user", "USER[:GROUP]", |all, word| all.user.store(word),
        "User and group, as names of the image or numbers [default: the guest's]"),
    flag("t", "tty", |all| all.tty = true,
        "Allocate a terminal for the command"),
    flag("i", "interactive", |all| all.interactive = true,
        "Ignored: the standard input is always attached"),
];

#[rustfmt::skip]
const ARGUMENTS: &[Argument<Arguments>] = &[
    one("NAME", |all, word| all.name.store(word),
        "Name of the guest"),
    rest_required("COMMAND", |all, word| all.command.store(word),
        "Command and arguments"),
];

#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Exec(#[from] ExecError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error("the host refused a descriptor")]
    Host(#[from] std::io::Error),
}

/// Runs the command. Returns the exit status.
fn run(arguments: &Arguments, _: kindling::vmm::Instant) -> u8 {
    execute(arguments).unwrap_or_else(|error| {
        print_error(&error);
        match error {
            CommandError::Guest(error) => crate::status(error.is_user_error()),
            CommandError::Exec(error) => crate::status(error.is_user_error()),
            CommandError::Agent(_) | CommandError::Host(_) => STATUS_FAILURE,
        }
    })
}

fn execute(arguments: &Arguments) -> Result<u8, CommandError> {
    let guest = Guest::open_running(&arguments.name)?;
    let process = guest.exec(&arguments.options())?;
    // Before this, a signal ends this command and closes the connection to the process.
    let mut signals = Signals::block(false)?;
    if arguments.tty {
        // The size may have changed since the process was started.
        terminal::send_size(&process);
    }
    let terminal = arguments.tty.then(RawTerminal::enter).flatten();
    let code = Service::new(&mut signals, &mut signals::exit).serve(process, Streams::inherited()?);
    drop(terminal);
    Ok(code?)
}

impl Arguments {
    fn options(&self) -> ExecOptions {
        ExecOptions {
            command: self.command.clone(),
            env: self.env.clone(),
            env_files: self.env_file.clone(),
            working_directory: self.workdir.clone(),
            user: self.user.clone(),
            terminal: self.tty.then(terminal::new_terminal_size),
        }
    }
}
