//! Receives the events of a monitor: their number is bounded, and their order is kept while the front waits for an
//! answer.

use super::super::channel::Channel;
use super::super::{ControlError, EVENT_MAX, Event};
use std::collections::VecDeque;

/// Maximum number of events that are not answers: one of each kind, and one for each device.
const MAX_UNSOLICITED: u32 = 64;

/// The queue of events that [`super::Monitor::next_event`] has not returned yet, and the limit of their number. A guest
/// that has taken over its monitor could send any number.
#[derive(Debug, Default)]
pub(super) struct Events {
    /// Events that arrived while the front waited for an answer.
    queue: VecDeque<Event>,
    /// Number of events so far that are not answers.
    unsolicited: u32,
    /// Number of requests whose answers have not arrived.
    pending_answers: u32,
}

impl Events {
    /// Registers a request that the monitor answers.
    pub(super) const fn expect_answer(&mut self) {
        self.pending_answers = self.pending_answers.saturating_add(1);
    }

    /// Queues an event.
    pub(super) fn push(&mut self, event: Event) {
        self.queue.push_back(event);
    }

    /// Removes the oldest queued event.
    pub(super) fn pop(&mut self) -> Option<Event> {
        self.queue.pop_front()
    }

    /// Whether an event is queued.
    pub(super) fn has_queued(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Receives an event that has arrived.
    pub(super) fn receive(&mut self, channel: &Channel) -> Result<Event, ControlError> {
        let (event, _) = channel.receive::<Event>(EVENT_MAX)?.ok_or(ControlError::Disconnected)?;
        let count = match event {
            Event::Stopped(_) | Event::Failed(_) | Event::Prebooted => return Ok(event),
            Event::Paused | Event::Resumed | Event::Statistics(_) => self.pending_answers.checked_sub(1),
            Event::PrebootRefused(_) | Event::Started(_) | Event::DeviceFailed(_) => {
                self.unsolicited += 1;
                (self.unsolicited <= MAX_UNSOLICITED).then_some(self.pending_answers)
            }
        };
        self.pending_answers = count.ok_or(ControlError::Version)?;
        Ok(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_number_of_events_is_bounded() {
        let (front, monitor) = UnixStream::pair().unwrap();
        let (front, monitor) = (Channel::new(front), Channel::new(monitor));
        let mut events = Events::default();
        for _ in 0..MAX_UNSOLICITED {
            monitor.send(&Event::DeviceFailed("disk".to_owned()), EVENT_MAX, &[]).unwrap();
            events.receive(&front).unwrap();
        }
        monitor.send(&Event::DeviceFailed("disk".to_owned()), EVENT_MAX, &[]).unwrap();
        assert!(matches!(events.receive(&front), Err(ControlError::Version)));
        // An answer without a request.
        let mut events = Events::default();
        monitor.send(&Event::Paused, EVENT_MAX, &[]).unwrap();
        assert!(matches!(events.receive(&front), Err(ControlError::Version)));
        events.expect_answer();
        monitor.send(&Event::Paused, EVENT_MAX, &[]).unwrap();
        assert!(matches!(events.receive(&front), Ok(Event::Paused)));
        monitor.send(&Event::Resumed, EVENT_MAX, &[]).unwrap();
        assert!(matches!(events.receive(&front), Err(ControlError::Version)));
        drop(monitor);
        assert!(matches!(events.receive(&front), Err(ControlError::Disconnected)));
    }
}
