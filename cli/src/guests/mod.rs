//! The commands that manage guests, a file for each.

pub(crate) mod inspect;
pub(crate) mod kill;
pub(crate) mod logs;
pub(crate) mod pause;
pub(crate) mod port;
pub(crate) mod ps;
pub(crate) mod rm;
pub(crate) mod snapshot;
pub(crate) mod stats;
pub(crate) mod stop;
pub(crate) mod view;
pub(crate) mod wait;

use crate::print_error;
use kindling::guest::GuestError;

/// Executes an action for each guest of a command. Errors are printed, and do not prevent the action for the others.
/// Returns the exit status.
pub(crate) fn each(names: &[String], mut action: impl FnMut(&str) -> Result<(), GuestError>) -> u8 {
    names.iter().fold(0, |status, name| match action(name) {
        Ok(()) => status,
        Err(error) => {
            print_error(&error);
            status.max(crate::status(error.is_user_error()))
        }
    })
}
