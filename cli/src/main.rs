//! `kindling`: boots microVMs, and says what a host can do.
//!
//! Exit status: the guest's own, 2 for a request that cannot be met, and the codes of
//! [`kindling::vmm::ExitReason::status`] and 125 for everything that went wrong on the way.
#![cfg_attr(not(test), no_main)]

mod boot;
mod cp;
mod devices;
mod doctor;
mod exec;
mod guests;
mod images;
mod plain;
mod preboot;
mod report;
mod run;
mod signals;
#[cfg(not(test))]
mod start;
mod terminal;
mod volume;

use clap::{Parser, Subcommand};
use kindling::vmm::{Instant, with_causes};
use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;

/// Boots Linux microVMs within milliseconds.
#[derive(Debug, Parser)]
#[command(name = "kindling", version, arg_required_else_help = true, args_override_self = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, PartialEq, Eq, Subcommand)]
enum Command {
    /// Boots a kernel and stays until its guest ends; the exit status is the guest's
    Boot(Box<boot::Arguments>),
    /// Boots an image's kernel once, so that `kindling boot` continues from there on this host
    Preboot(preboot::Arguments),
    /// Runs a program of a container image in a guest of its own; the exit status is the program's
    Run(Box<run::Arguments>),
    /// Stays with a detached guest, which `kindling run -d` starts this for; its standard input has the command line
    #[command(hide = true)]
    Stay,
    /// Runs one more program in a guest that runs
    Exec(exec::Arguments),
    /// Copies files into a guest that runs, or from there
    Cp(cp::Arguments),
    /// Lists the guests that `kindling run` started
    Ps(guests::ps::Arguments),
    /// Prints what a detached guest wrote
    Logs(guests::logs::Arguments),
    /// Waits for a guest's end; the exit status is the guest's
    Wait(guests::wait::Arguments),
    /// Asks guests to end, and ends those that do not
    Stop(guests::stop::Arguments),
    /// Sends guests a signal, or ends them
    Kill(guests::kill::Arguments),
    /// Forgets guests that have ended
    Rm(guests::rm::Arguments),
    /// Prints all that is known of guests, as JSON
    Inspect(guests::inspect::Arguments),
    /// Prints what guests use of the host
    Stats(guests::stats::Arguments),
    /// Lists what container images have become, and removes it
    Image(images::Arguments),
    /// Makes volumes for `kindling run -v`, lists them, and removes them
    Volume(volume::Arguments),
    /// Says what this host can do for microVMs, and what would make it better
    Doctor(doctor::Arguments),
}

/// The exit status of a request that cannot be met as it is.
const STATUS_BAD_REQUEST: u8 = 2;
/// The exit status where this program or the host failed.
const STATUS_FAILURE: u8 = 125;

/// The exit status of a command that an error ended: whether asking for something else can help.
const fn status(is_users: bool) -> u8 {
    if is_users { STATUS_BAD_REQUEST } else { STATUS_FAILURE }
}

/// Does what the arguments ask for; the exit status.
#[cfg_attr(test, expect(dead_code, reason = "tests have an entry of their own"))]
fn run() -> u8 {
    let started = Instant::now();
    if trusted_path::is_set_user_id() {
        tell(&format!("kindling: {}\n", trusted_path::SET_USER_ID));
        return STATUS_BAD_REQUEST;
    }
    match command(std::env::args_os().collect()) {
        Command::Boot(arguments) => boot::run(&arguments, started),
        Command::Preboot(arguments) => preboot::run(&arguments),
        Command::Run(arguments) => run::run(&arguments, started),
        Command::Stay => run::stay(started),
        Command::Exec(arguments) => exec::run(&arguments),
        Command::Cp(arguments) => cp::run(&arguments),
        Command::Ps(arguments) => guests::ps::run(&arguments),
        Command::Logs(arguments) => guests::logs::run(&arguments),
        Command::Wait(arguments) => guests::wait::run(&arguments),
        Command::Stop(arguments) => guests::stop::run(&arguments),
        Command::Kill(arguments) => guests::kill::run(&arguments),
        Command::Rm(arguments) => guests::rm::run(&arguments),
        Command::Inspect(arguments) => guests::inspect::run(&arguments),
        Command::Stats(arguments) => guests::stats::run(&arguments),
        Command::Image(arguments) => images::run(&arguments),
        Command::Volume(arguments) => volume::run(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
    }
}

/// What a command line asks for. Where that cannot be said, this does not return.
fn command(line: Vec<OsString>) -> Command {
    plain::parse(line.iter().cloned()).unwrap_or_else(|| Arguments::parse_from(line).command)
}

/// A word of the command line in the form that guests have it in.
fn bytes(text: impl AsRef<OsStr>) -> Vec<u8> {
    text.as_ref().as_bytes().to_vec()
}

/// Prints an error with its causes on one line.
fn complain(error: &dyn Error) {
    let line = with_causes(error);
    // A file's author chooses some of the words; they must not reach the terminal as commands.
    tell(&format!("kindling: {}\n", report::printable(&line)));
}

/// The same of a machine that could not be built. Where that is for KVM, it is said what can be done.
fn complain_of_machine(error: &kindling::vmm::Error) {
    complain_of_kvm(&with_causes(error), matches!(error, kindling::vmm::Error::Kvm(_)));
}

/// The same of a guest that could not be started.
fn complain_of_launch(error: &kindling::launch::LaunchError) {
    use kindling::launch::LaunchError;
    match error {
        LaunchError::Machine(error) => complain_of_machine(error),
        LaunchError::Monitor(failure) => complain_of_kvm(&failure.message, failure.is_kvm_error),
        error => complain(error),
    }
}

/// Prints an error; where that is for KVM, with what can be done.
fn complain_of_kvm(line: &str, is_kvm: bool) {
    let hint = if is_kvm {
        "; `kindling doctor` says what this host lacks, and `cargo xtask run`, in the source of Kindling, boots a guest \
         on an emulated machine"
    } else {
        ""
    };
    tell(&format!("kindling: {}{hint}\n", report::printable(line)));
}

/// Writes to standard output; the exit status. Who reads no more has read enough.
fn say(bytes: &[u8]) -> u8 {
    match std::io::stdout().write_all(bytes) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            complain(&error);
            STATUS_FAILURE
        }
        _ => 0,
    }
}

/// Writes to standard error, and does without where nobody reads it.
fn tell(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}
