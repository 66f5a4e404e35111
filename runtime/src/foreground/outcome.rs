//! The outcome of a guest with a command in the foreground, and its exit status.

use crate::attach::{STATUS_FAILURE, StopCause};
use crate::launch::{MachineEnd, NextSpare};
use kindling_vmm::ExitReason;
use kindling_vmm::agent::AgentError;

/// The outcome of a guest with a command in the foreground.
#[derive(Debug)]
#[non_exhaustive]
pub struct Outcome {
    /// The end of the machine. `None` if it was not waited for: the command succeeded, and the guest has no disk, folder or
    /// network that its end must leave consistent.
    pub machine: Option<MachineEnd>,
    /// Exit status of the guest's command, unless it is unknown.
    pub command: Result<u8, AgentError>,
    /// Why the calling process stopped the machine, if it did.
    pub stopped_by: Option<StopCause>,
    /// The spare monitor for the next guest, if this one uses spares, to be started when nobody waits any more.
    pub spare: Option<NextSpare>,
}

impl Outcome {
    /// Returns the exit status: that of the command if it is known, whatever the machine did afterwards; otherwise that of
    /// the reason for which the calling process stopped the machine; otherwise that of the machine's end, 125 if it failed.
    #[must_use]
    pub fn status(&self) -> u8 {
        if let Ok(status) = self.command {
            return status;
        }
        match (&self.machine, self.stopped_by) {
            (Some(MachineEnd::Lost(_)), Some(cause)) => cause.status(),
            (Some(MachineEnd::Lost(_)) | None, _) => STATUS_FAILURE,
            (Some(MachineEnd::Stopped(exit)), cause) => match (&exit.reason, cause) {
                (ExitReason::Stopped, Some(cause)) => cause.status(),
                (ExitReason::Payload(status), _) if !self.is_output_unknown() => *status,
                _ => STATUS_FAILURE,
            },
        }
    }

    /// Returns whether the command ended without a connection to it, so that its output is unknown.
    #[must_use]
    pub fn is_output_unknown(&self) -> bool {
        let has_succeeded = || match &self.machine {
            Some(MachineEnd::Stopped(exit)) => exit.reason == ExitReason::Payload(0),
            _ => false,
        };
        match self.command {
            Err(AgentError::Host { .. } | AgentError::Connect { .. } | AgentError::Refused { .. }) => true,
            // The guest ends with the status of a command that succeeded when the host has received the status.
            Err(AgentError::Lost) => self.stopped_by.is_none() && has_succeeded(),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kindling_vmm::control::ControlError;
    use kindling_vmm::{Exit, Instant, Timeline};

    const LOST: fn() -> Result<u8, AgentError> = || Err(AgentError::Lost);

    fn stopped(reason: ExitReason) -> MachineEnd {
        MachineEnd::Stopped(Box::new(Exit::new(reason, Timeline::starting_at(Instant(0)))))
    }

    fn status(machine: MachineEnd, command: Result<u8, AgentError>, stopped_by: Option<StopCause>) -> u8 {
        Outcome { machine: Some(machine), command, stopped_by, spare: None }.status()
    }

    #[test]
    fn the_status_of_the_command_has_priority() {
        let term = Some(StopCause::Signal(15));
        assert_eq!(status(stopped(ExitReason::Payload(7)), Ok(3), None), 3);
        assert_eq!(status(stopped(ExitReason::GuestPanic), Ok(0), term), 0);
        assert_eq!(status(MachineEnd::Lost(ControlError::Disconnected), Ok(9), Some(StopCause::Timeout)), 9);
    }

    #[test]
    fn without_a_command_status_the_cause_of_the_stop_is_reported() {
        let term = Some(StopCause::Signal(15));
        assert_eq!(status(stopped(ExitReason::Stopped), LOST(), term), 143);
        assert_eq!(status(stopped(ExitReason::Stopped), LOST(), Some(StopCause::Timeout)), 124);
        assert_eq!(status(MachineEnd::Lost(ControlError::Killed(9)), LOST(), term), 143);
        assert_eq!(
            status(MachineEnd::Lost(ControlError::StopTimeout), LOST(), Some(StopCause::Timeout)),
            124
        );
    }

    #[test]
    fn without_a_cause_the_end_of_the_machine_is_reported() {
        assert_eq!(status(stopped(ExitReason::Payload(127)), LOST(), None), 127);
        // The guest ended by itself before it was stopped.
        assert_eq!(status(stopped(ExitReason::Payload(1)), LOST(), Some(StopCause::Timeout)), 1);
        for reason in [ExitReason::InitPanic, ExitReason::GuestPanic, ExitReason::Reset, ExitReason::Stopped]
        {
            assert_eq!(status(stopped(reason), LOST(), None), 125);
        }
        assert_eq!(status(MachineEnd::Lost(ControlError::Disconnected), LOST(), None), 125);
    }

    #[test]
    fn a_command_without_a_connection_has_failed() {
        let refused = || Err(AgentError::Refused { path: "vsock".into() });
        assert_eq!(status(stopped(ExitReason::Payload(0)), refused(), None), 125);
        assert_eq!(status(stopped(ExitReason::Payload(0)), LOST(), None), 125);
        assert_eq!(status(stopped(ExitReason::Payload(0)), LOST(), Some(StopCause::Timeout)), 0);
        assert_eq!(status(stopped(ExitReason::Stopped), refused(), Some(StopCause::Lost)), 125);
    }

    #[test]
    fn the_status_of_a_signal_fits_in_a_byte() {
        assert_eq!(StopCause::Signal(255).status(), 255);
    }
}
