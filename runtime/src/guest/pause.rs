//! Requests to the monitor of a guest, which any process of the user can make: pause, resume, statistics.

use super::files::is_locked;
use super::owner::ANSWER_TIMEOUT;
use super::{Guest, GuestError, PAUSED, REQUESTS, host};
use kindling_vmm::control::{ControlError, Requester, Statistics};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::Errno;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

impl Guest {
    /// Pauses the guest: returns when no vCPU executes it. Memory stays allocated, connections wait, and the guest's clocks
    /// continue. No effect if the guest is paused already.
    ///
    /// # Errors
    /// When the guest has ended, its monitor is of another version or does not respond within 30 seconds, or a file in the
    /// guest's directory cannot be created.
    pub fn pause(&self) -> Result<(), GuestError> {
        let until = Instant::now() + ANSWER_TIMEOUT;
        let _lock = self.lock_pause(until)?;
        let mark = self.folder.join(PAUSED);
        File::create(&mark).map_err(host("create", &mark))?;
        let result = match self.own_monitor() {
            Some(monitor) => monitor.pause(until).map_err(GuestError::from),
            None => self.requester().and_then(|requester| Ok(requester.pause(until)?)),
        };
        // After a timeout, the monitor may still do it.
        if result.is_err() && !matches!(result, Err(GuestError::Control(ControlError::Timeout))) {
            let _ = fs::remove_file(&mark);
        }
        self.named(result)
    }

    /// Resumes a paused guest.
    ///
    /// # Errors
    /// Those of [`Self::pause`].
    pub fn resume(&self) -> Result<(), GuestError> {
        self.resume_before(Instant::now() + ANSWER_TIMEOUT)
    }

    /// Resumes a paused guest, if its monitor responds before `until`.
    pub(super) fn resume_before(&self, until: Instant) -> Result<(), GuestError> {
        let _lock = self.lock_pause(until)?;
        let result = match self.own_monitor() {
            Some(monitor) => monitor.resume(until).map_err(GuestError::from),
            None => self.requester().and_then(|requester| Ok(requester.resume(until)?)),
        };
        self.named(result)?;
        let mark = self.folder.join(PAUSED);
        match fs::remove_file(&mark) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(host("remove", &mark)(error)),
            _ => Ok(()),
        }
    }

    /// Returns whether the guest is paused, which of its devices have failed, and the statistics of its balloon.
    /// [`Self::usage`] returns what the guest uses of the host.
    ///
    /// # Errors
    /// When the guest has ended, or its monitor is of another version or does not respond within 30 seconds.
    pub fn statistics(&self) -> Result<Statistics, GuestError> {
        let until = Instant::now() + ANSWER_TIMEOUT;
        let result = match self.own_monitor() {
            Some(monitor) => monitor.statistics(until).map_err(GuestError::from),
            None => self.requester().and_then(|requester| Ok(requester.statistics(until)?)),
        };
        self.named(result)
    }

    /// Opens the guest of this name, which must be running and not paused: processes would wait until it is resumed.
    ///
    /// # Errors
    /// When the user has no guest of this name, or it has ended or is paused.
    pub fn open_responsive(name: &str) -> Result<Self, GuestError> {
        let found = Self::open_running(name)?;
        found.check_runs()?;
        Ok(found)
    }

    /// Returns an error if the guest is paused.
    pub(crate) fn check_runs(&self) -> Result<(), GuestError> {
        if self.is_paused() { Err(GuestError::Paused(self.name.clone())) } else { Ok(()) }
    }

    /// Whether the guest is paused. Its monitor is not asked.
    pub(super) fn is_paused(&self) -> bool {
        self.folder.join(PAUSED).exists()
    }

    /// Lets one process after the other pause or resume the guest, while the result exists.
    fn lock_pause(&self, until: Instant) -> Result<OwnedFd, GuestError> {
        const INTERVAL: Duration = Duration::from_millis(5);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = open(&self.folder, flags, Mode::empty());
        let folder = folder.map_err(|error| host("open", &self.folder)(error.into()));
        let folder = self.named(folder)?;
        while let Err(error) = flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            if error != Errno::WOULDBLOCK || Instant::now() >= until {
                return Err(host("lock", &self.folder)(error.into()));
            }
            std::thread::sleep(INTERVAL);
        }
        Ok(folder)
    }

    pub(crate) fn requester(&self) -> Result<Requester, GuestError> {
        let path = self.folder.join(REQUESTS);
        Requester::connect(&path).map_err(host("connect to", &path))
    }

    /// Names the guest in the error, if it has ended.
    fn named<T>(&self, result: Result<T, GuestError>) -> Result<T, GuestError> {
        result.map_err(|error| match error {
            GuestError::Host { .. } | GuestError::Control(ControlError::Ended)
                if !is_locked(&self.folder).unwrap_or(true) =>
            {
                GuestError::Ended(self.name.clone())
            }
            // A monitor closes a connection whose requests it does not know.
            GuestError::Control(ControlError::Ended) => ControlError::Version.into(),
            error => error,
        })
    }
}
