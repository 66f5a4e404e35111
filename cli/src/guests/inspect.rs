//! `kindling inspect`: prints details of guests as JSON.

use super::view::View;
use crate::command_line::{Argument, Command, Store, one_or_more};
use crate::{print, report};
use kindling::guest::{Guest, GuestError, Usage};
use serde::Serialize;

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    names: Vec<String>,
}

pub(crate) const COMMAND: Command<Arguments> =
    Command::new("inspect", "Print details of guests as JSON", run).arguments(ARGUMENTS);

#[rustfmt::skip]
const ARGUMENTS: &[Argument<Arguments>] = &[
    one_or_more("NAME", |all, word| all.names.store(word),
        "Names of the guests"),
];

#[derive(Serialize)]
struct Details<'a> {
    #[serde(flatten)]
    view: View<'a>,
    /// Memory and processor time on the host, of a running guest.
    host: Option<Usage>,
    /// Messages of a detached guest since its start.
    report: String,
}

/// Prints the details. Returns the exit status.
fn run(arguments: &Arguments, _: kindling::timeline::Instant) -> u8 {
    super::each(&arguments.names, |name| {
        let guest = Guest::open(name)?;
        print(describe(&guest)?.as_bytes());
        Ok(())
    })
}

fn describe(guest: &Guest) -> Result<String, GuestError> {
    let details = Details { view: View::of(guest), host: guest.usage()?, report: guest.report() };
    Ok(report::printable_json(&details))
}
