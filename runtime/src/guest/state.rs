//! The state of a guest, and its end.

use super::{Guest, GuestError};
use std::fmt;

/// The state of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The guest runs.
    Running,
    /// The guest is paused.
    Paused,
    /// The guest has ended with this exit status.
    Exited(u8),
    /// The guest has ended, and its exit status is unknown.
    Dead,
}

impl State {
    /// Returns the name of the state, without an exit status.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Exited(_) => "exited",
            Self::Dead => "dead",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        if let Self::Exited(status) = self { write!(f, " {status}") } else { Ok(()) }
    }
}

impl Guest {
    /// Returns the state of the guest, as of the time when it was opened; whether it is paused, as of now.
    #[must_use]
    pub fn state(&self) -> State {
        match (self.is_alive, self.record.status) {
            (true, _) if self.is_paused() => State::Paused,
            (true, _) => State::Running,
            (false, Some(status)) => State::Exited(status),
            (false, None) => State::Dead,
        }
    }

    /// Waits for the end of the guest. Returns its exit status.
    ///
    /// # Errors
    /// When the exit status is unknown, for instance because the guest's directory was removed at its end.
    pub fn wait(&self) -> Result<u8, GuestError> {
        if let Some(process) = self.front()?.map_or_else(|| self.monitor(), |front| Ok(Some(front)))? {
            process.wait(None);
        }
        let unknown = |why| GuestError::NoStatus(self.name.clone(), why);
        match Self::open(&self.name).map(|guest| guest.state()) {
            Ok(State::Exited(status)) => Ok(status),
            Ok(State::Dead) => Err(unknown("the kindling process that ran it crashed or was killed")),
            Ok(State::Running | State::Paused) => {
                Err(unknown("it was removed, and a new guest has its name"))
            }
            Err(GuestError::Unknown(_)) => Err(unknown("its directory was removed at its end")),
            Err(error) => Err(error),
        }
    }
}
