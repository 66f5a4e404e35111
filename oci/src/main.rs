//! `kindling-oci`: the program that `kindling run` executes for images of containers.
#![forbid(unsafe_code)]

use clap::{Parser, Subcommand};
use kindling_oci::{Error, Options, Pull, Stored, file_of_that_name, prepare};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use std::error::Error as _;
use std::io::{ErrorKind, IsTerminal, Write, stderr, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Makes root filesystems of container images.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Converts an image, if that was not done before, and prints where it is and what it starts
    Prepare(Prepare),
    /// Lists the images that were converted, those that were used last in front
    #[command(visible_alias = "list")]
    Ls(Kept),
    /// Removes images; guests that run keep what they have
    Rm {
        #[command(flatten)]
        kept: Kept,
        /// Name or id
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Removes images that were not used for some time, and what was left half made
    Prune {
        #[command(flatten)]
        kept: Kept,
        /// How long not, in days
        #[arg(long, value_name = "DAYS", default_value_t = 30)]
        unused: u32,
    },
}

#[derive(Debug, clap::Args)]
struct Kept {
    /// Where converted images are kept [default: $KINDLING_CACHE, or $XDG_CACHE_HOME/kindling]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum When {
    Missing,
    Always,
    Never,
}

#[derive(Debug, clap::Args)]
struct Prepare {
    /// When to ask the registry: where the image has not been pulled before, each time, or not at all
    #[arg(long, value_enum, default_value = "missing", value_name = "WHEN")]
    pull: When,
    /// Where converted images are kept [default: $KINDLING_CACHE, or $XDG_CACHE_HOME/kindling]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Look up this user in place of the image's: NAME or UID, with or without :GROUP
    #[arg(long)]
    user: Option<String>,
    /// Say nothing about progress
    #[arg(long)]
    quiet: bool,
    /// The process that this is done for, which started it: with its end this ends
    #[arg(long, hide = true, value_name = "PID")]
    r#for: Option<u32>,
    /// A name in a registry, or a folder with an OCI layout (`./DIR`, `/DIR`, `oci:DIR`) or an archive (`x.tar`), with
    /// :TAG where it has several images
    image: String,
}

fn main() -> ExitCode {
    if trusted_path::is_set_user_id() {
        tell(&format!("error: {}", trusted_path::SET_USER_ID));
        return ExitCode::from(2);
    }
    match Arguments::parse().command {
        Command::Prepare(arguments) => print(&arguments),
        Command::Ls(kept) => match kindling_oci::list(kept.cache.as_deref()) {
            Ok(images) => say(&table(&images)),
            Err(error) => complain("", &error),
        },
        Command::Rm { kept, images } => {
            let remove = |image: &String| match kindling_oci::remove(kept.cache.as_deref(), image) {
                Ok(removed) => say_removed(&removed),
                Err(error) => complain(&format!("{image}: "), &error),
            };
            // What can be removed is.
            let codes: Vec<_> = images.iter().map(remove).collect();
            codes.into_iter().find(|code| *code != ExitCode::SUCCESS).unwrap_or(ExitCode::SUCCESS)
        }
        Command::Prune { kept, unused } => {
            let unused = Duration::from_secs(u64::from(unused) * 86_400);
            match kindling_oci::prune(kept.cache.as_deref(), unused) {
                Ok(removed) => say_removed(&removed),
                Err(error) => complain("", &error),
            }
        }
    }
}

/// Prints what an image has become.
fn print(arguments: &Prepare) -> ExitCode {
    if let Some(process) = arguments.r#for {
        end_with(process);
    }
    let says = !arguments.quiet && stderr().is_terminal();
    let pull = match arguments.pull {
        When::Missing => Pull::Missing,
        When::Always => Pull::Always,
        When::Never => Pull::Never,
    };
    let options = Options { cache: arguments.cache.clone(), pull, user: arguments.user.clone() };
    let mut begin = |number, count| {
        if says {
            tell(&printable(&format!("{}: converting layer {number} of {count} ...", arguments.image)));
        }
    };
    let prepared = match prepare(&arguments.image, &options, &mut begin) {
        Ok(prepared) => prepared,
        Err(error @ (Error::Registry(_) | Error::NotPulled | Error::Reference(_))) => {
            // A file's name with a letter too many is the name of an image in a registry.
            let image = &arguments.image;
            let hint = match (file_of_that_name(image), &error) {
                (Some(path), _) => format!("what is here is called ./{path}, and in a registry: "),
                (None, Error::Registry(_)) => "there is no such file here, and as a name: ".to_owned(),
                (None, Error::Reference(_)) => "there is no such file or folder, and ".to_owned(),
                (None, _) => String::new(),
            };
            return complain(&format!("{image}: {hint}"), &error);
        }
        Err(error) => return complain(&format!("{}: ", arguments.image), &error),
    };
    match serde_json::to_string(&prepared) {
        Ok(line) => say(&format!("{line}\n")),
        Err(error) => {
            tell(&printable(&format!("error: {}: its description is no text: {error}", arguments.image)));
            ExitCode::FAILURE
        }
    }
}

