//! `kindling ps`: lists guests.

use super::view;
use crate::command_line::{Command, Opt, flag};
use crate::{print, print_error, report};
use kindling::guest::{Guest, GuestError};

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    all: bool,
    json: bool,
}

pub(crate) const COMMAND: Command<Arguments> = Command::new("ps", "List guests", run).options(OPTIONS);

#[rustfmt::skip]
const OPTIONS: &[Opt<Arguments>] = &[
    flag("a", "all", |all| all.all = true,
        "List all guests, including those that have ended"),
    flag("", "json", |all| all.json = true,
        "Print all details as JSON"),
];

/// Prints the list. Returns the exit status.
fn run(arguments: &Arguments, _: kindling::timeline::Instant) -> u8 {
    match list(arguments) {
        Ok(text) => print(text.as_bytes()),
        Err(error) => {
            print_error(&error);
            crate::status(error.is_user_error())
        }
    }
}

fn list(arguments: &Arguments) -> Result<String, GuestError> {
    let mut guests = kindling::guests()?;
    guests.retain(|guest| arguments.all || guest.is_alive);
    if arguments.json {
        let views: Vec<_> = guests.iter().map(view::View::of).collect();
        return Ok(report::printable_json(&views));
    }
    let rows: Vec<_> = guests.iter().map(row).collect();
    Ok(view::table(["NAME", "IMAGE", "COMMAND", "STATUS", "AGE", "PORTS"], &rows))
}

fn row(guest: &Guest) -> [String; 6] {
    /// Maximum number of characters of image and command.
    const CELL_MAX: usize = 40;
    let short = |text: &str| {
        let mut text = report::printable(text).replace('\t', " ");
        if let Some((end, _)) = text.char_indices().nth(CELL_MAX) {
            text.truncate(end);
            text.push_str("...");
        }
        text
    };
    // The last component of a path is the most specific one.
    let image = guest.record.image.rsplit('/').next().unwrap_or_default();
    [
        guest.name.clone(),
        short(image),
        short(&guest.record.command.join(" ")),
        guest.state().to_string(),
        view::age(guest),
        guest.record.ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    ]
}
