//! `kindling stats`: prints the memory and processor time that guests use on the host.

use super::view;
use crate::command_line::{Argument, Command, Store, any};
use crate::{print, print_error};
use kindling::guest::{Guest, GuestError};

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    names: Vec<String>,
}

pub(crate) const COMMAND: Command<Arguments> =
    Command::new("stats", "Print the memory and processor time that guests use", run).arguments(ARGUMENTS);

#[rustfmt::skip]
const ARGUMENTS: &[Argument<Arguments>] = &[
    any("NAME", |all, word| all.names.store(word),
        "Names of the guests [default: all running guests]"),
];

/// Prints a table. Returns the exit status.
fn run(arguments: &Arguments, _: kindling::timeline::Instant) -> u8 {
    let mut names = arguments.names.clone();
    if names.is_empty() {
        match kindling::guests() {
            Ok(all) => {
                names = all.into_iter().filter(|guest| guest.is_alive).map(|guest| guest.name).collect()
            }
            Err(error) => {
                print_error(&error);
                return crate::status(error.is_user_error());
            }
        }
    }
    let mut rows = Vec::new();
    let status = super::each(&names, |name| {
        let used = Guest::open_running(name)?.usage()?.ok_or_else(|| GuestError::Ended(name.to_owned()))?;
        let memory = format!("{} MiB", used.memory_kib.div_ceil(1024));
        let time = format!("{}.{:03} s", used.cpu_ms / 1000, used.cpu_ms % 1000);
        rows.push([name.to_owned(), memory, time]);
        Ok(())
    });
    print(view::table(["NAME", "MEMORY", "CPU TIME"], &rows).as_bytes());
    status
}
