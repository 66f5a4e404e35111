//! `kindling rm`: removes guests that have ended.

use crate::print;
use clap::Args;
use kindling::guest::Guest;

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Kill guests that are running
    #[arg(long, short = 'f')]
    force: bool,
    /// Names of the guests
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
}

/// Removes the directories of the guests. Returns the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
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
