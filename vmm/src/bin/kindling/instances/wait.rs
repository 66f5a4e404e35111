//! `kindling wait`: waits for a guest's end.

use super::view::State;
use super::{Found, InstanceError};
use crate::complain;
use clap::Args;

#[derive(Args, Debug, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// Name of the guest
    name: String,
}

/// Waits; the exit status is the guest's.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    wait(&arguments.name).unwrap_or_else(|error| {
        complain(&error);
        error.status()
    })
}

fn wait(name: &str) -> Result<u8, InstanceError> {
    let guest = Found::named(name)?;
    if let Some(vmm) = guest.vmm()? {
        vmm.wait(None);
    }
    let unknown = |why| InstanceError::NoStatus(name.to_owned(), why);
    match Found::named(name).map(|guest| guest.state()) {
        Ok(State::Exited(status)) => Ok(status),
        Ok(State::Dead) => Err(unknown("its VMM crashed or was killed")),
        Ok(State::Running) => Err(unknown("it is gone, and another has its name")),
        Err(InstanceError::Unknown(_)) => Err(unknown("it was to leave nothing behind")),
        Err(error) => Err(error),
    }
}
