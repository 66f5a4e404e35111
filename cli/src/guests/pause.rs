//! `kindling pause` and `kindling resume`.

use crate::command_line::{Argument, Command, Store, one_or_more};
use crate::print;
use kindling::guest::{Guest, GuestError};

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    names: Vec<String>,
}

pub(crate) const PAUSE: Command<Arguments> =
    Command::new("pause", "Pause guests; their memory stays allocated", |arguments, _| {
        each(arguments, Guest::pause)
    })
    .arguments(ARGUMENTS);

pub(crate) const RESUME: Command<Arguments> =
    Command::new("resume", "Let paused guests continue", |arguments, _| each(arguments, Guest::resume))
        .arguments(ARGUMENTS);

const ARGUMENTS: &[Argument<Arguments>] =
    &[one_or_more("NAME", |all, word| all.names.store(word), "Names of the guests")];

fn each(arguments: &Arguments, action: fn(&Guest) -> Result<(), GuestError>) -> u8 {
    super::each(&arguments.names, |name| {
        action(&Guest::open_running(name)?)?;
        print(format!("{name}\n").as_bytes());
        Ok(())
    })
}
