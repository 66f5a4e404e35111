//! The front of a running machine, as the machine's event loop sees it.

use super::channel::Channel;
use super::{BalloonStatistics, EVENT_MAX, Event, REQUEST_MAX, Request};
use crate::devices::virtio::balloon;
use crate::error::Error;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// The front, as the event loop of a running machine sees it.
#[derive(Debug)]
pub(crate) struct Control {
    channel: Channel,
    balloon: Option<balloon::Control>,
    /// Set when the machine is to run on without its front.
    detached: Option<Detached>,
}

/// What a front leaves to its monitor.
#[derive(Debug)]
struct Detached {
    /// Its lock says that the guest runs.
    _lock: OwnedFd,
    /// For the exit status.
    status: File,
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Control {
    /// A handle of the monitor's socket.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub(super) fn new(channel: &Channel, balloon: Option<balloon::Control>) -> Result<Self, Error> {
        let channel = channel.try_clone().map_err(Error::host("duplicate a socket"))?;
        Ok(Self { channel, balloon, detached: None })
    }

    /// Receives a request that has arrived; none where the front is gone or sends something else.
    pub(crate) fn receive(&mut self) -> Option<Request> {
        let (request, descriptors) = self.channel.receive(REQUEST_MAX).ok().flatten()?;
        if matches!(request, Request::Detach) {
            let [lock, status] = <[OwnedFd; 2]>::try_from(descriptors).ok()?;
            self.detached = Some(Detached { _lock: lock, status: status.into() });
        }
        Some(request)
    }

    /// Whether the machine runs on without its front.
    pub(crate) const fn is_detached(&self) -> bool {
        self.detached.is_some()
    }

    /// Sends an event. A front that is gone is seen by [`Self::receive`].
    pub(crate) fn tell(&self, event: &Event) {
        let _ = self.channel.send(event, EVENT_MAX, &[]);
    }

    /// Writes the exit status where the front is gone that would.
    pub(super) fn finish(&self, status: u8) {
        if let Some(Detached { status: file, .. }) = &self.detached {
            // A guest without a status in its folder is reported as dead.
            let _ = file.write_all_at(status.to_string().as_bytes(), 0);
        }
    }

    /// Changes the size of the balloon, if there is one.
    pub(crate) fn set_balloon(&self, mib: u64) {
        self.balloon.iter().for_each(|balloon| balloon.set_amount(mib));
    }

    /// Statistics of the balloon, if there is one.
    pub(crate) fn balloon(&self) -> Option<BalloonStatistics> {
        self.balloon.as_ref().map(|balloon| BalloonStatistics {
            target_mib: balloon.amount(),
            actual_mib: balloon.actual(),
            guest: balloon.statistics(),
        })
    }
}