/// Ends this process with the one that started it.
#[expect(clippy::exit, reason = "nobody wants the image any more")]
fn end_with(parent: u32) {
    // Whatever is half made is removed by who makes it next. A kernel that refuses lets it be made to its end.
    let _ = set_parent_process_death_signal(Some(Signal::TERM));
    let own = getppid().and_then(|pid| u32::try_from(pid.as_raw_nonzero().get()).ok());
    if own != Some(parent) {
        // It ended before.
        std::process::exit(1);
    }
}

/// Writes to standard output. Who reads no more has read enough.
fn say(text: &str) -> ExitCode {
    match stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            tell(&format!("error: cannot write to standard output: {error}"));
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

/// Writes a line to standard error, and does without where nobody reads it.
fn tell(line: &str) {
    let _ = writeln!(stderr(), "{line}");
}

/// Some of the words are an image's or a registry's; they must not reach the terminal as commands, nor fill it.
fn printable(line: &str) -> String {
    const MOST: usize = 2000;
    let mut line = line.chars().map(|c| if c.is_control() { ' ' } else { c });
    let start: String = line.by_ref().take(MOST).collect();
    if line.next().is_some() { start + "..." } else { start }
}

/// Says on one line what is wrong, and a hint behind it; the exit status.
fn complain(what: &str, error: &Error) -> ExitCode {
    let mut line = format!("{what}{error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        line += &format!(": {error}");
        cause = error.source();
    }
    tell(&format!("error: {}", printable(&line)));
    ExitCode::from(if error.is_users() { 2 } else { 1 })
}

fn say_removed(images: &[Stored]) -> ExitCode {
    let lines = images.iter().map(|image| format!("{}  {:.1} MiB\n", image.id, mib(image.bytes)));
    say(&lines.collect::<String>())
}

/// A line for each name of each image.
fn table(images: &[Stored]) -> String {
    let mut text = format!("{:12}  {:>11}  {:>8}  NAME\n", "ID", "SIZE", "UNUSED");
    for image in images {
        let days = image.used.elapsed().unwrap_or_default().as_secs() / 86_400;
        let unnamed = [String::new()];
        for name in if image.names.is_empty() { &unnamed[..] } else { &image.names } {
            let (id, size) = (image.id.hex(), format!("{:.1} MiB", mib(image.bytes)));
            text +=
                &format!("{:12}  {size:>11}  {:>8}  {}\n", &id[..12], format!("{days} d"), printable(name));
        }
    }
    text
}

#[expect(clippy::cast_precision_loss, reason = "a tenth of a MiB is shown")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_and_has_an_end() {
        assert_eq!(printable("a\n\u{1b}[2J\u{9b}ü"), "a  [2J ü");
        assert_eq!(printable(&"x".repeat(3000)).len(), 2003);
    }
}
