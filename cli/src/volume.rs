//! `kindling volume`: makes volumes, lists them, and removes them.

use crate::guests::view;
use crate::{complain, say};
use clap::{Args, Subcommand};
use kindling::volume::{DEFAULT_SIZE, Volume, VolumeError, parse_size};
use serde::Serialize;
use std::path::PathBuf;

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand, PartialEq, Eq)]
enum Action {
    /// Makes an empty volume; `kindling run -v` makes those it needs by itself
    Create {
        /// What it can hold at most: bytes, or with K, M, G or T [default: 10G]
        #[arg(long, value_name = "SIZE")]
        size: Option<String>,
        /// Name of the volume
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// Lists the volumes
    Ls {
        /// All that is known of each, as JSON
        #[arg(long)]
        json: bool,
    },
    /// Removes volumes with all that is in them
    Rm {
        /// Names of the volumes
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
    },
    /// Prints all that is known of volumes, as JSON
    Inspect {
        /// Names of the volumes
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
    },
}

/// A volume for programs.
#[derive(Serialize)]
struct View {
    name: String,
    path: PathBuf,
    /// Bytes that it can hold, with what the filesystem needs itself.
    size: u64,
    /// Bytes that it takes on the host.
    used: u64,
    /// Guests that have it.
    guests: Vec<String>,
}

impl View {
    fn of(volume: &Volume) -> Result<Self, VolumeError> {
        let (size, used) = volume.size()?;
        Ok(Self { name: volume.name.clone(), path: volume.path.clone(), size, used, guests: volume.guests() })
    }

    fn row(&self) -> [String; 4] {
        const MIB: u64 = 1 << 20;
        let mib = |bytes: u64| format!("{} MiB", bytes.div_ceil(MIB));
        [self.name.clone(), mib(self.size), mib(self.used), self.guests.join(" ")]
    }
}

/// Does it; the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    match &arguments.action {
        Action::Create { size, name } => finish(create(name, size.as_deref())),
        Action::Ls { json } => finish(list(*json)),
        Action::Rm { names } => each(names, |name| {
            Volume::named(name)?.remove()?;
            Ok(format!("{name}\n"))
        }),
        Action::Inspect { names } => each(names, |name| Ok(json(&View::of(&Volume::named(name)?)?))),
    }
}

fn each(names: &[String], action: impl Fn(&str) -> Result<String, VolumeError>) -> u8 {
    // What goes wrong with one does not keep the others.
    names.iter().map(|name| finish(action(name))).max().unwrap_or(0)
}

fn finish(result: Result<String, VolumeError>) -> u8 {
    match result {
        Ok(text) => say(text.as_bytes()),
        Err(error) => {
            complain(&error);
            crate::status(error.is_users())
        }
    }
}

fn create(name: &str, size: Option<&str>) -> Result<String, VolumeError> {
    let size = size.map_or(Ok(DEFAULT_SIZE), parse_size)?;
    Volume::create(name, size)?;
    Ok(format!("{name}\n"))
}

fn list(as_json: bool) -> Result<String, VolumeError> {
    let views = Volume::all()?.iter().map(View::of).collect::<Result<Vec<_>, _>>()?;
    if as_json {
        return Ok(json(&views));
    }
    let rows: Vec<_> = views.iter().map(View::row).collect();
    Ok(view::table(["NAME", "SIZE", "USED", "GUESTS"], &rows))
}

/// Structures of strings and numbers always serialize.
fn json(value: &impl Serialize) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default() + "\n"
}
