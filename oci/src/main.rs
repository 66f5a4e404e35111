//! `kindling-oci`: the program that `kindling run` executes for images of containers.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "a command speaks to its user")]

use clap::{Parser, Subcommand};
use kindling_oci::{Options, Pull, prepare};
use std::error::Error as _;
use std::io::{IsTerminal, Write, stderr};
use std::path::PathBuf;
use std::process::ExitCode;

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
    /// Where converted images are kept [default: $XDG_CACHE_HOME/kindling]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Look up this user in place of the image's: NAME or UID, with or without :GROUP
    #[arg(long)]
    user: Option<String>,
    /// Say nothing about progress
    #[arg(long)]
    quiet: bool,
    /// A folder with an OCI layout or an archive, with :TAG where it has several images, or a name in a registry
    image: String,
}

fn main() -> ExitCode {
    let Command::Prepare(arguments) = Arguments::parse().command;
    let says = !arguments.quiet && stderr().is_terminal();
    let pull = match arguments.pull {
        When::Missing => Pull::Missing,
        When::Always => Pull::Always,
        When::Never => Pull::Never,
    };
    let options = Options { cache: arguments.cache, pull, user: arguments.user };
    let mut begin = |number, count| {
        if says {
            tell(&printable(&format!("{}: converting layer {number} of {count} ...", arguments.image)));
        }
    };
    let prepared = match prepare(&arguments.image, &options, &mut begin) {
        Ok(prepared) => prepared,
        Err(error) => {
            let mut line = format!("{}: {error}", arguments.image);
            let mut cause = error.source();
            while let Some(error) = cause {
                line += &format!(": {error}");
                cause = error.source();
            }
            tell(&format!("error: {}", printable(&line)));
            return ExitCode::from(if error.is_users() { 2 } else { 1 });
        }
    };
    match serde_json::to_string(&prepared) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            tell(&printable(&format!("error: {}: its description is no text: {error}", arguments.image)));
            ExitCode::FAILURE
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_and_has_an_end() {
        assert_eq!(printable("a\n\u{1b}[2J\u{9b}ü"), "a  [2J ü");
        assert_eq!(printable(&"x".repeat(3000)).len(), 2003);
    }
}
