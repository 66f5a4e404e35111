//! `kindling cp`: files into a guest that runs, or from there, by the rules of `docker cp`.

use crate::run::StopCause;
use crate::run::signals::{self, Signals};
use crate::{STATUS_BAD_REQUEST, bytes, complain};
use clap::Args;
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

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Keep users and groups, by their numbers; else things are root's in a guest, and the caller's here
    #[arg(long, short = 'a')]
    archive: bool,
    /// Copy what SOURCE leads to where it is a link
    #[arg(long, short = 'L')]
    follow_link: bool,
    /// File or directory, of a guest as NAME:PATH; DIR/. is what is in a directory
    source: OsString,
    /// Where it goes, in a guest as NAME:PATH: into a directory that is there, or to a new name
    destination: OsString,
}

/// The exit status of a copy that failed.
const STATUS_FAILED: u8 = 1;

#[derive(Debug, thiserror::Error)]
enum CpError {
    #[error("either SOURCE or DESTINATION is NAME:PATH, of a guest and a path in it")]
    NotOne,
    #[error("a tar stream cannot be copied: - is no file")]
    Stream,
    #[error("{0:?} names no path")]
    Empty(OsString),
    #[error(transparent)]
    Copy(#[from] CopyError),
}

impl CpError {
    fn status(&self) -> u8 {
        match self {
            Self::NotOne | Self::Stream | Self::Empty(_) => STATUS_BAD_REQUEST,
            Self::Copy(CopyError::Guest(error)) => crate::status(error.is_users()),
            Self::Copy(error) if error.is_users() => STATUS_BAD_REQUEST,
            Self::Copy(_) => STATUS_FAILED,
        }
    }
}

/// Copies; the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    let interruption = match Interruption::watch() {
        Ok(interruption) => interruption,
        Err(error) => {
            complain(&CopyError::Host(error));
            return STATUS_FAILED;
        }
    };
    let result = execute(arguments, &interruption);
    match (interruption.signal(), result) {
        (0, Ok(left_out)) => {
            left_out.iter().for_each(|note| complain(note));
            0
        }
        (0, Err(error)) => {
            complain(&error);
            error.status()
        }
        (signal, _) => 128_u8.saturating_add(signal),
    }
}

fn execute(arguments: &Arguments, interruption: &Interruption) -> Result<Option<CopyError>, CpError> {
    let options = CopyOptions { keeps_owners: arguments.archive, follows_link: arguments.follow_link };
    let (source, destination) = (Place::of(&arguments.source)?, Place::of(&arguments.destination)?);
    let guest = |name: &str| Guest::open_running(name).map_err(CopyError::from);
    let ends = |stream: &UnixStream| interruption.ends(stream);
    match (&source, &destination) {
        (Place::Guest(name, path), Place::Here(to)) => {
            Ok(guest(name)?.copy_out_with(path, to, options, ends)?)
        }
        (Place::Here(path), Place::Guest(name, to)) => {
            Ok(guest(name)?.copy_in_with(path, to, options, ends)?)
        }
        _ => Err(CpError::NotOne),
    }
}

/// Where something is.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Here(Vec<u8>),
    Guest(String, Vec<u8>),
}

impl Place {
    /// A path with a colon is of a guest, unless it begins like a path or has a slash before the colon.
    fn of(word: &OsString) -> Result<Self, CpError> {
        if word == "-" {
            return Err(CpError::Stream);
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
            _ => Ok(Self::Here(word)),
        }
    }
}

/// An absolute path without `.` and `..`; whether it ends in `/` or `/.` stays, because it says what is meant.
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

/// Signals that end this command: it then hangs up, and both ends take away what is half made.
#[derive(Debug)]
struct Interruption {
    by: Arc<AtomicU8>,
    stream: Arc<OnceLock<UnixStream>>,
}

impl Interruption {
    /// Before any other thread is started.
    fn watch() -> io::Result<Self> {
        let (by, stream) = (Arc::<AtomicU8>::default(), Arc::<OnceLock<UnixStream>>::default());
        let mut signals = Signals::keep(false)?;
        let this = Self { by: Arc::clone(&by), stream: Arc::clone(&stream) };
        thread::spawn(move || {
            loop {
                let signal = signals.wait_for_end();
                match (by.swap(signal, Ordering::AcqRel), stream.get()) {
                    (0, Some(stream)) => drop(stream.shutdown(Shutdown::Both)),
                    // Nothing has begun, or whoever sends it does not want to wait any more.
                    _ => signals::leave(StopCause::Signal(signal)),
                }
            }
        });
        Ok(this)
    }

    fn signal(&self) -> u8 {
        self.by.load(Ordering::Acquire)
    }

    /// Ends a process's stream, as soon as there is a signal.
    fn ends(&self, stream: &UnixStream) -> Result<(), io::Error> {
        let _ = self.stream.set(stream.try_clone()?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_makes_a_guest() {
        let guest = |name: &str, path: &[u8]| Place::Guest(name.to_owned(), path.to_vec());
        let here = |path: &str| Place::Here(path.as_bytes().to_vec());
        for (word, place) in [
            ("a:b", guest("a", b"/b")),
            ("a:/b:c", guest("a", b"/b:c")),
            ("./a:b", here("./a:b")),
            ("/a:b", here("/a:b")),
            ("a/b:c", here("a/b:c")),
            (":b", here(":b")),
            ("a", here("a")),
        ] {
            assert_eq!(Place::of(&word.into()).unwrap(), place, "{word}");
        }
        for word in ["", "a:", "-"] {
            assert_eq!(Place::of(&word.into()).unwrap_err().status(), STATUS_BAD_REQUEST, "{word}");
        }
    }

    #[test]
    fn paths_of_guests_begin_at_the_root() {
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
