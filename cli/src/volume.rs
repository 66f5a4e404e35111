//! `kindling volume`: creates, lists, inspects and removes volumes.

use crate::guests::view;
use crate::{print, print_error};
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
    /// Create an empty volume; `kindling run -v` creates missing volumes itself
    Create {
        /// Size in bytes, or with the suffix K, M, G or T, from 16M to 16T [default: 10G]
        #[arg(long, value_name = "SIZE")]
        size: Option<String>,
        /// Name of the volume
        #[arg(value_name = "NAME")]
        name: String,
    },
    /// List volumes
    Ls {
        /// Print all details as JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove volumes and their content
    Rm {
        /// Names of the volumes
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
    },
    /// Print details of volumes as JSON
    Inspect {
        /// Names of the volumes
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
    },
}

/// JSON form of a volume.
#[derive(Serialize)]
struct View {
    name: String,
    path: PathBuf,
    /// Size of the disk in bytes.
    size: u64,
    /// Space on the host in bytes.
    used: u64,
    /// Names of running guests that mount the volume.
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

/// Executes the command. Returns the exit status.
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
    // An error with one volume does not prevent the others.
    names.iter().map(|name| finish(action(name))).max().unwrap_or(0)
}

fn finish(result: Result<String, VolumeError>) -> u8 {
    match result {
        Ok(text) => print(text.as_bytes()),
        Err(error) => {
            print_error(&error);
            crate::status(error.is_user_error())
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
