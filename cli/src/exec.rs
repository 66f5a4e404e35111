//! `kindling exec`: one more process in a guest that runs.

use crate::run::client::{Service, Streams};
use crate::run::signals::{self, Signals};
use crate::terminal::{self, RawTerminal};
use crate::{STATUS_FAILURE, complain};
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
    /// Environment entry of the command beside the guest's, NAME=VALUE, or NAME to take its value from here; may be
    /// repeated
    #[arg(long, short = 'e', value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<OsString>,
    /// File with such entries, one a line; those of -e come after them; may be repeated
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Working directory of the command [default: the guest's]
    #[arg(long, short = 'w', value_name = "DIR")]
    pub(crate) workdir: Option<OsString>,
    /// User of the command, and its group [default: the guest's]
    #[arg(long, short = 'u', value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Give the command a terminal
    #[arg(long, short = 't')]
    pub(crate) tty: bool,
    /// Accepted and without effect: the command always has this command's input
    #[arg(long, short = 'i')]
    pub(crate) interactive: bool,
    /// Command
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

/// Runs the command; the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    execute(arguments).unwrap_or_else(|error| {
        complain(&error);
        match error {
            CommandError::Guest(error) => crate::status(error.is_users()),
            CommandError::Exec(error) => crate::status(error.is_users()),
            CommandError::Agent(_) | CommandError::Host(_) => STATUS_FAILURE,
        }
    })
}

fn execute(arguments: &Arguments) -> Result<u8, CommandError> {
    let guest = Guest::open_running(&arguments.name)?;
    let process = guest.exec(&arguments.options())?;
    // Until here a signal ends this command, and the agent hangs up on the process.
    let mut signals = Signals::keep(false)?;
    if arguments.tty {
        // It may have changed since it was asked for.
        terminal::send_size(&process);
    }
    let terminal = arguments.tty.then(RawTerminal::enter).flatten();
    let code = Service::new(&mut signals, &mut signals::leave).serve(process, Streams::own()?);
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
