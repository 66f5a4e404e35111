//! `kindling-fs`: serves one folder of the host to one guest over the FUSE protocol. Standard input is a socket with
//! the requests and replies; standard output is a descriptor of the folder. The program ends when the socket is closed.

mod attributes;
mod cached_version;
mod folder;
mod inodes;
mod pending_locks;
mod ranges;
mod sandbox;
mod serve;

use folder::Folder;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;

/// The command line arguments.
#[derive(Debug, PartialEq, Eq)]
struct Arguments {
    is_read_only: bool,
    /// The user and group in the guest that own the files of this process's user and group.
    owner: (u32, u32),
}

/// Why the folder cannot be served.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(
        "usage: kindling-fs [--read-only] --owner UID:GID, with a socket as standard input and the folder as standard output"
    )]
    Usage,
    #[error("cannot open the folder on standard output")]
    Folder(#[source] io::Error),
    #[error("{}", trusted_path::SET_USER_ID)]
    SetUserId,
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    #[error("cannot serve the folder")]
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
    // A `File`, since the seccomp filter allows read and write, but not recv and send.
    let socket = File::from(rustix::stdio::stdin().try_clone_to_owned().map_err(Error::Serve)?);
    let folder = rustix::stdio::stdout().try_clone_to_owned();
    let folder = folder.and_then(|folder| Folder::new(folder, arguments.is_read_only, arguments.owner));
    let folder = folder.map_err(Error::Folder)?;
    // Creates a memfd, which the seccomp filter does not allow.
    let mut reply = serve::Reply::new().map_err(Error::Serve)?;
    sandbox::enter(folder.root().as_fd(), arguments.is_read_only)?;
    match serve::serve(&socket, folder, &mut reply) {
        // The socket was closed before the last reply.
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
