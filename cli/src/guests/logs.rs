//! `kindling logs`: prints the output of a detached guest.

use crate::{STATUS_FAILURE, print_error};
use clap::Args;
use kindling::guest::{Guest, GuestError};
use kindling::log::Stream;
use std::io::{self, Write};

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Follow the output until the guest ends
    #[arg(long, short = 'f')]
    follow: bool,
    /// Name of the guest
    name: String,
}

#[derive(Debug, thiserror::Error)]
enum LogsError {
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error("cannot print the log of {0}")]
    Print(String, #[source] io::Error),
}

/// Prints the log: output on standard output, and errors on standard error. Returns the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
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
