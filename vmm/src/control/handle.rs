//! The monitor's connection to its front while the machine runs.

use super::channel::Channel;
use super::requests::Requests;
use super::{Answer, BalloonStatistics, EVENT_MAX, Event, Query, REQUEST_MAX, Request};
use crate::config::Config;
use crate::devices::virtio::balloon;
use crate::error::Error;
use crate::timeline::Timeline;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// The connection to the front, for the event loop of a running machine.
#[derive(Debug)]
pub(crate) struct Control {
    channel: Channel,
    balloon: Option<balloon::Control>,
    /// The event to send when the guest's agent accepts connections.
    start: Option<Start>,
    /// Set when the front has detached: the machine continues when the socket is closed.
    detached: Option<Detached>,
    /// The socket of requests of other programs.
    pub(crate) requests: Option<Requests>,
    /// The machine's configuration, which a snapshot depends on. `None` if no snapshot can be taken.
    pub(crate) config: Option<Box<Config>>,
}

/// The program that waits for the answer to a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asker {
    /// The front, with the number of its query.
    Front(u32),
    /// The program with this number at the request socket.
    Other(u32),
}

/// The pending notification that the guest's agent accepts connections.
#[derive(Debug)]
struct Start {
    /// Rung by a vCPU's thread, which must not be the last to hold it: a vCPU cannot close descriptors in its jail.
    doorbell: Arc<EventFd>,
    /// [`Event::Started`], until it is sent.
    event: Option<Event>,
}

/// The files that a front passes to its monitor when it detaches.
#[derive(Debug)]
struct Detached {
    /// Receives the exit status.
    status: File,
    /// Their locks show that the guest runs.
    _kept: Vec<OwnedFd>,
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Control {
    /// Duplicates the monitor's end of the socket.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub(super) fn new(channel: &Channel, balloon: Option<balloon::Control>) -> Result<Self, Error> {
        let channel = channel.try_clone().map_err(Error::host("duplicate a socket"))?;
        Ok(Self { channel, balloon, start: None, detached: None, requests: None, config: None })
    }

    /// Sends the event [`Event::Started`] after the returned function was called, by the thread of a vCPU.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub(super) fn send_at_start(
        &mut self,
        timeline: Timeline,
    ) -> Result<impl FnOnce() + Send + use<>, Error> {
        let doorbell = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let doorbell = Arc::new(doorbell.map_err(Error::host("create an eventfd"))?);
        self.start = Some(Start { doorbell: Arc::clone(&doorbell), event: Some(Event::Started(timeline)) });
        // A write fails only if the counter overflows.
        Ok(move || drop(doorbell.write(1)))
    }

    /// Readable when the event [`Event::Started`] is to be sent.
    pub(crate) fn start_doorbell(&self) -> Option<BorrowedFd<'_>> {
        self.start.as_ref().map(|start| crate::poll::borrow(&start.doorbell))
    }

    /// Sends the event [`Event::Started`].
    pub(crate) fn send_start(&mut self) {
        let Some(start) = &mut self.start else { return };
        // The read only resets the counter.
        let _ = start.doorbell.read();
        if let Some(event) = start.event.take() {
            self.send(&event);
        }
    }

    /// A function that rings the doorbell of [`Self::start_doorbell`], for the thread of a vCPU.
    pub(crate) fn start_notifier(&self) -> Option<impl FnOnce() + Send + use<>> {
        let doorbell = Arc::clone(&self.start.as_ref()?.doorbell);
        Some(move || {
            let _ = doorbell.write(1);
            // A vCPU cannot close descriptors in its jail, and another holder exists as long as the machine.
            std::mem::forget(doorbell);
        })
    }

    /// Whether the program with this number is connected.
    pub(crate) fn is_connected(&self, number: u32) -> bool {
        self.requests.as_ref().is_some_and(|requests| requests.is_connected(number))
    }

    /// Whether a program waits for the answer to its query.
    pub(crate) fn waits(&self, asker: Asker) -> bool {
        match asker {
            Asker::Front(_) => true,
            Asker::Other(number) => self.is_connected(number),
        }
    }

    /// Ends the snapshot with an answer.
    pub(crate) fn end_snapshot(&mut self, number: u32, answer: &Answer) {
        self.requests.iter_mut().for_each(|requests| requests.end_snapshot(number, answer));
    }

    /// Receives a request that has arrived. Returns `None` if the front has closed the socket, or sends an invalid
    /// frame.
    pub(crate) fn receive(&mut self) -> Option<Request> {
        let (request, mut descriptors) = self.channel.receive(REQUEST_MAX).ok().flatten()?;
        if matches!(request, Request::Query(_, Query::Detach)) {
            let kept = descriptors.split_off(1.min(descriptors.len()));
            self.detached = Some(Detached { status: descriptors.pop()?.into(), _kept: kept });
        }
        Some(request)
    }

    /// Whether the front has detached.
    pub(crate) const fn is_detached(&self) -> bool {
        self.detached.is_some()
    }

    /// Sends an event. After an error the socket is closed, for both ends: the front would wait for the event, and the next
    /// one could not be told from the rest of this one.
    pub(crate) fn send(&self, event: &Event) {
        if self.channel.send(event, EVENT_MAX, &[]).is_err() {
            let _ = self.channel.shut_down();
        }
    }

    /// Answers a query.
    pub(crate) fn answer(&mut self, asker: Asker, answer: Answer) {
        match asker {
            Asker::Front(number) => self.send(&Event::Answer(number, answer)),
            Asker::Other(number) => {
                self.requests.iter_mut().for_each(|requests| requests.answer(number, &answer));
            }
        }
    }

    /// Writes the exit status to the guest's directory, if the front has detached.
    pub(super) fn write_exit_status(&self, status: u8) {
        if let Some(Detached { status: file, .. }) = &self.detached {
            // A guest without a status in its directory is listed as dead.
            let _ = file.write_all_at(status.to_string().as_bytes(), 0);
        }
    }

    /// Changes the size of the balloon, if there is one.
    pub(crate) fn set_balloon(&self, mib: u64) {
        self.balloon.iter().for_each(|balloon| balloon.set_amount(mib));
    }

    /// Statistics of the balloon, if there is one.
    pub(crate) fn balloon_statistics(&self) -> Option<BalloonStatistics> {
        self.balloon.as_ref().map(|balloon| BalloonStatistics {
            target_mib: balloon.amount(),
            actual_mib: balloon.actual(),
            guest: balloon.statistics(),
        })
    }
}
