//! `kindling stop`: stops guests, and kills those that do not end in time.

use crate::command_line::{Argument, Command, Opt, Store, in_range, one_or_more, option, store_as};
use crate::print;
use kindling::Guest;
use std::time::{Duration, Instant};

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    time: u64,
    names: Vec<String>,
}

impl Default for Arguments {
    fn default() -> Self {
        Self { time: 10, names: Vec::new() }
    }
}

/// Maximum of `--time`: a year.
const TIME_MAX: u64 = 31_536_000;

pub(crate) const COMMAND: Command<Arguments> =
    Command::new("stop", "Stop guests, and kill those that do not end in time", run)
        .options(OPTIONS)
        .arguments(ARGUMENTS);

#[rustfmt::skip]
const OPTIONS: &[Opt<Arguments>] = &[
    option("t", "time", "SECONDS", |all, word| store_as(&mut all.time, word, in_range(0..=TIME_MAX)),
        "Seconds to wait before a guest is killed [default: 10]"),
];

#[rustfmt::skip]
const ARGUMENTS: &[Argument<Arguments>] = &[
    one_or_more("NAME", |all, word| all.names.store(word),
        "Names of the guests"),
];

/// Requests the end of all guests, and then waits for each. Returns the exit status.
fn run(arguments: &Arguments, _: kindling::timeline::Instant) -> u8 {
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
