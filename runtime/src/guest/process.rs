//! The processes of a guest on the host: finding, signalling and killing them.

use super::files::{is_locked, read_record};
use super::{FRONT, Guest, GuestError, MONITOR, host};
use crate::signal::END_GUEST;
use kindling_vmm::poll::wait_readable;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::process::{Flock, FlockType, PidfdFlags, fcntl_getlk, pidfd_open};
use std::time::{Duration, Instant};

/// A process of a guest on the host: its front or its monitor. The value is a pidfd, so that it refers to the same process
/// when the process ID is reused.
#[derive(Debug)]
pub struct Process {
    process: OwnedFd,
    /// Process ID, in the PID namespace of the calling process.
    pub pid: u32,
}

/// Exit status of a guest that was killed.
const STATUS_KILLED: u8 = 128 + 9;

const SIGKILL: u8 = 9;

/// Time limit for the orderly end of a front or monitor, before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

impl Guest {
    /// Returns the front of the guest, if it runs: the process that serves the guest's streams and receives its signals.
    /// `None` for a guest of a program that embeds the library.
    ///
    /// # Errors
    /// When the process has no ID in the PID namespace of the calling process, or the host cannot open it.
    pub fn front(&self) -> Result<Option<Process>, GuestError> {
        // Opening and closing the file would drop the POSIX lock of the program that owns the guest.
        if self.record.is_embedded {
            return Ok(None);
        }
        match self.holder(FRONT)? {
            // Older versions do not create the file.
            None if is_locked(&self.folder)? && !self.folder.join(FRONT).exists() => {
                Err(GuestError::Elsewhere(self.name.clone()))
            }
            front => Ok(front),
        }
    }

    /// Returns the monitor of the guest, if it runs: the process with the virtual machine.
    ///
    /// # Errors
    /// Those of [`Self::front`].
    pub fn monitor(&self) -> Result<Option<Process>, GuestError> {
        self.holder(MONITOR)
    }

    /// The process that holds the lock on a file. Its ID may be reused at any time. The process is therefore opened, and
    /// returned only if it still holds the lock then.
    fn holder(&self, file: &str) -> Result<Option<Process>, GuestError> {
        let failed = |what| move |error: Errno| host(what, &self.folder)(error.into());
        let file = match open(self.folder.join(file), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            result => result.map_err(failed("find the processes of"))?,
        };
        let holder = || {
            fcntl_getlk(&file, &Flock::from(FlockType::WriteLock)).map_err(failed("find the processes of"))
        };
        let Some(lock) = holder()? else { return Ok(None) };
        // The owner is in another PID namespace.
        let Some(pid) = lock.pid else { return Err(GuestError::Elsewhere(self.name.clone())) };
        let process = match pidfd_open(pid, PidfdFlags::empty()) {
            Err(Errno::SRCH) => return Ok(None),
            result => result.map_err(failed("open a process of"))?,
        };
        let is_holder = holder()?.is_some_and(|lock| lock.pid == Some(pid));
        Ok(is_holder.then(|| Process { process, pid: pid.as_raw_nonzero().get().unsigned_abs() }))
    }

    /// Kills the guest: its command gets no signal and no time to end. A kept guest gets the exit status 137. No effect if
    /// the guest has ended.
    ///
    /// # Errors
    /// When the guest runs in another PID namespace, or the host cannot open a process or write a file.
    pub fn kill(&self) -> Result<(), GuestError> {
        let (front, monitor) = (self.front()?, self.monitor()?);
        if front.is_none() && monitor.is_none() {
            return Ok(());
        }
        if let Some(front) = &front {
            // The front stops the machine, restores the terminal and writes the exit status.
            front.send(END_GUEST);
            if !front.wait(Some(Instant::now() + STOP_TIMEOUT)) {
                front.send(SIGKILL);
                front.wait(None);
            }
        }
        // A monitor ends with its front, and unlocks the disks of the guest with its end.
        if let Some(monitor) = monitor
            && (front.is_none() || !monitor.wait(Some(Instant::now() + STOP_TIMEOUT)))
        {
            monitor.send(SIGKILL);
            monitor.wait(None);
        }
        match self.take() {
            // The front or another process has removed the directory.
            Err(GuestError::Unknown(_) | GuestError::Runs(_)) => Ok(()),
            Err(error) => Err(error),
            Ok(instance) => {
                let record = read_record(&self.folder)?;
                match record.status {
                    _ if !record.is_kept => instance.remove(),
                    // The guest ended by itself in between.
                    Some(_) => {}
                    None => instance.finish(STATUS_KILLED)?,
                }
                Ok(())
            }
        }
    }
}

impl Process {
    /// Sends a signal by its number. A front forwards it to the guest's command, except SIGKILL.
    pub fn send(&self, signal: u8) {
        crate::signal::send(self.process.as_fd(), signal);
    }

    /// Waits for the end of the process, until a deadline if there is one. Returns whether the process has ended.
    pub fn wait(&self, until: Option<Instant>) -> bool {
        wait_readable(self.process.as_fd(), until).unwrap_or(false)
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }
}
