//! The end of a guest: asked for, and then enforced.

use super::{Guest, GuestError, Process};
use kindling_vmm::agent::{self, ProcessEvent};
use kindling_vmm::config::{BootInfo, GuestConfig};
use kindling_vmm::poll::wait_readable;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

const SIGTERM: u8 = 15;
const SIGKILL: u8 = 9;

/// A guest that was asked to end.
#[derive(Debug)]
#[must_use = "the guest may not end by itself"]
pub struct StopRequest<'a> {
    guest: &'a Guest,
    /// The process whose end is the guest's; none where the guest has ended.
    process: Option<Process>,
    /// The payload that ends a guest without a command. The guest ends when it has exited and this is dropped.
    payload: Option<agent::Process>,
}

impl Guest {
    /// Asks the guest to end. Its command gets the image's stop signal, SIGTERM if the image names none; a guest without a
    /// command unmounts its volumes and ends. A guest whose image names SIGKILL is killed.
    ///
    /// # Errors
    /// When the guest runs in another PID namespace, or the host refuses something.
    pub fn request_stop(&self) -> Result<StopRequest<'_>, GuestError> {
        let request = |process, payload| StopRequest { guest: self, process, payload };
        if self.record.is_embedded {
            let process = self.monitor()?;
            let payload = process.as_ref().and_then(|_| self.start_last_payload());
            return Ok(request(process, payload));
        }
        let front = self.front()?;
        match (&front, self.record.stop_signal) {
            (None, _) => {}
            // The front cannot receive it in the place of its guest's command.
            (Some(_), SIGKILL) => self.kill()?,
            // A record that is damaged has no signal.
            (Some(front), 0) => front.send(SIGTERM),
            (Some(front), signal) => front.send(signal),
        }
        Ok(request(front, None))
    }

    /// Starts a payload that ends at once, and with it a guest that has none: init's own program, which is in every guest
    /// and does nothing where it is not process 1.
    fn start_last_payload(&self) -> Option<agent::Process> {
        let payload = GuestConfig {
            arguments: vec![b"/proc/self/exe".to_vec()],
            agent: true,
            ..GuestConfig::default()
        };
        let frame = payload.to_frame(&BootInfo::default()).unwrap_or_default();
        // A guest that does not answer is killed in the end.
        agent::Process::start_payload(&self.socket(), &frame).ok()
    }

    /// Ends the guest: asks it to, and kills it where it has not ended within this time. Whether it ended by itself.
    ///
    /// # Errors
    /// As [`Self::request_stop`] and [`Self::kill`].
    pub fn stop(&self, within: Duration) -> Result<bool, GuestError> {
        self.request_stop()?.wait(Instant::now() + within)
    }
}

impl StopRequest<'_> {
    /// Waits for the guest's end until a time, and kills it then. Whether it ended by itself.
    ///
    /// # Errors
    /// As [`Guest::kill`].
    pub fn wait(self, until: Instant) -> Result<bool, GuestError> {
        if let Some(payload) = self.payload {
            wait_for_exit(payload, until);
        }
        let has_ended = self.process.as_ref().is_none_or(|process| process.wait(Some(until)));
        if !has_ended {
            self.guest.kill()?;
        }
        Ok(has_ended)
    }
}

/// Waits until a payload has exited, until its guest is gone, or until a time.
fn wait_for_exit(mut payload: agent::Process, until: Instant) {
    loop {
        match payload.poll_event() {
            Ok(Some(ProcessEvent::Exited { .. })) | Err(_) => return,
            Ok(Some(_)) => {}
            Ok(None) => match wait_readable(payload.as_fd(), Some(until)) {
                Ok(true) => {}
                Ok(false) | Err(_) => return,
            },
        }
    }
}
