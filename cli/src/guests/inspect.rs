//! `kindling inspect`: all that is known of a guest, for programs.

use super::view::View;
use crate::{report, say};
use clap::Args;
use kindling::guest::{Guest, GuestError, Usage};
use serde::Serialize;

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Names of the guests
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
}

#[derive(Serialize)]
struct Details<'a> {
    #[serde(flatten)]
    view: View<'a>,
    /// What it uses of the host while it runs.
    host: Option<Usage>,
    /// What its VMM had to say since it was started.
    report: String,
}

/// Prints it as JSON; the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    super::each(&arguments.names, |name| {
        let guest = Guest::open(name)?;
        say(describe(&guest)?.as_bytes());
        Ok(())
    })
}

fn describe(guest: &Guest) -> Result<String, GuestError> {
    let details = Details { view: View::of(guest), host: guest.usage()?, report: guest.report() };
    Ok(report::printable_json(&details))
}
