//! The command `kindling`: runs container images and boots kernels in microVMs, and manages guests and volumes.
//!
//! Exit status: that of the guest, 2 for an invalid request, 125 if kindling or the host failed, and those of
//! [`kindling::vmm::ExitReason::status`] for a guest that failed.
#![cfg_attr(not(test), no_main)]

mod boot;
mod cp;
mod devices;
mod doctor;
mod exec;
mod fast_args;
mod guests;
mod images;
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

/// Run container images and Linux kernels in microVMs
#[derive(Debug, Parser)]
#[command(name = "kindling", version, arg_required_else_help = true, args_override_self = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, PartialEq, Eq, Subcommand)]
enum Command {
    /// Boot a kernel in a microVM, in the foreground
    Boot(Box<boot::Arguments>),
    /// Pre-boot the kernel of an image, from which `kindling boot` continues
    Preboot(preboot::Arguments),
    /// Run a command in a new microVM
    Run(Box<run::Arguments>),
    /// Serve a detached guest of `kindling run --detach`, whose command line is read from standard input
    #[command(hide = true)]
    Stay,
    /// Run a command in a running guest
    Exec(exec::Arguments),
    /// Copy files between a running guest and the host
    Cp(cp::Arguments),
    /// List guests
    Ps(guests::ps::Arguments),
    /// Print the output of a detached guest
    Logs(guests::logs::Arguments),
    /// Wait until a guest ends, and exit with its status
    Wait(guests::wait::Arguments),
    /// Stop guests
    Stop(guests::stop::Arguments),
    /// Kill guests, or send them a signal
    Kill(guests::kill::Arguments),
    /// Remove guests that have ended
    Rm(guests::rm::Arguments),
    /// Print details of guests as JSON
    Inspect(guests::inspect::Arguments),
    /// Print the memory and processor time that guests use
    Stats(guests::stats::Arguments),
    /// Manage converted container images
    Image(images::Arguments),
    /// Manage volumes
    Volume(volume::Arguments),
    /// Check whether this host can run microVMs, and what would improve it
    Doctor(doctor::Arguments),
}

/// Exit status of an invalid request.
const STATUS_BAD_REQUEST: u8 = 2;
/// Exit status if kindling or the host failed.
const STATUS_FAILURE: u8 = 125;

/// The exit status of a command that ended with an error; `is_user_error` is true if the request is at fault.
const fn status(is_user_error: bool) -> u8 {
    if is_user_error { STATUS_BAD_REQUEST } else { STATUS_FAILURE }
}

/// Executes the command. Returns the exit status.
#[cfg_attr(test, expect(dead_code, reason = "tests have an entry of their own"))]
fn run() -> u8 {
    let started = Instant::now();
    if trusted_path::is_set_user_id() {
        print_stderr(&format!("kindling: {}\n", trusted_path::SET_USER_ID));
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

/// Parses a command line. Exits for invalid arguments, `--help` and `--version`.
fn command(line: Vec<OsString>) -> Command {
    fast_args::parse(line.iter().cloned()).unwrap_or_else(|| Arguments::parse_from(line).command)
}

/// The bytes of an argument.
fn bytes(text: impl AsRef<OsStr>) -> Vec<u8> {
    text.as_ref().as_bytes().to_vec()
}

/// Prints an error with its causes on one line.
fn print_error(error: &dyn Error) {
    let line = with_causes(error);
    // Parts of the message may come from files of other authors, and must not control the terminal.
    print_stderr(&format!("kindling: {}\n", report::printable(&line)));
}

/// Prints an error of a machine, with a remedy if KVM is at fault.
fn print_machine_error(error: &kindling::vmm::Error) {
    print_message(&with_causes(error), matches!(error, kindling::vmm::Error::Kvm(_)));
}

/// Prints an error of the start of a guest, with a remedy if KVM is at fault.
fn print_launch_error(error: &kindling::launch::LaunchError) {
    use kindling::launch::LaunchError;
    match error {
        LaunchError::Machine(error) => print_machine_error(error),
        LaunchError::Monitor(failure) => print_message(&failure.message, failure.is_kvm_error),
        error => print_error(error),
    }
}

/// Prints a message, with a remedy if KVM is at fault.
fn print_message(line: &str, is_kvm: bool) {
    let hint = if is_kvm {
        "; `kindling doctor` shows what this host lacks, and `cargo xtask run`, in the source of Kindling, boots a guest \
         on an emulated machine"
    } else {
        ""
    };
    print_stderr(&format!("kindling: {}{hint}\n", report::printable(line)));
}

/// Writes to standard output. Returns the exit status. A closed pipe is not an error.
fn print(bytes: &[u8]) -> u8 {
    match std::io::stdout().write_all(bytes) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            print_error(&error);
            STATUS_FAILURE
        }
        _ => 0,
    }
}

/// Writes to standard error. Errors are ignored.
fn print_stderr(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}
