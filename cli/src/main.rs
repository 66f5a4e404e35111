//! The command `kindling`: runs container images and boots kernels in microVMs, and manages guests and volumes.
//!
//! Exit status: that of the guest, 2 for an invalid request, 125 if kindling or the host failed, and those of
//! [`kindling::foreground::ExitReason::status`] for a guest that failed.
#![cfg_attr(not(test), no_main)]

mod boot;
mod command_line;
mod cp;
mod devices;
mod doctor;
mod exec;
mod guests;
mod images;
mod preboot;
mod process;
mod report;
mod run;
mod signals;
#[cfg(not(test))]
mod start;
mod template;
mod terminal;
mod text;
mod volume;

use command_line::{Entry, Group, Stop};
use kindling::launch::LaunchError;
use kindling::timeline::Instant;
use kindling::with_causes;
use std::error::Error;
use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;

const COMMANDS: Group = Group {
    name: "",
    about: "Run container images and Linux kernels in microVMs",
    commands: &[
        &run::COMMAND,
        &exec::COMMAND,
        &cp::COMMAND,
        &guests::ps::COMMAND,
        &guests::port::COMMAND,
        &guests::logs::COMMAND,
        &guests::wait::COMMAND,
        &guests::stop::COMMAND,
        &guests::kill::COMMAND,
        &guests::pause::PAUSE,
        &guests::pause::RESUME,
        &guests::snapshot::SNAPSHOT,
        &guests::snapshot::SUSPEND,
        &run::restore::COMMAND,
        &guests::rm::COMMAND,
        &guests::inspect::COMMAND,
        &guests::stats::COMMAND,
        &images::COMMAND,
        &volume::COMMANDS,
        &template::COMMANDS,
        &boot::COMMAND,
        &preboot::COMMAND,
        &doctor::COMMAND,
        &run::STAY,
    ],
};

/// Exit status of an invalid request.
const STATUS_BAD_REQUEST: u8 = 2;
/// Exit status if kindling or the host failed.
const STATUS_FAILURE: u8 = 125;

/// The exit status of a command that ended with an error; `is_user_error` is true if the request is at fault.
const fn status(is_user_error: bool) -> u8 {
    if is_user_error { STATUS_BAD_REQUEST } else { STATUS_FAILURE }
}

/// Prints the result of a command that manages templates or volumes. Returns the exit status.
fn finish<E: Error>(result: Result<String, E>, is_user_error: fn(&E) -> bool) -> u8 {
    match result {
        Ok(text) => print(text.as_bytes()),
        Err(error) => {
            print_error(&error);
            status(is_user_error(&error))
        }
    }
}

/// Executes the command. Returns the exit status.
#[cfg_attr(test, expect(dead_code, reason = "tests have another entry point"))]
fn run() -> u8 {
    let started = Instant::now();
    if trusted_path::is_set_user_id() {
        print_stderr(&format!("kindling: {}\n", trusted_path::SET_USER_ID));
        return STATUS_BAD_REQUEST;
    }
    match COMMANDS.execute(std::env::args_os().skip(1).collect(), started) {
        Ok(status) => status,
        Err(Stop::Help(text)) => print(text.as_bytes()),
        Err(Stop::NoCommand(text)) => {
            print_stderr(&text);
            STATUS_BAD_REQUEST
        }
        Err(error) => {
            print_error(&error);
            STATUS_BAD_REQUEST
        }
    }
}

/// The bytes of an argument.
fn bytes(text: impl AsRef<OsStr>) -> Vec<u8> {
    text.as_ref().as_bytes().to_vec()
}

/// Prints an error with its causes on one line.
fn print_error(error: &dyn Error) {
    print_message(&with_causes(error));
}

/// Prints an error of the start of a guest, with a remedy if KVM is at fault.
fn print_launch_error(error: &LaunchError) {
    let hint = if error.is_kvm_error() {
        "; `kindling doctor` shows what this host lacks, and `cargo xtask run`, in the source of Kindling, boots a guest \
         on an emulated machine"
    } else {
        ""
    };
    print_message(&(with_causes(error) + hint));
}

/// Prints a message of one line.
fn print_message(line: &str) {
    // Parts of the message may come from guests and files of other authors, and must not control the terminal.
    print_stderr(&format!("kindling: {}\n", report::printable(line)));
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The help texts of a group's commands, and of the groups in it.
    fn helps(group: &Group) -> Vec<(&'static str, String)> {
        let help = |command: &&'static dyn Entry| {
            let Err(Stop::Help(text)) = command.execute(vec!["--help".into()], Instant::now()) else {
                panic!("{} has no help", command.name())
            };
            (command.name(), text)
        };
        group.commands.iter().map(help).collect()
    }

    #[test]
    fn each_option_of_a_command_is_there_once_with_a_help_text() {
        let all = [helps(&COMMANDS), helps(&volume::COMMANDS), helps(&template::COMMANDS)].concat();
        assert_eq!(all.len(), 31);
        for (name, text) in all {
            let options = text.lines().map(str::trim_start).filter(|line| line.starts_with('-'));
            let names = options.filter_map(|line| line.split("  ").next());
            let words = names.flat_map(|name| name.split([' ', ',']));
            let mut names: Vec<_> = words.filter(|word| word.starts_with('-')).collect();
            let count = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), count, "{name}: {text}");
            assert!(text.lines().all(|line| line.chars().count() <= text::WIDTH), "{name}: {text}");
            assert_eq!(text.lines().next().unwrap_or_default().is_empty(), name == "stay", "{text}");
        }
    }
}
