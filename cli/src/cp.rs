//! `kindling cp`: copies files between a running guest and the host, by the rules of `docker cp`.

use crate::command_line::{Argument, Command, Opt, Store, flag, one};
use crate::signals::{self, Signals};
use crate::{STATUS_BAD_REQUEST, bytes, print_error};
use kindling::attach::StopCause;
use kindling::copy::{CopyError, CopyOptions};
use kindling::guest::Guest;
use std::ffi::{OsStr, OsString};
use std::io;
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    archive: bool,
    follow_link: bool,
    source: OsString,
    destination: OsString,
}

pub(crate) const COMMAND: Command<Arguments> =
    Command::new("cp", "Copy files between a running guest and the host", run)
        .options(OPTIONS)
        .arguments(ARGUMENTS);

#[rustfmt::skip]
const OPTIONS: &[Opt<Arguments>] = &[
    flag("a", "archive", |all| all.archive = true,
        "Preserve user and group IDs; otherwise root owns copies in a guest, and the caller owns copies on \
         the host"),
    flag("L", "follow-link", |all| all.follow_link = true,
        "Follow SOURCE if it is a symbolic link"),
];

#[rustfmt::skip]
const ARGUMENTS: &[Argument<Arguments>] = &[
    one("SOURCE", |all, word| all.source.store(word),
        "File or directory, or NAME:PATH of a guest; DIR/. is the content of a directory"),
    one("DESTINATION", |all, word| all.destination.store(word),
        "Existing directory or new path, or NAME:PATH of a guest"),
];

/// Exit status of a copy that failed.
const STATUS_FAILED: u8 = 1;

#[derive(Debug, thiserror::Error)]
enum CpError {
    #[error("either SOURCE or DESTINATION must be NAME:PATH, a path in a guest")]
    NotOneGuest,
    #[error("- is not a path; a tar stream cannot be copied")]
    TarStream,
    #[error("{0:?} has no path")]
    Empty(OsString),
    #[error(transparent)]
    Copy(#[from] CopyError),
}

impl CpError {
    fn status(&self) -> u8 {
        match self {
            Self::NotOneGuest | Self::TarStream | Self::Empty(_) => STATUS_BAD_REQUEST,
            Self::Copy(CopyError::Guest(error)) => crate::status(error.is_user_error()),
            Self::Copy(error) if error.is_user_error() => STATUS_BAD_REQUEST,
            Self::Copy(_) => STATUS_FAILED,
        }
    }
}

/// Copies files. Returns the exit status.
fn run(arguments: &Arguments, _: kindling::timeline::Instant) -> u8 {
    let interruption = match Interruption::watch() {
        Ok(interruption) => interruption,
        Err(error) => {
            print_error(&CopyError::Host(error));
            return STATUS_FAILED;
        }
    };
    let result = execute(arguments, &interruption);
    match (interruption.signal(), result) {
        (0, Ok(skipped)) => {
            skipped.iter().for_each(|note| print_error(note));
            0
        }
        (0, Err(error)) => {
            print_error(&error);
            error.status()
        }
        (signal, _) => 128_u8.saturating_add(signal),
    }
}

fn execute(arguments: &Arguments, interruption: &Interruption) -> Result<Option<CopyError>, CpError> {
    let options = CopyOptions { keeps_owners: arguments.archive, follows_link: arguments.follow_link };
    let (source, destination) = (Location::of(&arguments.source)?, Location::of(&arguments.destination)?);
    let guest = |name: &str| Guest::open_responsive(name).map_err(CopyError::from);
    let started = |stream: &UnixStream| interruption.shuts_down(stream);
    match (&source, &destination) {
        (Location::Guest(name, path), Location::Host(to)) => {
            Ok(guest(name)?.copy_out_with(path, to, options, started)?)
        }
        (Location::Host(path), Location::Guest(name, to)) => {
            Ok(guest(name)?.copy_in_with(path, to, options, started)?)
        }
        _ => Err(CpError::NotOneGuest),
    }
}

/// A path of the host, or of a guest.
#[derive(Debug, PartialEq, Eq)]
enum Location {
    Host(Vec<u8>),
    Guest(String, Vec<u8>),
}

impl Location {
    /// Parses an argument. One with a colon is a path of a guest, unless it starts with `.` or `/`, or has a slash before
    /// the colon.
    fn of(word: &OsString) -> Result<Self, CpError> {
        if word == "-" {
            return Err(CpError::TarStream);
        }
        let word = bytes(word);
        let empty = || CpError::Empty(OsStr::from_bytes(&word).to_owned());
        if word.is_empty() {
            return Err(empty());
        }
        let colon = word.iter().position(|&byte| matches!(byte, b':' | b'/')).filter(|&at| word[at] == b':');
        match colon {
            Some(at) if at > 0 && !word.starts_with(b".") => {
                let path = &word[at + 1..];
                if path.is_empty() {
                    return Err(empty());
                }
                let name = String::from_utf8_lossy(&word[..at]).into_owned();
                Ok(Self::Guest(name, path_in_guest(path)))
            }
            _ => Ok(Self::Host(word)),
        }
    }
}

/// Normalizes a path of a guest: absolute, without `.` and `..`. An end of `/` or `/.` is kept, because it is significant
/// to the rules of `docker cp`.
fn path_in_guest(path: &[u8]) -> Vec<u8> {
    let mut names: Vec<&[u8]> = Vec::new();
    for name in path.split(|&byte| byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => drop(names.pop()),
            name => names.push(name),
        }
    }
    let end: &[u8] = match path {
        b"." | [.., b'/', b'.'] => b"/.",
        [.., b'/'] if !names.is_empty() => b"/",
        _ => b"",
    };
    [b"/", &names.join(&b'/')[..], end].concat()
}

