//! `kindling stop`: stops guests, and kills those that do not end in time.

use crate::print;
use clap::Args;
use kindling::Guest;
use std::time::{Duration, Instant};

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Seconds to wait before a guest is killed
    #[arg(long, short = 't', value_name = "SECONDS", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(..=31_536_000))]
    time: u64,
    /// Names of the guests
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
}

/// Requests the end of all guests, and then waits for each. Returns the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    let mut guests = Vec::new();
    let found = super::each(&arguments.names, |name| {
        guests.push(Guest::open(name)?);
        Ok(())
    });
    let requests: Vec<_> = guests.iter().map(|guest| (&guest.name, guest.request_stop())).collect();
    let until = Instant::now() + Duration::from_secs(arguments.time);
    requests.into_iter().fold(found, |status, (name, request)| {
        match request.and_then(|request| request.wait(until)) {
            Ok(_) => print(format!("{name}\n").as_bytes()).max(status),
            Err(error) => {
                crate::print_error(&error);
                status.max(crate::status(error.is_user_error()))
            }
        }
    })
}
