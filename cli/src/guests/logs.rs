//! `kindling logs`: prints the output of a detached guest.

use crate::command_line::{Argument, Command, Opt, Store, flag, one};
use crate::{STATUS_FAILURE, print_error};
use kindling::guest::{Guest, GuestError};
use kindling::log::Stream;
use std::io::{self, Write};

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    follow: bool,
    name: String,
}

pub(crate) const COMMAND: Command<Arguments> =
    Command::new("logs", "Print the output of a detached guest", run).options(OPTIONS).arguments(ARGUMENTS);

#[rustfmt::skip]
const OPTIONS: &[Opt<Arguments>] = &[
    flag("f", "follow", |all| all.follow = true,
        "Follow the output until the guest ends"),
];

#[rustfmt::skip]
const ARGUMENTS: &[Argument<Arguments>] = &[
    one("NAME", |all, word| all.name.store(word),
        "Name of the guest"),
];

#[derive(Debug, thiserror::Error)]
enum LogsError {
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error("cannot print the log of {0}")]
    Print(String, #[source] io::Error),
}

/// Prints the log: output on standard output, and errors on standard error. Returns the exit status.
fn run(arguments: &Arguments, _: kindling::timeline::Instant) -> u8 {
    let Err(error) = execute(arguments) else { return 0 };
    print_error(&error);
    match error {
        LogsError::Guest(error) => crate::status(error.is_user_error()),
        LogsError::Print(..) => STATUS_FAILURE,
    }
}

fn execute(arguments: &Arguments) -> Result<(), LogsError> {
    let guest = Guest::open(&arguments.name)?;
    let mut log = guest.log(arguments.follow)?;
    while let Some((stream, bytes)) = log.next_record()? {
        match write(stream, &bytes) {
            // The reader has closed the pipe.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            result => result.map_err(|error| LogsError::Print(guest.name.clone(), error))?,
        }
    }
    Ok(())
}

fn write(stream: Stream, bytes: &[u8]) -> io::Result<()> {
    match stream {
        Stream::Output => {
            let mut stdout = io::stdout().lock();
            stdout.write_all(bytes)?;
            stdout.flush()
        }
        Stream::Error => io::stderr().write_all(bytes),
    }
}