/// Termination signals of a copy: the first shuts the connection down, and both ends then remove partial files.
#[derive(Debug)]
struct Interruption {
    /// Number of the last signal; 0 without one.
    received: Arc<AtomicU8>,
    stream: Arc<OnceLock<UnixStream>>,
}

impl Interruption {
    /// Blocks and watches the signals. Must be called before other threads are started.
    fn watch() -> io::Result<Self> {
        let (received, stream) = (Arc::<AtomicU8>::default(), Arc::<OnceLock<UnixStream>>::default());
        let mut signals = Signals::block(false)?;
        let this = Self { received: Arc::clone(&received), stream: Arc::clone(&stream) };
        thread::Builder::new().spawn(move || {
            loop {
                let signal = signals.wait_for_end();
                match (received.swap(signal, Ordering::AcqRel), stream.get()) {
                    (0, Some(stream)) => drop(stream.shutdown(Shutdown::Both)),
                    // There is no connection yet, or this is the second signal.
                    _ => signals::exit(StopCause::Signal(signal)),
                }
            }
        })?;
        Ok(this)
    }

    fn signal(&self) -> u8 {
        self.received.load(Ordering::Acquire)
    }

    /// Sets the connection that a signal shuts down.
    fn shuts_down(&self, stream: &UnixStream) -> Result<(), io::Error> {
        let _ = self.stream.set(stream.try_clone()?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_separates_guest_and_path() {
        let guest = |name: &str, path: &[u8]| Location::Guest(name.to_owned(), path.to_vec());
        let host = |path: &str| Location::Host(path.as_bytes().to_vec());
        for (word, location) in [
            ("a:b", guest("a", b"/b")),
            ("a:/b:c", guest("a", b"/b:c")),
            ("./a:b", host("./a:b")),
            ("/a:b", host("/a:b")),
            ("a/b:c", host("a/b:c")),
            (":b", host(":b")),
            ("a", host("a")),
        ] {
            assert_eq!(Location::of(&word.into()).unwrap(), location, "{word}");
        }
        for word in ["", "a:", "-"] {
            assert_eq!(Location::of(&word.into()).unwrap_err().status(), STATUS_BAD_REQUEST, "{word}");
        }
    }

    #[test]
    fn paths_of_guests_are_absolute() {
        for (path, expected) in [
            ("a/b", "/a/b"),
            ("/a//b/", "/a/b/"),
            ("/a/../../b/.", "/b/."),
            ("/", "/"),
            ("..", "/"),
            (".", "//."),
            ("a/./b", "/a/b"),
        ] {
            assert_eq!(path_in_guest(path.as_bytes()), expected.as_bytes(), "{path}");
        }
    }
}
