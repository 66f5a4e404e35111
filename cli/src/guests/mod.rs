//! The commands that look after guests, a file for each.

pub(crate) mod inspect;
pub(crate) mod kill;
pub(crate) mod logs;
pub(crate) mod ps;
pub(crate) mod rm;
pub(crate) mod stats;
pub(crate) mod stop;
pub(crate) mod view;
pub(crate) mod wait;

use crate::complain;
use kindling::guest::GuestError;

/// Does something to each guest of a command. What goes wrong with one is said and does not keep the others.
pub(crate) fn each(names: &[String], mut action: impl FnMut(&str) -> Result<(), GuestError>) -> u8 {
    names.iter().fold(0, |status, name| match action(name) {
        Ok(()) => status,
        Err(error) => {
            complain(&error);
            status.max(crate::status(error.is_users()))
        }
    })
}
