//! The process of a monitor: a child of this one, or a spare monitor that another process has started.

use crate::poll::wait_readable;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

/// Timeout for a monitor to exit after its socket was closed.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// The process of a monitor.
#[derive(Debug)]
pub(super) enum Process {
    /// A child.
    Child(Child),
    /// A spare, by its process descriptor; its standard error, and its ID.
    Spare(OwnedFd, PipeReader, Pid),
}

/// The end of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// With this status.
    Exited(ExitStatus),
    /// With a status that only its parent gets.
    Unknown,
}

impl Process {
    /// The process at the other end of a socket.
    pub(super) fn of_peer(socket: &UnixStream, stderr: PipeReader) -> io::Result<Self> {
        let id = socket_peercred(socket)?.pid;
        Ok(Self::Spare(pidfd_open(id, PidfdFlags::empty())?, stderr, id))
    }

    pub(super) fn id(&self) -> Pid {
        match self {
            Self::Child(child) => Pid::from_child(child),
            Self::Spare(_, _, id) => *id,
        }
    }

    /// Waits for the process to exit, and kills it after a timeout: the guest may have taken it over. Returns the end of a
    /// process that was not killed here.
    pub(super) fn wait_or_kill(&mut self) -> Option<End> {
        let opened;
        let descriptor = match self {
            Self::Child(child) => {
                opened = pidfd_open(Pid::from_child(child), PidfdFlags::empty());
                opened.as_ref().ok()
            }
            Self::Spare(descriptor, ..) => Some(&*descriptor),
        };
        let until = Instant::now() + STOP_TIMEOUT;
        let has_ended = descriptor.is_none_or(|fd| wait_readable(fd.as_fd(), Some(until)).unwrap_or(true));
        if !has_ended {
            self.kill();
        }
        let end = match self {
            Self::Child(child) => child.wait().ok().map(End::Exited),
            Self::Spare(..) => Some(End::Unknown),
        };
        end.filter(|_| has_ended)
    }

    fn kill(&mut self) {
        // Both fail only for a process that has ended.
        let _ = match self {
            Self::Child(child) => child.kill(),
            Self::Spare(descriptor, ..) => {
                pidfd_send_signal(&*descriptor, Signal::KILL).map_err(io::Error::from)
            }
        };
    }

    /// Waits for the process without a limit.
    pub(super) fn wait(self) {
        let _ = match self {
            Self::Child(mut child) => child.wait().map(drop),
            Self::Spare(descriptor, ..) => {
                wait_readable(descriptor.as_fd(), None).map(drop).map_err(io::Error::from)
            }
        };
    }

    /// The last line that the process, which has ended, wrote on its standard error, without control characters.
    pub(super) fn last_stderr_line(&mut self) -> Option<String> {
        match self {
            Self::Child(child) => last_line(child.stderr.take()?),
            Self::Spare(_, stderr, _) => last_line(stderr.try_clone().ok()?),
        }
    }
}

fn last_line(stderr: impl Read + AsFd) -> Option<String> {
    /// Maximum length in bytes: the guest may have taken the monitor over.
    const LINE_MAX: u64 = 4096;
    // A process that the monitor started would keep the pipe open.
    rustix::io::ioctl_fionbio(&stderr, true).ok()?;
    let mut bytes = Vec::new();
    // At the end of the pipe, or if it would block, what is there counts.
    let _ = stderr.take(LINE_MAX).read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().last()?.trim();
    (!line.is_empty()).then(|| line.chars().filter(|c| !c.is_control()).collect())
}
