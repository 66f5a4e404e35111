//! Guests of this program, which end with it unless they are detached.

use super::{Guest, GuestDir, GuestError};
use kindling_vmm::Timeline;
use kindling_vmm::control::{Monitor, Statistics};
use std::time::{Duration, Instant};

/// Time for a monitor to answer a request.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// What belongs to a guest of this program. Dropping it ends the guest.
#[derive(Debug)]
pub(crate) struct Owner {
    pub(crate) monitor: Option<Monitor>,
    pub(crate) directory: Option<GuestDir>,
    /// When each step of the start was reached.
    pub(crate) timeline: Timeline,
}

impl Drop for Owner {
    fn drop(&mut self) {
        drop(self.monitor.take());
        if let Some(directory) = self.directory.take() {
            directory.remove();
        }
    }
}

impl Guest {
    /// When each step of the start was reached, of a guest that this program started.
    #[must_use]
    pub fn timeline(&self) -> Option<&Timeline> {
        self.owner.as_ref().map(|owner| &owner.timeline)
    }

    /// Makes all vCPUs stop executing the guest, and returns when they have. Its memory stays, connections to it wait, and
    /// its clocks go on. A guest that is paused already stays so.
    ///
    /// # Errors
    /// When another process started the guest, or its monitor is gone or does not answer.
    pub fn pause(&self) -> Result<(), GuestError> {
        Ok(self.owned_monitor()?.pause(Instant::now() + ANSWER_TIMEOUT)?)
    }

    /// Lets a paused guest continue.
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn resume(&self) -> Result<(), GuestError> {
        Ok(self.owned_monitor()?.resume(Instant::now() + ANSWER_TIMEOUT)?)
    }

    /// Whether the guest is paused, which of its devices have failed, and what its balloon reports. What it uses of the host
    /// is [`Self::usage`].
    ///
    /// # Errors
    /// As [`Self::pause`].
    pub fn statistics(&self) -> Result<Statistics, GuestError> {
        Ok(self.owned_monitor()?.statistics(Instant::now() + ANSWER_TIMEOUT)?)
    }

    /// Leaves the guest running after the end of this program, which started it. [`Guest::open`] finds it by its name, and
    /// so do `kindling ps`, `exec`, `stop` and `rm`.
    ///
    /// # Errors
    /// When another process started the guest, its monitor is gone, or the host refuses something.
    pub fn detach(mut self) -> Result<(), GuestError> {
        let not_owned = || GuestError::NotOwned(self.name.clone());
        let mut owner = self.owner.take().ok_or_else(not_owned)?;
        let (Some(monitor), Some(directory)) = (owner.monitor.take(), owner.directory.take()) else {
            return Err(not_owned());
        };
        self.record.is_kept = true;
        let status = directory.write(&self.record).and_then(|()| directory.status_file());
        match status {
            Ok(status) => Ok(monitor.detach(directory.lock(), &status)?),
            Err(error) => {
                (owner.monitor, owner.directory) = (Some(monitor), Some(directory));
                Err(error)
            }
        }
    }

    fn owned_monitor(&self) -> Result<&Monitor, GuestError> {
        let monitor = self.owner.as_ref().and_then(|owner| owner.monitor.as_ref());
        monitor.ok_or_else(|| GuestError::NotOwned(self.name.clone()))
    }
}
