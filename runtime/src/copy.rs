//! Copies of files and directories into a guest that runs, or from there, by the rules of `docker cp`.

use crate::guest::{Guest, GuestError};
use guest_copy::{Destination, Failure, FailureKind, Sender, Source};
use kindling_vmm::agent::{ANSWER_TIMEOUT, AgentError, Process, ProcessEvent, Role};
use rustix::fs::Mode;
use rustix::process::umask;
use std::ffi::OsStr;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Why nothing, or not all, was copied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// There is no such guest.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The guest's agent refused or is gone.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// Reading or writing on the host failed.
    #[error(transparent)]
    Here(Failure),
    /// Reading or writing in the guest failed.
    #[error("in the guest {name}: {failure}")]
    There {
        /// The guest.
        name: String,
        /// What failed.
        failure: Failure,
    },
    /// The process that copies in the guest ended.
    #[error("the copying process in the guest {name} ended with status {status} and without a word")]
    Wordless {
        /// The guest.
        name: String,
        /// Exit status of the process.
        status: u8,
    },
    /// The host refused something.
    #[error("the host refused a descriptor")]
    Host(#[from] io::Error),
}

impl CopyError {
    /// Whether asking for something else can help, rather than the host.
    #[must_use]
    pub const fn is_users(&self) -> bool {
        match self {
            Self::Agent(AgentError::Connect { .. } | AgentError::Refused { .. }) => true,
            Self::Guest(error) => error.is_users(),
            _ => false,
        }
    }
}

/// How things are copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyOptions {
    /// Keep users and groups, by their numbers; otherwise things are root's in a guest, and the caller's here.
    pub keeps_owners: bool,
    /// Copy what the source leads to where it is a symbolic link.
    pub follows_link: bool,
}

impl Guest {
    /// Copies a file or directory out of the guest, by the rules of `docker cp`; the first thing that was left out, if
    /// anything was.
    ///
    /// # Errors
    /// When something cannot be read or written.
    pub fn copy_out(
        &self,
        from: impl AsRef<OsStr>,
        to: impl AsRef<OsStr>,
    ) -> Result<Option<CopyError>, CopyError> {
        let (from, to) = (from.as_ref().as_bytes(), to.as_ref().as_bytes());
        self.copy_out_with(from, to, CopyOptions::default(), |_| Ok(()))
    }

    /// Copies a file or directory into the guest; otherwise as [`Self::copy_out`].
    ///
    /// # Errors
    /// When something cannot be read or written.
    pub fn copy_in(
        &self,
        from: impl AsRef<OsStr>,
        to: impl AsRef<OsStr>,
    ) -> Result<Option<CopyError>, CopyError> {
        let (from, to) = (from.as_ref().as_bytes(), to.as_ref().as_bytes());
        self.copy_in_with(from, to, CopyOptions::default(), |_| Ok(()))
    }

    /// Copies a file or directory out of the guest. Paths are the bytes of the guest's. `started` gets the connection over
    /// which everything comes: shutting it down ends the copy, and nothing half made stays. Returns the first thing that
    /// was left out, if anything was.
    ///
    /// # Errors
    /// When something cannot be read or written.
    pub fn copy_out_with(
        &self,
        path: &[u8],
        to: &[u8],
        options: CopyOptions,
        started: impl FnOnce(&UnixStream) -> io::Result<()>,
    ) -> Result<Option<CopyError>, CopyError> {
        let process = Process::copy_out(&self.socket(), crate::token(), path, options.follows_link)?;
        let stream = process.address().connect(Role::Output)?;
        started(&stream)?;
        fetch(options, &self.name, path, to, process, &stream)
    }

    /// Copies a file or directory into the guest; otherwise as [`Self::copy_out_with`].
    ///
    /// # Errors
    /// When something cannot be read or written.
    pub fn copy_in_with(
        &self,
        path: &[u8],
        to: &[u8],
        options: CopyOptions,
        started: impl FnOnce(&UnixStream) -> io::Result<()>,
    ) -> Result<Option<CopyError>, CopyError> {
        let process = Process::copy_in(&self.socket(), crate::token(), to, options.keeps_owners)?;
        let stream = process.address().connect(Role::Input)?;
        started(&stream)?;
        bring(options, &self.name, path, process, &stream)
    }
}

fn fetch(
    options: CopyOptions,
    name: &str,
    path: &[u8],
    to: &[u8],
    process: Process,
    output: &UnixStream,
) -> Result<Option<CopyError>, CopyError> {
    let destination = Destination {
        path: to,
        sender: Sender::Untrusted,
        name: Some(&base_name(path)),
        keeps_owners: options.keeps_owners,
        mode_bits: mode_bits(),
    };
    match guest_copy::receive(destination, output) {
        Ok(()) => verdict(name, process),
        // The guest may know why.
        Err(failure) if matches!(failure.kind, FailureKind::Truncated | FailureKind::Receive) => {
            verdict(name, process).and(Err(CopyError::Here(failure)))
        }
        Err(failure) => Err(CopyError::Here(failure)),
    }
}

fn bring(
    options: CopyOptions,
    name: &str,
    path: &[u8],
    mut process: Process,
    input: &UnixStream,
) -> Result<Option<CopyError>, CopyError> {
    let source = Source { path, name: &base_name(path), follows: options.follows_link };
    let result = guest_copy::send(source, input);
    let _ = input.shutdown(Shutdown::Write);
    match result {
        Ok(left_out) => Ok(verdict(name, process)?.or(left_out.map(CopyError::Here))),
        Err(failure) if failure.kind == FailureKind::Send => {
            verdict(name, process).and(Err(CopyError::Here(failure)))
        }
        Err(failure) => {
            // When it has ended, it has removed what was half made.
            while !matches!(process.wait_for_event(), Err(_) | Ok(ProcessEvent::Exited { .. })) {}
            Err(CopyError::Here(failure))
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
fn verdict(name: &str, mut process: Process) -> Result<Option<CopyError>, CopyError> {
    let mut words = Vec::new();
    let status = loop {
        match process.wait_for_event()? {
            ProcessEvent::Exited { status, .. } => break status,
            ProcessEvent::HasOutput(Role::Error) => {
                let error = process.address().connect(Role::Error)?;
                error.set_read_timeout(Some(ANSWER_TIMEOUT))?;
                // What breaks off is no failure that could be read.
                let _ = error.take(Failure::MAX_LEN as u64 + 1).read_to_end(&mut words);
            }
            ProcessEvent::HasOutput(_) | ProcessEvent::Started => {}
        }
    };
    let name = name.to_owned();
    match (status, Failure::from_bytes(&words)) {
        (0, None) => Ok(None),
        (0, Some(failure)) => Ok(Some(CopyError::There { name, failure })),
        (_, Some(failure)) => Err(CopyError::There { name, failure }),
        (status, None) => Err(CopyError::Wordless { name, status }),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

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
