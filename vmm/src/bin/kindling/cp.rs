//! `kindling cp`: files into a guest that runs, or from there, by the rules of `docker cp`.

use crate::instances::{Found, InstanceError};
use crate::run::signals::{self, Signals};
use crate::{STATUS_BAD_REQUEST, bytes, complain, exec};
use clap::Args;
use guest_copy::{Destination, Failure, Sender, Source, What};
use kindling::agent::{ANSWER_TIMEOUT, AgentError, News, Process, Role};
use rustix::fs::Mode;
use rustix::process::umask;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
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
    Instance(#[from] InstanceError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error(transparent)]
    Here(Failure),
    #[error("in the guest {name}: {failure}")]
    There { name: String, failure: Failure },
    #[error("the copying process in the guest {name} ended with status {status} and without a word")]
    Wordless { name: String, status: u8 },
    #[error("the host refused a descriptor")]
    Host(#[from] io::Error),
}

impl CpError {
    const fn status(&self) -> u8 {
        match self {
            Self::NotOne | Self::Stream | Self::Empty(_) => STATUS_BAD_REQUEST,
            Self::Agent(AgentError::Connect { .. } | AgentError::Refused { .. }) => STATUS_BAD_REQUEST,
            Self::Instance(error) => error.status(),
            _ => STATUS_FAILED,
        }
    }
}

/// Copies; the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    let interruption = match Interruption::watch() {
        Ok(interruption) => interruption,
        Err(error) => {
            complain(&CpError::Host(error));
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
        // Whoever sent it knows.
        (signal, _) => 128_u8.saturating_add(signal),
    }
}

/// Copies; what was left out.
fn execute(arguments: &Arguments, interruption: &Interruption) -> Result<Option<CpError>, CpError> {
    let (source, destination) = (Place::of(&arguments.source)?, Place::of(&arguments.destination)?);
    match (&source, &destination) {
        (Place::Guest(name, path), Place::Here(to)) => {
            let guest = Found::alive(name)?;
            let process = Process::fetch(&guest.socket(), exec::token(), path, arguments.follow_link)?;
            let stream = process.place().connect(Role::Output)?;
            interruption.ends(&stream)?;
            fetch(arguments, name, path, to, process, &stream)
        }
        (Place::Here(path), Place::Guest(name, to)) => {
            let guest = Found::alive(name)?;
            let process = Process::bring(&guest.socket(), exec::token(), to, arguments.archive)?;
            let stream = process.place().connect(Role::Input)?;
            interruption.ends(&stream)?;
            bring(arguments, name, path, process, &stream)
        }
        _ => Err(CpError::NotOne),
    }
}

fn fetch(
    arguments: &Arguments,
    name: &str,
    path: &[u8],
    to: &[u8],
    process: Process,
    output: &UnixStream,
) -> Result<Option<CpError>, CpError> {
    let destination = Destination {
        path: to,
        sender: Sender::Untrusted,
        name: Some(&base_name(path)),
        keeps_owners: arguments.archive,
        mode_bits: mode_bits(),
    };
    match guest_copy::receive(destination, output) {
        Ok(()) => verdict(name, process),
        // The guest may know why.
        Err(failure) if matches!(failure.what, What::Ended | What::Receive) => {
            verdict(name, process).and(Err(CpError::Here(failure)))
        }
        Err(failure) => Err(CpError::Here(failure)),
    }
}

fn bring(
    arguments: &Arguments,
    name: &str,
    path: &[u8],
    mut process: Process,
    input: &UnixStream,
) -> Result<Option<CpError>, CpError> {
    let source = Source { path, name: &base_name(path), follows: arguments.follow_link };
    let result = guest_copy::send(source, input);
    let _ = input.shutdown(Shutdown::Write);
    match result {
        Ok(left_out) => Ok(verdict(name, process)?.or(left_out.map(CpError::Here))),
        Err(failure) if failure.what == What::Send => verdict(name, process).and(Err(CpError::Here(failure))),
        Err(failure) => {
            // When it has ended, it has removed what was half made.
            while !matches!(process.wait_for_news(), Err(_) | Ok(News::Exited { .. })) {}
            Err(CpError::Here(failure))
        }
    }
}

/// The bits that the mode of a guest's file may have here: those that the umask leaves to a new file. Set-user-ID and
/// set-group-ID would let others run a guest's program with the caller's rights.
fn mode_bits() -> u16 {
    const PERMISSIONS: u16 = 0o777;
    // The kernel tells the mask only to a caller that sets one. Nothing is created meanwhile.
    let mask = umask(Mode::RWXG | Mode::RWXO);
    umask(mask);
    PERMISSIONS & !u16::try_from(mask.as_raw_mode()).unwrap_or(PERMISSIONS)
}

/// What the guest says of a copy: what was left out, or what went wrong.
fn verdict(name: &str, mut process: Process) -> Result<Option<CpError>, CpError> {
    let mut words = Vec::new();
    let status = loop {
        match process.wait_for_news()? {
            News::Exited { status, .. } => break status,
            News::HasOutput(Role::Error) => {
                let error = process.place().connect(Role::Error)?;
                error.set_read_timeout(Some(ANSWER_TIMEOUT))?;
                // What breaks off is no failure that could be read.
                let _ = error.take(Failure::MOST_BYTES as u64 + 1).read_to_end(&mut words);
            }
            News::HasOutput(_) | News::Started => {}
        }
    };
    let name = name.to_owned();
    match (status, Failure::from_bytes(&words)) {
        (0, None) => Ok(None),
        (0, Some(failure)) => Ok(Some(CpError::There { name, failure })),
        (_, Some(failure)) => Err(CpError::There { name, failure }),
        (status, None) => Err(CpError::Wordless { name, status }),
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

/// What a copy of a path is called: `.` where what is in a directory is meant.
fn base_name(path: &[u8]) -> Vec<u8> {
    let end = path.iter().rposition(|&byte| byte != b'/').map_or(0, |at| at + 1);
    match path[..end].rsplit(|&byte| byte == b'/').next() {
        None | Some(b"" | b".") => b".".to_vec(),
        Some(b"..") => {
            let real = Path::new(OsStr::from_bytes(path)).canonicalize().unwrap_or_default();
            real.file_name().map_or_else(|| b".".to_vec(), |name| name.as_bytes().to_vec())
        }
        Some(name) => name.to_vec(),
    }
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
                    _ => signals::leave(signal),
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

    #[test]
    fn copies_have_the_last_name() {
        for (path, name) in [
            ("a/b", "b"),
            ("/a/b//", "b"),
            ("a/.", "."),
            (".", "."),
            ("/", "."),
            ("//.", "."),
            ("/usr/bin/..", "usr"),
        ] {
            assert_eq!(base_name(path.as_bytes()), name.as_bytes(), "{path}");
        }
    }
}
