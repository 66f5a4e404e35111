//! `kindling snapshot` and `kindling suspend`: save a running guest, which continues or ends.

use crate::command_line::{Argument, Command, Store, one};
use crate::{print, print_error};
use kindling::guest::Guest;
use kindling::snapshot::SnapshotError;
use std::path::{Path, PathBuf};

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    name: String,
    folder: Option<PathBuf>,
}

pub(crate) const SNAPSHOT: Command<Arguments> = Command::new(
    "snapshot",
    "Save a running guest in a new directory, from which `kindling restore` starts guests; it continues",
    |arguments, _| save(arguments, |guest, folder| guest.snapshot(folder)),
)
.arguments(ARGUMENTS);

pub(crate) const SUSPEND: Command<Arguments> = Command::new(
    "suspend",
    "Save a running guest as `kindling snapshot` does, and end it; `kindling restore` starts it again",
    |arguments, _| save(arguments, |guest, folder| guest.suspend(folder)),
)
.arguments(ARGUMENTS);

#[rustfmt::skip]
const ARGUMENTS: &[Argument<Arguments>] = &[
    one("NAME", |all, word| all.name.store(word),
        "Name of the guest"),
    one("DIR", |all, word| all.folder.store(word),
        "Directory to create"),
];

/// Saves the guest. Returns the exit status.
fn save(arguments: &Arguments, action: fn(&Guest, &Path) -> Result<(), SnapshotError>) -> u8 {
    let folder = arguments.folder.clone().unwrap_or_default();
    let guest = Guest::open_responsive(&arguments.name).map_err(SnapshotError::from);
    match guest.and_then(|guest| action(&guest, &folder)) {
        Ok(()) => print(format!("{}\n", folder.display()).as_bytes()),
        Err(error) => {
            print_error(&error);
            crate::status(error.is_user_error())
        }
    }
}
