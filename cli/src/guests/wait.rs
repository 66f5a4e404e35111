//! `kindling wait`: waits until a guest ends.

use crate::command_line::{Argument, Command, Store, one};
use crate::print_error;
use kindling::guest::Guest;

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    name: String,
}

pub(crate) const COMMAND: Command<Arguments> =
    Command::new("wait", "Wait until a guest ends, and exit with its status", run).arguments(ARGUMENTS);

#[rustfmt::skip]
const ARGUMENTS: &[Argument<Arguments>] = &[
    one("NAME", |all, word| all.name.store(word),
        "Name of the guest"),
];

/// Waits for the end of the guest. Returns the guest's exit status.
fn run(arguments: &Arguments, _: kindling::timeline::Instant) -> u8 {
    let status = Guest::open(&arguments.name).and_then(|guest| guest.wait());
    status.unwrap_or_else(|error| {
        print_error(&error);
        crate::status(error.is_user_error())
    })
}
