//! `kindling stop`: asks guests to end, and ends those that do not.

use crate::say;
use clap::Args;
use kindling::Guest;
use std::time::{Duration, Instant};

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Seconds in which a guest may end by itself
    #[arg(long, short = 't', value_name = "SECONDS", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(..=31_536_000))]
    time: u64,
    /// Names of the guests
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
}

/// Asks all, then waits for each; the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    let mut guests = Vec::new();
    let found = super::each(&arguments.names, |name| {
        guests.push(Guest::open(name)?);
        Ok(())
    });
    let asked: Vec<_> = guests.iter().map(|guest| (&guest.name, guest.request_stop())).collect();
    let until = Instant::now() + Duration::from_secs(arguments.time);
    asked.into_iter().fold(found, |status, (name, request)| {
        match request.and_then(|request| request.wait(until)) {
            Ok(_) => say(format!("{name}\n").as_bytes()).max(status),
            Err(error) => {
                crate::complain(&error);
                status.max(crate::status(error.is_users()))
            }
        }
    })
}
