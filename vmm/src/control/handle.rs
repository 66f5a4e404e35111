//! The front of a running machine, as the machine's event loop sees it.

use super::channel::Channel;
use super::{BalloonStatistics, EVENT_MAX, Event, REQUEST_MAX, Request};
use crate::devices::virtio::balloon;
use crate::error::Error;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The front, as the event loop of a running machine sees it.
#[derive(Debug)]
pub(crate) struct Control {
    channel: Channel,
    balloon: Option<balloon::Control>,
    is_detached: bool,
    /// Files of the front that stay open as long as this process lives.
    kept: Vec<OwnedFd>,
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
        Ok(Self { channel, balloon, is_detached: false, kept: Vec::new() })
    }

    /// Receives a request that has arrived; none where the front is gone or sends something else.
    pub(crate) fn receive(&mut self) -> Option<Request> {
        let (request, descriptors) = self.channel.receive(REQUEST_MAX).ok().flatten()?;
        if matches!(request, Request::Detach) {
            self.is_detached = true;
            self.kept.extend(descriptors);
        }
        Some(request)
    }

    /// Whether the machine runs on without its front.
    pub(crate) const fn is_detached(&self) -> bool {
        self.is_detached
    }

    /// Sends an event. A front that is gone is seen by [`Self::receive`].
    pub(crate) fn tell(&self, event: &Event) {
        let _ = self.channel.send(event, EVENT_MAX, &[]);
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
