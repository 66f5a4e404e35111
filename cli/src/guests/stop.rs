//! `kindling stop`: asks guests to end, and ends those that do not.

use crate::say;
use clap::Args;
use kindling::guest::{Guest, GuestError};
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

const SIGTERM: u8 = 15;
const SIGKILL: u8 = 9;

/// Asks all, then waits for each; the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    let mut asked = Vec::new();
    let status = super::each(&arguments.names, |name| {
        let guest = Guest::named(name)?;
        let front = guest.front()?;
        match (&front, guest.record.stop_signal) {
            // There is no payload that could be asked.
            _ if guest.record.is_embedded => guest.kill()?,
            (None, _) => {}
            // Nobody can be asked with it: the VMM would die of it, and leave everything as it is.
            (Some(_), SIGKILL) => guest.kill()?,
            // One whose description is damaged has none.
            (Some(front), 0) => front.send(SIGTERM),
            (Some(front), signal) => front.send(signal),
        }
        asked.push((guest, front));
        Ok(())
    });
    let until = Instant::now() + Duration::from_secs(arguments.time);
    asked.iter().fold(status, |status, (guest, front)| {
        let has_ended = front.as_ref().is_none_or(|front| front.wait(Some(until)));
        let result = if has_ended { Ok::<_, GuestError>(()) } else { guest.kill() };
        match result {
            Ok(()) => say(format!("{}\n", guest.name).as_bytes()).max(status),
            Err(error) => {
                crate::complain(&error);
                status.max(crate::status(error.is_users()))
            }
        }
    })
}
