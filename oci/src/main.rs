//! `kindling-oci`: the program that `kindling run` and `kindling image` execute for container images.

mod sandbox;

use clap::{Parser, Subcommand};
use kindling_oci::{Cache, Error, Options, Pull, Reads, StoredImage, local_file_named, prepare, reads};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use serde_json::json;
use std::io::{ErrorKind, IsTerminal, Write, stderr, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Convert container images to root filesystems of guests
// Of a repeated option the last counts, as in docker: wrapper scripts add their own before those of their caller.
#[derive(Debug, Parser)]
#[command(version, args_override_self = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Convert an image, unless the cache has it, and print its path and configuration as JSON
    Prepare(Prepare),
    /// List the images in the cache, most recently used first
    #[command(visible_alias = "list")]
    Ls(CacheArguments),
    /// Remove images from the cache; running guests are not affected
    Rm {
        #[command(flatten)]
        cache: CacheArguments,
        /// Name of an image, or the first digits of its id
        #[arg(required = true)]
        images: Vec<String>,
    },
    /// Remove images that have not been used for some time, and unfinished conversions
    Prune {
        #[command(flatten)]
        cache: CacheArguments,
        /// Remove images that have not been used for this many days
        #[arg(long, value_name = "DAYS", default_value_t = 30)]
        unused: u32,
    },
}

#[derive(Debug, clap::Args)]
struct CacheArguments {
    /// Cache directory [default: $KINDLING_CACHE, or $XDG_CACHE_HOME/kindling]
    #[arg(long = "cache", value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Print JSON, an array of images
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum PullPolicy {
    Missing,
    Always,
    Never,
}

#[derive(Debug, clap::Args)]
struct Prepare {
    /// When to pull the image from the registry: if the cache does not have it, always, or never
    #[arg(long, value_enum, default_value = "missing", value_name = "WHEN")]
    pull: PullPolicy,
    /// Cache directory [default: $KINDLING_CACHE, or $XDG_CACHE_HOME/kindling]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// User to look up instead of the image's: NAME or UID, optionally with :GROUP
    #[arg(long)]
    user: Option<String>,
    /// Do not show progress
    #[arg(long)]
    quiet: bool,
    /// Show progress even if standard error is not a terminal
    #[arg(long, conflicts_with = "quiet")]
    progress: bool,
    /// The parent process, with which this process ends
    #[arg(long, hide = true, value_name = "PID")]
    r#for: Option<u32>,
    /// Reference of an image in a registry, or path of a directory with an OCI layout (`./DIR`, `/DIR`, `oci:DIR`) or
    /// of an archive (`x.tar`), with :TAG if it has several images
    image: String,
}

fn main() -> ExitCode {
    if trusted_path::is_set_user_id() {
        write_stderr(&format!("error: {}", trusted_path::SET_USER_ID));
        return ExitCode::from(2);
    }
    let result = match Arguments::parse().command {
        Command::Prepare(arguments) => prepare_image(&arguments),
        Command::Ls(arguments) => list(&arguments),
        Command::Rm { cache, images } => remove(&cache, &images),
        Command::Prune { cache, unused } => prune(&cache, unused),
    };
    result.unwrap_or_else(|code| code)
}

/// Opens the cache, and drops all rights except access to the cache and to the command's inputs. A failure is reported after
/// a prefix.
fn confine(prefix: &str, directory: Option<&Path>, reads: &Reads) -> Result<Cache, ExitCode> {
    let cache = Cache::open(directory).map_err(|error| report_error(prefix, &error))?;
    sandbox::enter(cache.folder(), reads).map_err(|error| {
        report(prefix, &error);
        ExitCode::FAILURE
    })?;
    Ok(cache)
}

/// Opens the cache for a command that reads nothing else.
fn only_cache(arguments: &CacheArguments) -> Result<Cache, ExitCode> {
    confine("", arguments.directory.as_deref(), &Reads::default())
}

fn list(arguments: &CacheArguments) -> Result<ExitCode, ExitCode> {
    Ok(match kindling_oci::list(&only_cache(arguments)?) {
        Ok(images) if arguments.json => print_json(&images),
        Ok(images) => write_stdout(&table(&images)),
        Err(error) => report_error("", &error),
    })
}

fn remove(arguments: &CacheArguments, images: &[String]) -> Result<ExitCode, ExitCode> {
    let cache = only_cache(arguments)?;
    let remove = |image: &String| match kindling_oci::remove(&cache, image) {
        Ok(removed) if arguments.json => print_json(&removed),
        Ok(removed) => print_removed(&removed),
        Err(error) => report_error(&format!("{image}: "), &error),
    };
    // One failure does not keep the other images from being removed.
    let codes: Vec<_> = images.iter().map(remove).collect();
    Ok(codes.into_iter().find(|code| *code != ExitCode::SUCCESS).unwrap_or(ExitCode::SUCCESS))
}

fn prune(arguments: &CacheArguments, unused_days: u32) -> Result<ExitCode, ExitCode> {
    let unused = Duration::from_secs(u64::from(unused_days) * 86_400);
    Ok(match kindling_oci::prune(&only_cache(arguments)?, unused) {
        Ok(removed) if arguments.json => print_json(&removed),
        Ok(removed) => print_removed(&removed),
        Err(error) => report_error("", &error),
    })
}

/// Converts an image and prints its description.
fn prepare_image(arguments: &Prepare) -> Result<ExitCode, ExitCode> {
    if let Some(process) = arguments.r#for {
        exit_with(process);
    }
    let image = &arguments.image;
    let shows_progress = arguments.progress || !arguments.quiet && stderr().is_terminal();
    let pull = match arguments.pull {
        PullPolicy::Missing => Pull::Missing,
        PullPolicy::Always => Pull::Always,
        PullPolicy::Never => Pull::Never,
    };
    let options = Options { pull, user: arguments.user.clone() };
    let mut begin = |number, count| {
        if shows_progress {
            write_stderr(&printable(&format!("{image}: converting layer {number} of {count} ...")));
        }
    };
    let reads = reads(image, pull).map_err(|error| report_image(image, &error))?;
    let cache = confine(&format!("{image}: "), arguments.cache.as_deref(), &reads)?;
    let prepared =
        prepare(&cache, image, &options, &mut begin).map_err(|error| report_image(image, &error))?;
    Ok(match serde_json::to_string(&prepared) {
        Ok(line) => write_stdout(&format!("{line}\n")),
        Err(error) => {
            report(&format!("{image}: cannot serialize its description: "), &error);
            ExitCode::FAILURE
        }
    })
}

