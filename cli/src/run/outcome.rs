//! The outcome of a `kindling run`: the exit status, and the report.

use super::arguments::Arguments;
use crate::report;
use crate::{STATUS_FAILURE, print_error, print_stderr};
use kindling::vmm::agent::AgentError;
use kindling::vmm::control::ControlError;
use kindling::vmm::{Exit, ExitReason};

/// Exit status of a guest that reached its time limit.
const STATUS_TIMEOUT: u8 = 124;

/// Why this command stopped its guest, or itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StopCause {
    /// This signal was received.
    Signal(u8),
    /// The time limit was reached.
    Timeout,
    /// The connection to the command in the guest failed, and the guest did not end by itself.
    Lost,
}

impl StopCause {
    /// Returns the exit status of a command that ends for this reason.
    pub(crate) const fn status(self) -> u8 {
        match self {
            Self::Signal(signal) => 128_u8.saturating_add(signal),
            Self::Timeout => STATUS_TIMEOUT,
            Self::Lost => STATUS_FAILURE,
        }
    }
}

/// The end of the machine, as its monitor reported it.
#[derive(Debug)]
pub(super) enum MachineEnd {
    /// The machine stopped.
    Stopped(Box<Exit>),
    /// The monitor ended, or sent an invalid event.
    Lost(ControlError),
}

/// The outcome of a run.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) machine: MachineEnd,
    /// Exit status of the guest's command, unless it is unknown.
    pub(super) command: Result<u8, AgentError>,
    /// Why this command stopped the machine, if it did.
    pub(super) stopped_by: Option<StopCause>,
}

impl Outcome {
    /// Returns the exit status: that of the command if it is known, whatever the machine did afterwards; otherwise that of
    /// the reason for which this command stopped the machine; otherwise that of the machine's end.
    pub(super) fn status(&self) -> u8 {
        if let Ok(status) = self.command {
            return status;
        }
        match (&self.machine, self.stopped_by) {
            (MachineEnd::Lost(_), Some(cause)) => cause.status(),
            (MachineEnd::Lost(_), None) => STATUS_FAILURE,
            (MachineEnd::Stopped(exit), cause) => match (&exit.reason, cause) {
                (ExitReason::Stopped, Some(cause)) => cause.status(),
                (ExitReason::Payload(status), _) if !self.is_output_unknown() => *status,
                _ => STATUS_FAILURE,
            },
        }
    }

    /// Whether the command ended without a connection to it, so that its output is unknown.
    const fn is_output_unknown(&self) -> bool {
        matches!(
            self.command,
            Err(AgentError::Host { .. } | AgentError::Connect { .. } | AgentError::Refused { .. })
        )
    }

    /// Prints what failed, and with `--report` the times of the steps.
    pub(super) fn report(&self, arguments: &Arguments) {
        let exit = match &self.machine {
            MachineEnd::Stopped(exit) => exit,
            MachineEnd::Lost(error) => return print_error(error),
        };
        print_stderr(&report::device_failures(exit));
        if arguments.report {
            print_stderr(&report::timeline(exit));
        }
        match (&self.command, &exit.reason, self.stopped_by) {
            (Err(error), ExitReason::Payload(_), _) if self.is_output_unknown() => print_error(error),
            (Err(error), ExitReason::Stopped, Some(StopCause::Lost)) => print_error(error),
            (Ok(_), ..) | (Err(_), ExitReason::Payload(_), _) => {}
            (Err(_), ExitReason::Stopped, Some(StopCause::Timeout)) => {
                let seconds = arguments.timeout.unwrap_or_default();
                print_stderr(&format!("kindling: killed after {seconds} s (--timeout)\n"));
            }
            (Err(_), ExitReason::Stopped, Some(StopCause::Signal(_))) => {}
            (Err(_), ..) => print_stderr(&report::failure(exit)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kindling::vmm::{Instant, Timeline};

    const LOST: fn() -> Result<u8, AgentError> = || Err(AgentError::Lost);

    fn stopped(reason: ExitReason) -> MachineEnd {
        MachineEnd::Stopped(Box::new(Exit::new(reason, Timeline::starting_at(Instant(0)))))
    }

    fn status(machine: MachineEnd, command: Result<u8, AgentError>, stopped_by: Option<StopCause>) -> u8 {
        Outcome { machine, command, stopped_by }.status()
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
        assert_eq!(status(stopped(ExitReason::Stopped), refused(), Some(StopCause::Lost)), 125);
    }

    #[test]
    fn the_status_of_a_signal_fits_in_a_byte() {
        assert_eq!(StopCause::Signal(255).status(), 255);
    }
}
