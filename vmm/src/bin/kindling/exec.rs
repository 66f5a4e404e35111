//! `kindling exec`: one more process in a guest that runs.

use crate::instances::{Found, InstanceError};
use crate::run::client::{self, Streams};
use crate::run::signals;
use crate::terminal::RawTerminal;
use crate::{STATUS_BAD_REQUEST, STATUS_FAILURE, bytes, complain};
use clap::Args;
use kindling::agent::{AgentError, Process};
use kindling::config::GuestConfig;
use std::ffi::OsString;

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Name of the guest
    name: String,
    /// Environment entry of the command, NAME=VALUE; may be repeated
    #[arg(long, short = 'e', value_name = "NAME=VALUE")]
    env: Vec<OsString>,
    /// Working directory of the command
    #[arg(long, short = 'w', value_name = "DIR")]
    workdir: Option<OsString>,
    /// User and group of the command, as numbers
    #[arg(long, short = 'u', value_name = "UID[:GID]", value_parser = crate::boot::parse_user)]
    user: Option<(u32, u32)>,
    /// Give the command a terminal
    #[arg(long, short = 't')]
    tty: bool,
    /// Accepted and without effect: the command always has this command's input
    #[arg(long, short = 'i')]
    interactive: bool,
    /// Command
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

#[derive(Debug, thiserror::Error)]
enum ExecError {
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error(transparent)]
    Command(#[from] guest_protocol::frame::FrameError),
    #[error("the host refused to duplicate a standard stream")]
    Host(#[from] std::io::Error),
}

/// Runs the command; the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    execute(arguments).unwrap_or_else(|error| {
        complain(&error);
        match error {
            ExecError::Host(_) | ExecError::Agent(AgentError::Lost) => STATUS_FAILURE,
            _ => STATUS_BAD_REQUEST,
        }
    })
}

fn execute(arguments: &Arguments) -> Result<u8, ExecError> {
    let guest = Found::alive(&arguments.name)?;
    let frame = arguments.guest().to_frame(0, false, None)?;
    // A second request to end is one too many: then this command ends, and the agent hangs up on the process.
    let signals = signals::receive(false, leave);
    let process = Process::start(&guest.socket(), token(), &frame, arguments.tty)?;
    let terminal = arguments.tty.then(RawTerminal::enter).flatten();
    let code = client::serve(process, Streams::own()?, &signals);
    drop(terminal);
    Ok(code?)
}

/// Ends this command; the agent then hangs up on the process.
#[expect(clippy::exit, reason = "the main thread waits for a process that does not end")]
fn leave(signal: u8) {
    crate::terminal::restore_from_handler();
    std::process::exit(128 + i32::from(signal));
}

/// A number that no other process of a guest has, but for one chance in 2^64.
pub(crate) fn token() -> u64 {
    let mut bytes = [0; 8];
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u64::from_le_bytes(bytes).max(1)
}

impl Arguments {
    fn guest(&self) -> GuestConfig {
        let (user_id, group_id) = self.user.unwrap_or_default();
        GuestConfig {
            arguments: self.command.iter().map(bytes).collect(),
            environment: self.env.iter().map(bytes).collect(),
            working_directory: self.workdir.as_ref().map(bytes),
            user_id,
            group_id,
            terminal: self.tty.then(client::new_terminal_size),
            agent: true,
            ..GuestConfig::default()
        }
    }
}
