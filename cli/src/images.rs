//! `kindling image`: manages converted container images, by executing `kindling-oci`.

use crate::command_line::{self, Argument, Store, rest_required};
use crate::{STATUS_FAILURE, print_error};
use kindling::image::{self, ImageError};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    command: Vec<OsString>,
}

pub(crate) const COMMAND: command_line::Command<Arguments> =
    command_line::Command::new("image", "Manage converted container images", run).arguments(ARGUMENTS);

#[rustfmt::skip]
const ARGUMENTS: &[Argument<Arguments>] = &[
    rest_required("COMMAND", |all, word| all.command.store(word),
        "`ls`, `rm IMAGE...`, `prune [--unused DAYS]`, or `prepare IMAGE`, which pulls and converts an \
         image in advance"),
];

/// Executes the program in place of this one. Returns the exit status if that fails.
fn run(arguments: &Arguments, _: kindling::timeline::Instant) -> u8 {
    match image::converter() {
        Ok(program) => {
            let error = Command::new(program).args(&arguments.command).exec();
            print_error(&ImageError::NoConverter(error));
        }
        Err(error) => print_error(&error),
    }
    STATUS_FAILURE
}
