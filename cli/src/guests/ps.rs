//! `kindling ps`: which guests there are.

use super::view;
use crate::{complain, report, say};
use clap::Args;
use kindling::guest::{Guest, GuestError};

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Those that have ended, too
    #[arg(long, short = 'a')]
    all: bool,
    /// All that is known of each, as JSON
    #[arg(long)]
    json: bool,
}

/// Prints them; the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    match list(arguments) {
        Ok(text) => say(text.as_bytes()),
        Err(error) => {
            complain(&error);
            crate::status(error.is_users())
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
    Ok(view::table(["NAME", "IMAGE", "COMMAND", "STATUS", "AGE"], &rows))
}

fn row(guest: &Guest) -> [String; 5] {
    /// Characters of a cell that others chose.
    const ENOUGH: usize = 40;
    let short = |text: &str| {
        let mut text = report::printable(text).replace('\t', " ");
        if let Some((end, _)) = text.char_indices().nth(ENOUGH) {
            text.truncate(end);
            text.push_str("...");
        }
        text
    };
    // The end of a path says more than its beginning.
    let image = guest.record.image.rsplit('/').next().unwrap_or_default();
    [
        guest.name.clone(),
        short(image),
        short(&guest.record.command.join(" ")),
        guest.state().to_string(),
        view::age(guest),
    ]
}
