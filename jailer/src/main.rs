//! `kindling-jailer`: starts a program, usually `kindling boot`, in a directory of its own, as a user of its own, in a cgroup
//! of its own and with limited resources. It has the command line of Firecracker's jailer, so that it can take its place.
//! What differs:
//!
//! - the program is not copied: it is executed by its descriptor, which needs no path in the directory;
//! - there is no mount namespace: chroot(2) takes the same time on a host with many mounts, and nothing leads out of it,
//!   because the program has no capability and no descriptor of a directory;
//! - this process waits for the program, and then removes what it has created.

mod arguments;
mod jail;
mod process;

use arguments::{Arguments, Invalid};
use jail::JailDirectory;
use kindling_vmm::jail::CgroupError;
use kindling_vmm::with_causes;
use rustix::fs::Mode;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// Exit status of an invalid request.
const STATUS_BAD_REQUEST: u8 = 2;
/// Exit status if the host refuses something.
const STATUS_FAILURE: u8 = 125;

/// Why the program was not started.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error(
        "kindling-jailer must be started by root; `kindling run --jail full` and `kindling boot` need no root"
    )]
    NotRoot,
    #[error("{}", trusted_path::SET_USER_ID)]
    SetUserId,
    #[error(transparent)]
    Untrusted(#[from] trusted_path::Error),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("cannot {what} {}", path.display())]
    Path { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is not what this program would create there; remove it", .0.display())]
    Unexpected(PathBuf),
    #[error("another program runs with this --id, in {}", .0.display())]
    Taken(PathBuf),
    #[error("cannot {0}")]
    Host(&'static str, #[source] io::Error),
    /// The operation that failed in the program's process, and the host's error.
    #[error("cannot {0}")]
    Program(String),
    /// The message of the process in the background.
    #[error("{0}")]
    Background(String),
}

impl Error {
    const fn status(&self) -> u8 {
        match self {
            Self::Invalid(_)
            | Self::SetUserId
            | Self::NotRoot
            | Self::Untrusted(_)
            | Self::Unexpected(_)
            | Self::Taken(_) => STATUS_BAD_REQUEST,
            _ => STATUS_FAILURE,
        }
    }
}

fn main() -> ExitCode {
    let result = match Arguments::parse(std::env::args_os().skip(1)) {
        Ok(Some(arguments)) => run(&arguments),
        Ok(None) => {
            // A closed pipe is not an error.
            let _ = io::stdout().write_all(arguments::HELP.as_bytes());
            Ok(0)
        }
        Err(error) => Err(error.into()),
    };
    ExitCode::from(result.unwrap_or_else(|error| {
        let _ = writeln!(io::stderr(), "kindling-jailer: {}", with_causes(&error));
        error.status()
    }))
}

/// Starts the program. Returns its exit status, or 0 if it runs in the background.
fn run(arguments: &Arguments) -> Result<u8, Error> {
    if trusted_path::is_set_user_id() {
        return Err(Error::SetUserId);
    }
    if !rustix::process::geteuid().is_root() {
        return Err(Error::NotRoot);
    }
    // The program's user must be able to enter the directories that are created.
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    // Whoever can change the program could do anything with the rights of root that it has for a moment.
    let program = trusted_path::file(&arguments.exec_file, trusted_path::Owners::own())?;
    let directory = JailDirectory::create(arguments)?;
    process::start(arguments, &program, directory)
}
