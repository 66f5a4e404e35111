//! `kindling snapshot`: saves a running guest, which continues.

use crate::command_line::{Argument, Command, Store, one};
use crate::{print, print_error};
use kindling::guest::Guest;
use kindling::snapshot::SnapshotError;
use std::path::PathBuf;

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    name: String,
    folder: Option<PathBuf>,
}

pub(crate) const COMMAND: Command<Arguments> = Command::new(
    "snapshot",
    "Save a running guest in a new directory, from which `kindling restore` starts guests; it continues",
    run,
)
.arguments(ARGUMENTS);

#[rustfmt::skip]
const ARGUMENTS: &[Argument<Arguments>] = &[
    one("NAME", |all, word| all.name.store(word),
        "Name of the guest"),
    one("DIR", |all, word| all.folder.store(word),
        "Directory to create"),
];

/// Takes the snapshot. Returns the exit status.
fn run(arguments: &Arguments, _: kindling::timeline::Instant) -> u8 {
    let folder = arguments.folder.clone().unwrap_or_default();
    let guest = Guest::open_responsive(&arguments.name).map_err(SnapshotError::from);
    match guest.and_then(|guest| guest.snapshot(&folder)) {
        Ok(()) => print(format!("{}\n", folder.display()).as_bytes()),
        Err(error) => {
            print_error(&error);
            crate::status(error.is_user_error())
        }
    }
}
