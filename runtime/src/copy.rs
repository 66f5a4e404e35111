//! Copies of files and directories into and out of a running guest, by the rules of `docker cp`.

use crate::guest::{Guest, GuestError};
use guest_copy::{Destination, Failure, FailureKind, Sender, Source};
use kindling_vmm::agent::{ANSWER_TIMEOUT, AgentError, Process, ProcessEvent, Role};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::umask;
use std::ffi::OsStr;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Time after which a copy fails if the guest neither sends nor takes a byte. It may be writing to a slow disk.
const STREAM_TIMEOUT: Duration = Duration::from_secs(120);

/// Exit status of a process that SIGKILL ended.
const KILLED: u8 = 128 + 9;

/// An error of a copy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// The guest does not exist or does not run.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The guest's agent cannot be reached.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// Reading or writing on the host failed.
    #[error(transparent)]
    Here(Failure),
    /// Reading or writing in the guest failed.
    #[error("in the guest {name}: {failure}")]
    There {
        /// Name of the guest.
        name: String,
        /// The failed operation and its path.
        failure: Failure,
    },
    /// The process that copies in the guest failed without a message.
    #[error(
        "copying in the guest {name} failed with status {status} and without a message{}",
        if *.status == KILLED { ": it was killed; the guest has ended, or is out of memory" } else { "" }
    )]
    Wordless {
        /// Name of the guest.
        name: String,
        /// Exit status of the process.
        status: u8,
    },
    /// The host could not duplicate a descriptor, or install a signal handler.
    #[error("the host refused a descriptor")]
    Host(#[from] io::Error),
}

impl CopyError {
    /// Returns whether the request is at fault, rather than the host or the guest.
    #[must_use]
    pub const fn is_user_error(&self) -> bool {
        match self {
            Self::Agent(AgentError::Connect { .. } | AgentError::Refused { .. }) => true,
            Self::Guest(error) => error.is_user_error(),
            _ => false,
        }
    }
}

/// Options of a copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyOptions {
    /// Preserve user and group IDs. Otherwise root owns the copies in a guest, and the caller owns copies on the host.
    pub keeps_owners: bool,
    /// Follow the source if it is a symbolic link.
    pub follows_link: bool,
}

impl Guest {
    /// Copies a file or directory out of the guest, by the rules of `docker cp`. Returns the error of the first file that
    /// was skipped, if any was.
    ///
    /// # Errors
    /// When the source cannot be read, the destination cannot be written, the guest ends, or it neither sends nor takes
    /// data for two minutes, as a paused one.
    pub fn copy_out(
        &self,
        from: impl AsRef<OsStr>,
        to: impl AsRef<OsStr>,
    ) -> Result<Option<CopyError>, CopyError> {
        let (from, to) = (from.as_ref().as_bytes(), to.as_ref().as_bytes());
        self.copy_out_with(from, to, CopyOptions::default(), |_| Ok(()))
    }

    /// Copies a file or directory into the guest, by the rules of `docker cp`. Returns the error of the first file that was
    /// skipped, if any was.
    ///
    /// # Errors
    /// Those of [`Self::copy_out`].
    pub fn copy_in(
        &self,
        from: impl AsRef<OsStr>,
        to: impl AsRef<OsStr>,
    ) -> Result<Option<CopyError>, CopyError> {
        let (from, to) = (from.as_ref().as_bytes(), to.as_ref().as_bytes());
        self.copy_in_with(from, to, CopyOptions::default(), |_| Ok(()))
    }

    /// Copies a file or directory out of the guest, with options. Paths are bytes, because those of a guest need not be
    /// UTF-8. `started` receives the connection that carries the data: shutting it down ends the copy, and partial files
    /// are removed. Returns the error of the first file that was skipped, if any was.
    ///
    /// # Errors
    /// Those of [`Self::copy_out`], and that of `started`.
    pub fn copy_out_with(
        &self,
        path: &[u8],
        to: &[u8],
        options: CopyOptions,
        started: impl FnOnce(&UnixStream) -> io::Result<()>,
    ) -> Result<Option<CopyError>, CopyError> {
        let process = Process::copy_out(&self.socket(), crate::token(), path, options.follows_link)?;
        let stream = process.address().connect(Role::Output)?;
        stream.set_read_timeout(Some(STREAM_TIMEOUT))?;
        started(&stream)?;
        receive(options, &self.name, path, to, process, &stream)
    }

    /// Copies a file or directory into the guest, with options, as [`Self::copy_out_with`] does in the other direction.
    ///
    /// # Errors
    /// Those of [`Self::copy_out_with`].
    pub fn copy_in_with(
        &self,
        path: &[u8],
        to: &[u8],
        options: CopyOptions,
        started: impl FnOnce(&UnixStream) -> io::Result<()>,
    ) -> Result<Option<CopyError>, CopyError> {
        let process = Process::copy_in(&self.socket(), crate::token(), to, options.keeps_owners)?;
        let stream = process.address().connect(Role::Input)?;
        stream.set_write_timeout(Some(STREAM_TIMEOUT))?;
        started(&stream)?;
        send(options, &self.name, path, process, &stream)
    }
}

