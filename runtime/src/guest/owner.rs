//! Guests that belong to the calling program, and end with it unless they are detached.

use super::{Guest, GuestDir, GuestError, GuestRecord};
use kindling_vmm::Timeline;
use kindling_vmm::control::Monitor;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Time limit for the monitor's response to a request.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Monitor and directory of a guest of the calling program. Dropping it ends the guest and removes the directory.
#[derive(Debug)]
pub(crate) struct Owner {
    pub(crate) monitor: Option<Monitor>,
    pub(crate) directory: Option<GuestDir>,
    /// Times of the steps of the start.
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
    /// Returns the times of the steps of the start. `None` if another process started the guest.
    #[must_use]
    pub fn timeline(&self) -> Option<&Timeline> {
        self.owner.as_ref().map(|owner| &owner.timeline)
    }

    /// Detaches the guest from the calling program, so that it continues to run after the program's end. [`Guest::open`]
    /// finds it by its name, and so do `kindling ps`, `exec`, `stop` and `rm`. This `Guest` stays usable, as one that was
    /// opened by its name. A thread of the program reaps the monitor.
    ///
    /// # Errors
    /// When another process started the guest, the guest has ended, or a file of its directory cannot be written. The guest
    /// then still belongs to the program.
    pub fn detach(&mut self) -> Result<(), GuestError> {
        let not_owned = || GuestError::NotOwned(self.name.clone());
        let owner = self.owner.as_mut().ok_or_else(not_owned)?;
        let (Some(monitor), Some(directory)) = (&mut owner.monitor, &owner.directory) else {
            return Err(not_owned());
        };
        let mut record = GuestRecord { is_kept: true, ..self.record.clone() };
        directory.write(&record)?;
        let detached = directory.status_file().and_then(|status| {
            let until = Instant::now() + ANSWER_TIMEOUT;
            Ok(monitor.detach(status.as_fd(), &directory.locks(), until)?)
        });
        if let Err(error) = detached {
            record.is_kept = false;
            // If the old record cannot be restored, the directory stays when the guest is killed.
            let _ = directory.write(&record);
            return Err(error);
        }
        self.record = record;
        // The directory stays.
        owner.directory = None;
        self.owner = None;
        Ok(())
    }

    /// The monitor, if the calling program has started the guest and not detached it.
    pub(super) fn own_monitor(&self) -> Option<&Monitor> {
        self.owner.as_ref()?.monitor.as_ref()
    }

    pub(crate) fn owned_monitor(&self) -> Result<&Monitor, GuestError> {
        self.own_monitor().ok_or_else(|| GuestError::NotOwned(self.name.clone()))
    }
}
