//! The processes of a guest: signals for it, and its end.

use super::{FRONT, Guest, GuestError, MONITOR, host, is_locked, read_record};
use kindling_vmm::poll::wait_readable;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::process::{Flock, FlockType, PidfdFlags, fcntl_getlk, pidfd_open};
use std::time::{Duration, Instant};

/// A process of a guest.
#[derive(Debug)]
pub struct Process {
    process: OwnedFd,
    /// Its number, as this process has to call it.
    pub pid: u32,
}

/// The exit status of a guest that nobody asked.
const STATUS_KILLED: u8 = 128 + 9;

/// SIGPWR, and what it is followed by where that does not help.
const POWER: u8 = 30;
const KILL: u8 = 9;

/// How long a front may take to end in order.
const PATIENCE: Duration = Duration::from_secs(2);

impl Guest {
    /// Its front, if it lives: the process that has the guest's streams, and gets the signals that are for the guest.
    ///
    /// # Errors
    /// When it lives where this process has no number for it, or the host refuses something.
    pub fn front(&self) -> Result<Option<Process>, GuestError> {
        // Opening and closing the file would drop the POSIX lock of the program that owns the guest.
        if self.record.is_embedded {
            return Ok(None);
        }
        match self.holder(FRONT)? {
            // An older version has no such file.
            None if is_locked(&self.folder) && !self.folder.join(FRONT).exists() => {
                Err(GuestError::Elsewhere(self.name.clone()))
            }
            front => Ok(front),
        }
    }

    /// Its monitor, if it lives: the process that has the guest's memory.
    ///
    /// # Errors
    /// As of [`Self::front`].
    pub fn monitor(&self) -> Result<Option<Process>, GuestError> {
        self.holder(MONITOR)
    }

    /// The process that has the lock on a file. A number may be another process's a moment later. So the process is held
    /// by it first, and counts if it still has the lock then.
    fn holder(&self, file: &str) -> Result<Option<Process>, GuestError> {
        let failed = |what| move |error: Errno| host(what, &self.folder)(error.into());
        let file = match open(self.folder.join(file), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(None),
            result => result.map_err(failed("look for the processes of"))?,
        };
        let holder = || {
            fcntl_getlk(&file, &Flock::from(FlockType::WriteLock)).map_err(failed("find the processes of"))
        };
        let Some(lock) = holder()? else { return Ok(None) };
        // It has no number where this process is.
        let Some(pid) = lock.pid else { return Err(GuestError::Elsewhere(self.name.clone())) };
        let process = match pidfd_open(pid, PidfdFlags::empty()) {
            Err(Errno::SRCH) => return Ok(None),
            result => result.map_err(failed("hold a process of"))?,
        };
        let is_it = holder()?.is_some_and(|lock| lock.pid == Some(pid));
        Ok(is_it.then(|| Process { process, pid: pid.as_raw_nonzero().get().unsigned_abs() }))
    }

    /// Ends the guest without asking it, and writes down that it was ended.
    pub fn kill(&self) -> Result<(), GuestError> {
        let (front, monitor) = (self.front()?, self.monitor()?);
        if front.is_none() && monitor.is_none() {
            return Ok(());
        }
        if let Some(front) = &front {
            // Its front stops the machine, gives the terminal back and writes down the end.
            front.send(POWER);
            if !front.wait(Some(Instant::now() + PATIENCE)) {
                front.send(KILL);
                front.wait(None);
            }
        }
        // A monitor ends with its front. Its guest's disks are free when it has.
        if let Some(monitor) = monitor
            && (front.is_none() || !monitor.wait(Some(Instant::now() + PATIENCE)))
        {
            monitor.send(KILL);
            monitor.wait(None);
        }
        match self.take() {
            // It has removed its folder itself, or another did.
            Err(GuestError::Unknown(_) | GuestError::Runs(_)) => Ok(()),
            Err(error) => Err(error),
            Ok(instance) => {
                let record = read_record(&self.folder);
                match record.status {
                    _ if !record.is_kept => instance.remove(),
                    // It ended by itself meanwhile.
                    Some(_) => {}
                    None => instance.finish(STATUS_KILLED)?,
                }
                Ok(())
            }
        }
    }
}

impl Process {
    /// Sends it a signal, which it passes on to its guest's payload if it can.
    pub fn send(&self, signal: u8) {
        crate::signal::send(self.process.as_fd(), signal);
    }

    /// Waits for its end, until a time; whether it has ended.
    pub fn wait(&self, until: Option<Instant>) -> bool {
        wait_readable(self.process.as_fd(), until).unwrap_or(false)
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }
}
