//! `kindling kill`: sends a signal to guests, or kills them.

use crate::command_line::{Argument, Command, Opt, Store, one_or_more, option, store_as};
use crate::print;
use kindling::guest::{Guest, GuestError};
use kindling::signal;

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    signal: u8,
    names: Vec<String>,
}

impl Default for Arguments {
    fn default() -> Self {
        Self { signal: SIGKILL, names: Vec::new() }
    }
}

const SIGKILL: u8 = 9;

pub(crate) const COMMAND: Command<Arguments> =
    Command::new("kill", "Kill guests, or send them a signal", run).options(OPTIONS).arguments(ARGUMENTS);

#[rustfmt::skip]
const OPTIONS: &[Opt<Arguments>] = &[
    option("s", "signal", "SIGNAL", |all, word| store_as(&mut all.signal, word, signal::parse),
        "Signal for the command of the guest, as a name or number; KILL kills the guest [default: KILL]"),
];

#[rustfmt::skip]
const ARGUMENTS: &[Argument<Arguments>] = &[
    one_or_more("NAME", |all, word| all.names.store(word),
        "Names of the guests"),
];

/// Sends the signal. Returns the exit status.
fn run(arguments: &Arguments, _: kindling::timeline::Instant) -> u8 {
    super::each(&arguments.names, |name| {
        let guest = Guest::open_running(name)?;
        if arguments.signal == SIGKILL {
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
