//! `kindling kill`: sends a signal to guests, or kills them.

use crate::print;
use clap::Args;
use kindling::guest::{Guest, GuestError};
use kindling::signal;

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Signal for the command of the guest, as a name or number; KILL kills the guest
    #[arg(long, short = 's', value_name = "SIGNAL", default_value = "KILL", value_parser = signal::parse)]
    signal: u8,
    /// Names of the guests
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
}

/// Sends the signal. Returns the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    super::each(&arguments.names, |name| {
        let guest = Guest::open_running(name)?;
        if i32::from(arguments.signal) == libc::SIGKILL {
            guest.kill()?;
        } else {
            if guest.record.is_embedded {
                return Err(GuestError::Embedded(name.to_owned()));
            }
            guest.front()?.ok_or_else(|| GuestError::Ended(name.to_owned()))?.send(arguments.signal);
        }
        print(format!("{name}\n").as_bytes());
        Ok(())
    })
}
