//! `kindling rm`: removes guests that have ended.

use crate::command_line::{Argument, Command, Opt, Store, flag, one_or_more};
use crate::print;
use kindling::guest::Guest;

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    force: bool,
    names: Vec<String>,
}

pub(crate) const COMMAND: Command<Arguments> =
    Command::new("rm", "Remove guests that have ended", run).options(OPTIONS).arguments(ARGUMENTS);

#[rustfmt::skip]
const OPTIONS: &[Opt<Arguments>] = &[
    flag("f", "force", |all| all.force = true,
        "Kill guests that are running"),
];

#[rustfmt::skip]
const ARGUMENTS: &[Argument<Arguments>] = &[
    one_or_more("NAME", |all, word| all.names.store(word),
        "Names of the guests"),
];

/// Removes the directories of the guests. Returns the exit status.
fn run(arguments: &Arguments, _: kindling::timeline::Instant) -> u8 {
    super::each(&arguments.names, |name| {
        let guest = Guest::open(name)?;
        if arguments.force {
            guest.kill()?;
        }
        // The directory of a killed guest that is not kept is removed already.
        if !arguments.force || guest.folder.exists() {
            guest.take()?.remove();
        }
        print(format!("{name}\n").as_bytes());
        Ok(())
    })
}
