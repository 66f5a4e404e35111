//! `kindling exec`: runs a command in a running guest.

use crate::run::client::{Service, Streams};
use crate::run::signals::{self, Signals};
use crate::terminal::{self, RawTerminal};
use crate::{STATUS_FAILURE, print_error};
use clap::Args;
use kindling::exec::{ExecError, ExecOptions};
use kindling::guest::{Guest, GuestError};
use kindling::vmm::agent::AgentError;
use std::ffi::OsString;
use std::path::PathBuf;

#[derive(Args, Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Name of the guest
    pub(crate) name: String,
    /// Set an environment variable; NAME alone takes the value from the environment of kindling (repeatable)
    #[arg(long, short = 'e', value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<OsString>,
    /// Read environment variables from a file, one a line; --env overrides them (repeatable)
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Working directory in the guest [default: the guest's]
    #[arg(long, short = 'w', value_name = "DIR")]
    pub(crate) workdir: Option<OsString>,
    /// User and group, as names of the image or numbers [default: the guest's]
    #[arg(long, short = 'u', value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Allocate a terminal for the command
    #[arg(long, short = 't')]
    pub(crate) tty: bool,
    /// Ignored: the standard input is always attached
    #[arg(long, short = 'i')]
    pub(crate) interactive: bool,
    /// Command and arguments
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<OsString>,
}

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
pub(crate) fn run(arguments: &Arguments) -> u8 {
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
