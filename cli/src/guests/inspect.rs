//! `kindling inspect`: prints details of guests as JSON.

use super::view::View;
use crate::{print, report};
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
    /// Memory and processor time on the host, of a running guest.
    host: Option<Usage>,
    /// Messages of a detached guest since its start.
    report: String,
}

/// Prints the details. Returns the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
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