fn receive(
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
        Ok(()) => result_of(name, process),
        Err(failure) if is_timeout(&failure) => Err(process.address().silent().into()),
        // The guest may have reported the cause.
        Err(failure) if matches!(failure.kind, FailureKind::Truncated | FailureKind::Receive) => {
            result_of(name, process).and(Err(CopyError::Here(failure)))
        }
        Err(failure) => Err(CopyError::Here(failure)),
    }
}

fn send(
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
        Ok(skipped) => Ok(result_of(name, process)?.or(skipped.map(CopyError::Here))),
        Err(failure) if is_timeout(&failure) => Err(process.address().silent().into()),
        Err(failure) if failure.kind == FailureKind::Send => {
            result_of(name, process).and(Err(CopyError::Here(failure)))
        }
        Err(failure) => {
            // The process removes partial files before it ends.
            while !matches!(process.wait_for_event(), Err(_) | Ok(ProcessEvent::Exited { .. })) {}
            Err(CopyError::Here(failure))
        }
    }
}

/// Whether the stream's time limit has passed, which a socket reports as EAGAIN.
fn is_timeout(failure: &Failure) -> bool {
    matches!(failure.kind, FailureKind::Send | FailureKind::Receive) && failure.error == Some(Errno::AGAIN)
}

/// The mode bits that a copy of a guest's file may have on the host: those that the umask leaves to a new file, without
/// set-user-ID and set-group-ID, with which other users could run a program of the guest with the caller's rights.
fn mode_bits() -> u16 {
    const PERMISSIONS: u16 = 0o777;
    // umask(2) returns the mask only when it sets one. No file is created in between.
    let mask = umask(Mode::RWXG | Mode::RWXO);
    umask(mask);
    PERMISSIONS & !u16::try_from(mask.as_raw_mode()).unwrap_or(PERMISSIONS)
}

/// Waits for the copying process in the guest. Returns the first file that it skipped.
fn result_of(name: &str, mut process: Process) -> Result<Option<CopyError>, CopyError> {
    let mut report = Vec::new();
    let status = loop {
        match process.wait_for_event()? {
            ProcessEvent::Exited { status, .. } => break status,
            ProcessEvent::HasOutput(Role::Error) => {
                let error = process.address().connect(Role::Error)?;
                error.set_read_timeout(Some(ANSWER_TIMEOUT))?;
                // An incomplete report is not a valid `Failure`, so that an error of the read needs no handling.
                let _ = error.take(Failure::MAX_LEN as u64 + 1).read_to_end(&mut report);
            }
            ProcessEvent::HasOutput(_) | ProcessEvent::Started => {}
        }
    };
    let name = name.to_owned();
    match (status, Failure::from_bytes(&report)) {
        (0, None) => Ok(None),
        (0, Some(failure)) => Ok(Some(CopyError::There { name, failure })),
        (_, Some(failure)) => Err(CopyError::There { name, failure }),
        (status, None) => Err(CopyError::Wordless { name, status }),
    }
}

/// The name of the copy of a path; `.` for the content of a directory.
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
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    /// An agent that accepts all connections, and neither sends nor takes anything afterwards.
    fn silent_agent(socket: &Path) {
        let listener = UnixListener::bind(socket).unwrap();
        std::thread::spawn(move || {
            let mut connections = Vec::new();
            for mut connection in listener.incoming().flatten() {
                connection.write_all(b"OK 1\n").unwrap();
                connections.push(connection);
            }
        });
    }

    #[test]
    fn a_copy_ends_if_the_guest_neither_sends_nor_takes_data() {
        const LIMIT: Option<Duration> = Some(Duration::from_millis(20));
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("vsock");
        silent_agent(&socket);
        let options = CopyOptions::default();
        let copy = folder.path().join("copy");
        let file = folder.path().join("file");
        // More than fits into the buffers of a socket.
        std::fs::write(&file, vec![1; 4 << 20]).unwrap();

        let process = Process::copy_out(&socket, 1, b"/file", false).unwrap();
        let stream = process.address().connect(Role::Output).unwrap();
        stream.set_read_timeout(LIMIT).unwrap();
        let result = receive(options, "g", b"/file", copy.as_os_str().as_bytes(), process, &stream);
        assert!(matches!(result, Err(CopyError::Agent(AgentError::Silent { .. }))), "{result:?}");

        let process = Process::copy_in(&socket, 2, b"/file", false).unwrap();
        let stream = process.address().connect(Role::Input).unwrap();
        stream.set_write_timeout(LIMIT).unwrap();
        let result = send(options, "g", file.as_os_str().as_bytes(), process, &stream);
        assert!(matches!(result, Err(CopyError::Agent(AgentError::Silent { .. }))), "{result:?}");
    }

    #[test]
    fn the_name_of_a_copy_is_the_last_component() {
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
