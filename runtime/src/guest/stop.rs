//! Stopping a guest: a request to end, and SIGKILL after a time limit.

use super::{Guest, GuestError, Process};
use kindling_vmm::agent::{self, ProcessEvent};
use kindling_vmm::config::{BootInfo, GuestConfig};
use kindling_vmm::poll::wait_readable;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Minimum time for a guest to end after its last payload has exited.
const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(2);
/// Time limit to resume a guest that is paused when it is requested to end.
const RESUME_TIMEOUT: Duration = Duration::from_secs(2);
const SIGTERM: u8 = 15;
const SIGKILL: u8 = 9;

/// A guest that was requested to end. [`wait`](Self::wait) waits for the end, and kills the guest after a deadline.
#[derive(Debug)]
#[must_use = "the guest may not end by itself"]
pub struct StopRequest<'a> {
    guest: &'a Guest,
    /// The process with which the guest ends; `None` if the guest has ended.
    process: Option<Process>,
    /// The payload that was started to end a guest without a command. The guest ends when the payload has exited and this
    /// connection is dropped.
    payload: Option<agent::Process>,
}

impl Guest {
    /// Requests the end of the guest, and does not wait. A paused guest is resumed. The guest's command gets the image's stop signal, by default
    /// SIGTERM; a guest without a command unmounts its volumes and ends. A guest whose image's stop signal is SIGKILL is
    /// killed.
    ///
    /// # Errors
    /// When the guest runs in another PID namespace, or the host cannot open a process of the guest.
    pub fn request_stop(&self) -> Result<StopRequest<'_>, GuestError> {
        if self.is_paused() {
            // A guest that does not continue is killed after the time limit.
            let _ = self.resume_before(Instant::now() + RESUME_TIMEOUT);
        }
        let request = |process, payload| StopRequest { guest: self, process, payload };
        if self.record.is_embedded {
            let process = self.monitor()?;
            let payload = process.as_ref().and_then(|_| self.start_last_payload());
            return Ok(request(process, payload));
        }
        let front = self.front()?;
        match (&front, self.record.stop_signal) {
            (None, _) => {}
            // A front cannot catch and forward SIGKILL.
            (Some(_), SIGKILL) => self.kill()?,
            // A damaged record has no signal.
            (Some(front), 0) => front.send(SIGTERM),
            (Some(front), signal) => front.send(signal),
        }
        Ok(request(front, None))
    }

    /// Starts the payload of a guest that has none: a program that exits immediately, with which the guest ends. It is
    /// init's program, which exists in every guest and does nothing unless it is process 1.
    fn start_last_payload(&self) -> Option<agent::Process> {
        let payload = GuestConfig {
            arguments: vec![b"/proc/self/exe".to_vec()],
            agent: true,
            ..GuestConfig::default()
        };
        let frame = payload.to_frame(&BootInfo::default()).unwrap_or_default();
        // A guest that does not respond is killed after the deadline.
        agent::Process::start_payload(&self.socket(), &frame).ok()
    }

    /// Stops the guest: requests its end, and kills it if it has not ended within `within`. Returns whether the guest ended
    /// without being killed.
    ///
    /// # Errors
    /// Those of [`Self::request_stop`] and [`Self::kill`].
    pub fn stop(&self, within: Duration) -> Result<bool, GuestError> {
        self.request_stop()?.wait(Instant::now() + within)
    }
}

impl StopRequest<'_> {
    /// Waits for the end of the guest until a deadline, and then kills it. Returns whether the guest ended without being
    /// killed.
    ///
    /// # Errors
    /// Those of [`Guest::kill`].
    pub fn wait(self, until: Instant) -> Result<bool, GuestError> {
        let mut until = until;
        if let Some(payload) = self.payload {
            wait_for_exit(payload, until);
            // The guest unmounts its volumes when the payload's connection is closed, which may have waited for others.
            until = until.max(Instant::now() + UNMOUNT_TIMEOUT);
        }
        let has_ended = self.process.as_ref().is_none_or(|process| process.wait(Some(until)));
        if !has_ended {
            self.guest.kill()?;
        }
        Ok(has_ended)
    }
}

/// Waits until the payload has exited, the guest has ended, or the deadline has passed.
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
