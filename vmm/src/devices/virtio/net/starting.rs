//! A passt that was started for a network card, until it is ready.

use super::ports;
use crate::config::devices::PortForward;
use crate::devices::virtio::BackendError;
use std::io::Read;
use std::process::Child;

/// Maximum number of bytes that are read of passt's messages.
const MESSAGES_MAX: u64 = 8192;

/// A passt that is starting.
#[derive(Debug)]
pub(crate) struct Starting {
    child: Child,
    forwards: Vec<PortForward>,
}

impl Starting {
    /// `child` is the first process of passt, which forwards these ports.
    pub(super) const fn new(child: Child, forwards: Vec<PortForward>) -> Self {
        Self { child, forwards }
    }

    /// Waits until passt runs: its first process exits when the remaining one is ready. Then checks that the ports were
    /// bound.
    ///
    /// # Errors
    /// The last message of passt, or a port that passt did not bind.
    pub(crate) fn wait(self) -> Result<(), BackendError> {
        self.result().map_err(|why| unusable("user", why))
    }

    fn result(mut self) -> Result<(), String> {
        let status = self.child.wait().map_err(|error| format!("passt: {error}"))?;
        if status.success() {
            return self.forwards.iter().try_for_each(ports::check_taken);
        }
        let mut messages = Vec::new();
        if let Some(stream) = self.child.stderr.take() {
            // The message is incomplete after a read error.
            let _ = stream.take(MESSAGES_MAX).read_to_end(&mut messages);
        }
        Err(reason(&String::from_utf8_lossy(&messages)).unwrap_or_else(|| format!("passt failed: {status}")))
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        // After `wait` the process has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last message of passt about an error.
fn reason(messages: &str) -> Option<String> {
    // passt also reports the lack of a system log, and the user that it changes to.
    let is_noise = |line: &str| line.starts_with("Failed to send ") || line.starts_with("Don't run as root");
    let line = messages.lines().map(str::trim).rfind(|line| !line.is_empty() && !is_noise(line))?;
    Some(format!("passt: {line}"))
}

/// The error of a network card that cannot be connected to this interface of the host, or to passt as `user`.
pub(super) fn unusable(name: &str, why: String) -> BackendError {
    BackendError::unusable(format!("{name} cannot be the other end of a network card"), why)
}
