//! `kindling logs`: what a detached guest wrote.

use crate::{STATUS_FAILURE, complain};
use clap::Args;
use kindling::guest::{Guest, GuestError};
use kindling::log::Stream;
use std::io::{self, Write};

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Go on until the guest ends
    #[arg(long, short = 'f')]
    follow: bool,
    /// Name of the guest
    name: String,
}

#[derive(Debug, thiserror::Error)]
enum LogsError {
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error("cannot deliver the log of {0}")]
    Deliver(String, #[source] io::Error),
}

/// Prints it, each stream on its own; the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    let Err(error) = print(arguments) else { return 0 };
    complain(&error);
    match error {
        LogsError::Guest(error) => crate::status(error.is_users()),
        LogsError::Deliver(..) => STATUS_FAILURE,
    }
}

fn print(arguments: &Arguments) -> Result<(), LogsError> {
    let guest = Guest::open(&arguments.name)?;
    let mut log = guest.log(arguments.follow)?;
    while let Some((stream, bytes)) = log.next_record()? {
        match deliver(stream, &bytes) {
            // Nobody reads it any more.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            result => result.map_err(|error| LogsError::Deliver(guest.name.clone(), error))?,
        }
    }
    Ok(())
}

fn deliver(stream: Stream, bytes: &[u8]) -> io::Result<()> {
    match stream {
        Stream::Output => {
            let mut stdout = io::stdout().lock();
            stdout.write_all(bytes)?;
            stdout.flush()
        }
        Stream::Error => io::stderr().write_all(bytes),
    }
}
