//! `kindling-fs`: serves one folder of the host to one guest, which asks in FUSE's words through the socket that is this
//! program's standard input. The folder, already open, is its standard output. It ends when the socket does.

mod attributes;
mod folder;
mod inodes;
mod ranges;
mod sandbox;
mod seen;
mod serve;
mod waiting;

use folder::Folder;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;

/// What this program was asked for.
#[derive(Debug, PartialEq, Eq)]
struct Arguments {
    is_read_only: bool,
    /// User and group whose files those of this program's user and group are in the guest.
    owner: (u32, u32),
}

/// Why a folder is not served.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(
        "usage: kindling-fs [--read-only] --owner UID:GID, with a socket as standard input and the folder as standard output"
    )]
    Usage,
    #[error("cannot share the folder that is standard output")]
    Folder(#[source] io::Error),
    #[error("{}", trusted_path::SET_USER_ID)]
    SetUserId,
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    #[error("cannot go on")]
    Serve(#[source] io::Error),
}

impl Arguments {
    fn parse(mut arguments: impl Iterator<Item = OsString>) -> Option<Self> {
        let (mut is_read_only, mut owner) = (false, None);
        while let Some(argument) = arguments.next() {
            match argument.to_str()? {
                "--read-only" => is_read_only = true,
                "--owner" => {
                    let pair = arguments.next()?;
                    let (user, group) = pair.to_str()?.split_once(':')?;
                    owner = Some((user.parse().ok()?, group.parse().ok()?));
                }
                _ => return None,
            }
        }
        Some(Self { is_read_only, owner: owner? })
    }
}

fn run() -> Result<(), Error> {
    if trusted_path::is_set_user_id() {
        return Err(Error::SetUserId);
    }
    let arguments = Arguments::parse(std::env::args_os().skip(1)).ok_or(Error::Usage)?;
    // A file, whose calls are those that remain.
    let socket = File::from(rustix::stdio::stdin().try_clone_to_owned().map_err(Error::Serve)?);
    let folder = rustix::stdio::stdout().try_clone_to_owned();
    let folder = folder.and_then(|folder| Folder::new(folder, arguments.is_read_only, arguments.owner));
    let folder = folder.map_err(Error::Folder)?;
    // What takes calls that do not remain.
    let mut reply = serve::Reply::new().map_err(Error::Serve)?;
    sandbox::enter(folder.root().as_fd(), arguments.is_read_only)?;
    match serve::serve(&socket, folder, &mut reply) {
        // The other end is gone, whatever it had asked for.
        Err(error) if [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset].contains(&error.kind()) => {
            Ok(())
        }
        result => result.map_err(Error::Serve),
    }
}

fn main() -> ExitCode {
    let Err(error) = run() else { return ExitCode::SUCCESS };
    let mut line = format!("kindling-fs: {error}");
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        line += &format!(": {cause}");
        source = cause.source();
    }
    let _ = writeln!(io::stderr(), "{line}");
    ExitCode::FAILURE
}