/// Reports why an image cannot be prepared, and returns the exit status.
fn report_image(image: &str, error: &Error) -> ExitCode {
    // A mistyped path may be a valid reference.
    let hint = match (local_file_named(image), error) {
        (Some(path), Error::Registry(_) | Error::NotPulled | Error::Reference(_)) => {
            format!("to use the local path, write ./{path}; as an image in a registry: ")
        }
        (None, Error::Registry(_)) => "no such local file; as an image in a registry: ".to_owned(),
        (None, Error::Reference(_)) => "no such file or directory, and ".to_owned(),
        (_, Error::Read { path, source })
            if source.kind() == ErrorKind::PermissionDenied && path.is_symlink() =>
        {
            "links that lead out of an image are not followed; `cp -rL` copies it with their targets: "
                .to_owned()
        }
        _ => String::new(),
    };
    report_error(&format!("{image}: {hint}"), error)
}

/// Makes this process end with its parent.
#[expect(clippy::exit, reason = "the parent has ended")]
fn exit_with(parent: u32) {
    // The next conversion of the image removes the draft. If the kernel refuses, this conversion runs to its end.
    let _ = set_parent_process_death_signal(Some(Signal::TERM));
    let own = getppid().and_then(|pid| u32::try_from(pid.as_raw_nonzero().get()).ok());
    if own != Some(parent) {
        // The parent ended before the signal was set.
        std::process::exit(1);
    }
}

/// Writes to standard output. A closed pipe is not an error.
fn write_stdout(text: &str) -> ExitCode {
    match stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            write_stderr(&format!("error: cannot write to standard output: {error}"));
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

/// Writes a line to standard error, ignoring failures.
fn write_stderr(line: &str) {
    let _ = writeln!(stderr(), "{line}");
}

/// Replaces control characters and truncates a line. Parts of messages come from an image or a registry and must
/// neither control the terminal nor fill it.
fn printable(line: &str) -> String {
    const MAX_CHARS: usize = 2000;
    let mut line = line.chars().map(|c| if c.is_control() { ' ' } else { c });
    let start: String = line.by_ref().take(MAX_CHARS).collect();
    if line.next().is_some() { start + "..." } else { start }
}

/// Reports an error and its causes on one line after a prefix, and returns the exit status.
fn report_error(prefix: &str, error: &Error) -> ExitCode {
    report(prefix, error);
    ExitCode::from(if error.is_user_error() { 2 } else { 1 })
}

/// Reports an error and its causes on one line after a prefix.
fn report(prefix: &str, error: &dyn std::error::Error) {
    let mut line = format!("{prefix}{error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        line += &format!(": {error}");
        cause = error.source();
    }
    write_stderr(&format!("error: {}", printable(&line)));
}

fn print_removed(images: &[StoredImage]) -> ExitCode {
    let lines = images.iter().map(|image| format!("{}  {:.1} MiB\n", image.id, mib(image.bytes)));
    write_stdout(&lines.collect::<String>())
}

/// Prints images as one line of JSON.
fn print_json(images: &[StoredImage]) -> ExitCode {
    let images: Vec<_> = images.iter().map(StoredImage::description).collect();
    write_stdout(&format!("{}\n", json!(images)))
}

/// A table of images, with a line for each name.
fn table(images: &[StoredImage]) -> String {
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
    fn control_characters_and_long_lines_are_not_printed() {
        assert_eq!(printable("a\n\u{1b}[2J\u{9b}ü"), "a  [2J ü");
        assert_eq!(printable(&"x".repeat(3000)).len(), 2003);
    }
}
