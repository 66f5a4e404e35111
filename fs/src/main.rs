//! `kindling-fs`: serves one folder of the host to one guest, which asks in FUSE's words through the socket that is this
//! program's standard input. It ends when the socket does.

mod attributes;
mod folder;
mod inodes;
mod sandbox;
mod seen;
mod serve;

use folder::Folder;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

/// What this program was asked for.
#[derive(Debug, PartialEq, Eq)]
struct Arguments {
    folder: PathBuf,
    is_read_only: bool,
    /// User and group whose files those of this program's user and group are in the guest.
    owner: (u32, u32),
}

/// Why a folder is not served.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("usage: kindling-fs [--read-only] --owner UID:GID -- FOLDER, with a socket as standard input")]
    Usage,
    #[error("cannot share {}", .0.display())]
    Folder(PathBuf, #[source] io::Error),
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    #[error("cannot go on")]
    Serve(#[source] io::Error),
}

impl Arguments {
    fn parse(mut arguments: impl Iterator<Item = OsString>) -> Option<Self> {
        let (mut is_read_only, mut owner) = (false, None);
        loop {
            match arguments.next()?.to_str()? {
                "--read-only" => is_read_only = true,
                "--owner" => {
                    let pair = arguments.next()?;
                    let (user, group) = pair.to_str()?.split_once(':')?;
                    owner = Some((user.parse().ok()?, group.parse().ok()?));
                }
                "--" => break,
                _ => return None,
            }
        }
        let folder = arguments.next()?.into();
        arguments.next().is_none().then_some(Self { folder, is_read_only, owner: owner? })
    }
}

fn run() -> Result<(), Error> {
    let arguments = Arguments::parse(std::env::args_os().skip(1)).ok_or(Error::Usage)?;
    // A file, whose calls are those that remain.
    let socket = File::from(rustix::stdio::stdin().try_clone_to_owned().map_err(Error::Serve)?);
    let cannot = |error: io::Error| Error::Folder(arguments.folder.clone(), error);
    let folder = Folder::open(&arguments.folder, arguments.is_read_only, arguments.owner).map_err(cannot)?;
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
