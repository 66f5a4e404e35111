//! `kindling exec`: runs a command in a running guest.

use crate::command_line::{Argument, Command, Store, one, rest_required};
use crate::process::{ProcessArguments, ProcessOptions};
use crate::signals::{self, Signals};
use crate::terminal::{self, RawTerminal};
use crate::{STATUS_FAILURE, print_error, print_message};
use kindling::attach::{Attachment, Streams};
use kindling::exec::{AgentError, ExecError, ExecOptions};
use kindling::guest::{Guest, GuestError};
use std::ffi::OsString;
use std::sync::Arc;

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    pub(crate) name: String,
    pub(crate) process: ProcessArguments,
    pub(crate) command: Vec<OsString>,
}

pub(crate) const COMMAND: Command<Arguments> = Command::new("exec", "Run a command in a running guest", run)
    .options(ProcessOptions::TABLE)
    .arguments(ARGUMENTS);

impl AsMut<ProcessArguments> for Arguments {
    fn as_mut(&mut self) -> &mut ProcessArguments {
        &mut self.process
    }
}

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
fn run(arguments: &Arguments, _: kindling::timeline::Instant) -> u8 {
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
    let guest = Guest::open_responsive(&arguments.name)?;
    let process = guest.exec(&arguments.options())?;
    // Before this, a signal ends this command and closes the connection to the process.
    let mut signals = Signals::block(false)?;
    if arguments.process.tty {
        // The size may have changed since the process was started.
        terminal::send_size(&process);
    }
    let terminal = arguments.process.tty.then(RawTerminal::enter).flatten();
    let code = Attachment::new(&mut signals, &mut signals::exit, Arc::new(print_message))
        .serve(process, Streams::inherited()?);
    drop(terminal);
    Ok(code?)
}

impl Arguments {
    fn options(&self) -> ExecOptions {
        ExecOptions {
            command: self.command.clone(),
            env: self.process.env.clone(),
            env_files: self.process.env_file.clone(),
            working_directory: self.process.workdir.clone(),
            user: self.process.user.clone(),
            terminal: self.process.terminal(),
        }
    }
}
