//! `kindling exec`: one more process in a guest that runs.

use crate::instances::{Found, InstanceError, Record};
use crate::run::client::{self, Service, Streams};
use crate::run::environment::{self, EnvironmentError};
use crate::run::signals::{self, Signals};
use crate::run::source::{self, SourceError};
use crate::terminal::RawTerminal;
use crate::{STATUS_BAD_REQUEST, STATUS_FAILURE, bytes, complain};
use clap::Args;
use kindling::agent::{AgentError, Process};
use kindling::config::GuestConfig;
use std::ffi::{OsStr, OsString};
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
enum ExecError {
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error(transparent)]
    User(#[from] SourceError),
    #[error(transparent)]
    Environment(#[from] EnvironmentError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error(transparent)]
    Command(#[from] guest_protocol::frame::FrameError),
    #[error("the host refused a descriptor")]
    Host(#[from] std::io::Error),
}

/// Runs the command; the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    execute(arguments).unwrap_or_else(|error| {
        complain(&error);
        match error {
            ExecError::Host(_)
            | ExecError::User(SourceError::Failed(_))
            | ExecError::Agent(AgentError::Lost | AgentError::Silent { .. }) => STATUS_FAILURE,
            _ => STATUS_BAD_REQUEST,
        }
    })
}

fn execute(arguments: &Arguments) -> Result<u8, ExecError> {
    let guest = Found::alive(&arguments.name)?;
    let frame = arguments.guest(&guest.record)?.to_frame(0, false, None)?;
    let process = Process::start(&guest.socket(), token(), &frame)?;
    // Until here a signal ends this command, and the agent hangs up on the process.
    let mut signals = Signals::keep(false)?;
    if arguments.tty {
        // It may have changed since it was asked for.
        client::send_size(&process);
    }
    let terminal = arguments.tty.then(RawTerminal::enter).flatten();
    let code =
        Service { signals: &mut signals, give_up: &mut signals::leave }.serve(process, Streams::own()?);
    drop(terminal);
    Ok(code?)
}

/// A number that no other process of a guest has, but for one chance in 2^64.
pub(crate) fn token() -> u64 {
    let mut bytes = [0; 8];
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u64::from_le_bytes(bytes).max(1)
}

impl Arguments {
    /// The command as the guest's own would be, but for what is asked for.
    fn guest(&self, guest: &Record) -> Result<GuestConfig, ExecError> {
        let of_guest = &guest.payload;
        let mut environment: Vec<_> = of_guest.environment.iter().map(|entry| entry.clone().into()).collect();
        let other_user = self
            .user
            .as_deref()
            .map(|user| source::user(&guest.directory, guest.image.as_ref(), user))
            .transpose()?;
        if let Some(home) = other_user.as_ref().and_then(|user| user.home.as_ref()) {
            environment::set(&mut environment, OsStr::new(&format!("HOME={home}")));
        }
        environment::set_all(&mut environment, &self.env_file, &self.env)?;
        let workdir = self.workdir.as_ref().map(bytes);
        let user = other_user.as_ref().unwrap_or(&of_guest.user);
        Ok(GuestConfig {
            arguments: self.command.iter().map(bytes).collect(),
            environment,
            working_directory: workdir.or_else(|| of_guest.working_directory.clone().map(String::into_bytes)),
            user_id: user.uid,
            group_id: user.gid,
            groups: user.groups.clone(),
            terminal: self.tty.then(client::new_terminal_size),
            agent: true,
            ..GuestConfig::default()
        })
    }
}
