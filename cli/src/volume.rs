//! `kindling volume`: creates, lists, inspects and removes volumes.

use crate::command_line::{Argument, Command, Group, Store, flag, one, one_or_more, option};
use crate::guests::view;
use crate::text::json;
use kindling::timeline::Instant;
use kindling::volume::{DEFAULT_SIZE, Volume, VolumeError, parse_size};
use serde::Serialize;
use std::path::PathBuf;

pub(crate) const COMMANDS: Group =
    Group { name: "volume", about: "Manage volumes", commands: &[&CREATE, &LS, &RM, &INSPECT] };

#[derive(Debug, Default, PartialEq, Eq)]
struct Arguments {
    names: Vec<String>,
    size: Option<String>,
    json: bool,
}

const CREATE: Command<Arguments> = Command::new(
    "volume create",
    "Create an empty volume; `kindling run -v` creates missing volumes itself",
    create,
)
.options(&[option("", "size", "SIZE", |all, word| all.size.store(word), SIZE_HELP)])
.arguments(&[one("NAME", |all, word| all.names.store(word), "Name of the volume")]);
const SIZE_HELP: &str = "Size in bytes, or with the suffix K, M, G or T, from 16M to 16T [default: 10G]";

const LS: Command<Arguments> = Command::new("volume ls", "List volumes", list).options(&[flag(
    "",
    "json",
    |all| all.json = true,
    "Print all details as JSON",
)]);

const RM: Command<Arguments> =
    Command::new("volume rm", "Remove volumes and their content", remove).arguments(NAMES);

const INSPECT: Command<Arguments> =
    Command::new("volume inspect", "Print details of volumes as JSON", inspect).arguments(NAMES);

const NAMES: &[Argument<Arguments>] =
    &[one_or_more("NAME", |all, word| all.names.store(word), "Names of the volumes")];

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

fn create(arguments: &Arguments, _: Instant) -> u8 {
    each(&arguments.names, |name| {
        let size = arguments.size.as_deref().map_or(Ok(DEFAULT_SIZE), parse_size)?;
        Volume::create(name, size)?;
        Ok(format!("{name}\n"))
    })
}

fn remove(arguments: &Arguments, _: Instant) -> u8 {
    each(&arguments.names, |name| {
        Volume::named(name)?.remove()?;
        Ok(format!("{name}\n"))
    })
}

fn inspect(arguments: &Arguments, _: Instant) -> u8 {
    each(&arguments.names, |name| Ok(json(&View::of(&Volume::named(name)?)?)))
}

fn list(arguments: &Arguments, _: Instant) -> u8 {
    finish(table(arguments.json))
}

fn each(names: &[String], action: impl Fn(&str) -> Result<String, VolumeError>) -> u8 {
    // An error with one volume does not prevent the others.
    names.iter().map(|name| finish(action(name))).max().unwrap_or(0)
}

fn finish(result: Result<String, VolumeError>) -> u8 {
    crate::finish(result, VolumeError::is_user_error)
}

fn table(as_json: bool) -> Result<String, VolumeError> {
    let views = Volume::all()?.iter().map(View::of).collect::<Result<Vec<_>, _>>()?;
    if as_json {
        return Ok(json(&views));
    }
    let rows: Vec<_> = views.iter().map(View::row).collect();
    Ok(view::table(["NAME", "SIZE", "USED", "GUESTS"], &rows))
}
