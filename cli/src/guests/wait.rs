//! `kindling wait`: waits until a guest ends.

use crate::print_error;
use clap::Args;
use kindling::guest::Guest;

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Name of the guest
    name: String,
}

/// Waits for the end of the guest. Returns the guest's exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    let status = Guest::open(&arguments.name).and_then(|guest| guest.wait());
    status.unwrap_or_else(|error| {
        print_error(&error);
        crate::status(error.is_user_error())
    })
}
