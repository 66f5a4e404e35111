//! `kindling wait`: waits for a guest's end.

use crate::complain;
use clap::Args;
use kindling::guest::Guest;

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Name of the guest
    name: String,
}

/// Waits; the exit status is the guest's.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    let status = Guest::open(&arguments.name).and_then(|guest| guest.wait());
    status.unwrap_or_else(|error| {
        complain(&error);
        crate::status(error.is_users())
    })
}
