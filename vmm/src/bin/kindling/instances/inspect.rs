//! `kindling inspect`: all that is known of a guest, for programs.

use super::stats::Use;
use super::view::View;
use super::{Found, InstanceError};
use crate::{report, say};
use clap::Args;
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
    host: Option<Use>,
    /// What its VMM had to say since it was started.
    report: String,
}

/// Prints it as JSON; the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    super::each(&arguments.names, |name| {
        let guest = Found::named(name)?;
        say(describe(&guest)?.as_bytes());
        Ok(())
    })
}

fn describe(guest: &Found) -> Result<String, InstanceError> {
    let report = std::fs::read(guest.folder.join(super::REPORT)).unwrap_or_default();
    let details = Details {
        view: guest.view(),
        host: guest.host_use()?,
        report: String::from_utf8_lossy(&report).into_owned(),
    };
    Ok(report::printable_json(&details))
}
