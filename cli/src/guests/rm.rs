//! `kindling rm`: forgets guests that have ended.

use crate::say;
use clap::Args;
use kindling::guest::Guest;

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// End those that run, without asking them
    #[arg(long, short = 'f')]
    force: bool,
    /// Names of the guests
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
}

/// Removes their folders; the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    super::each(&arguments.names, |name| {
        let guest = Guest::open(name)?;
        if arguments.force {
            guest.kill()?;
        }
        // One that leaves nothing behind is gone already when it was ended here.
        if !arguments.force || guest.folder.exists() {
            guest.take()?.remove();
        }
        say(format!("{name}\n").as_bytes());
        Ok(())
    })
}
