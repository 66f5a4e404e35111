//! Receives the events of a monitor: their number is bounded, and their order is kept while the front waits for an
//! answer.

use super::super::channel::Channel;
use super::super::{ControlError, EVENT_MAX, Event};
use std::collections::VecDeque;

/// Maximum number of reports of failed devices: one for each device.
const MAX_DEVICE_FAILURES: u32 = 64;

/// The queue of events that [`super::Monitor::next_event`] has not returned yet, and the limit of their number. A guest
/// that has taken over its monitor could send any number.
#[derive(Debug, Default)]
pub(super) struct Events {
    /// Events that arrived while the front waited for an answer.
    queue: VecDeque<Event>,
    was_refused: bool,
    was_reduced: bool,
    was_started: bool,
    device_failures: u32,
    /// Whether the last event has arrived.
    is_over: bool,
    /// Number of the last query.
    queries: u32,
    /// Number of queries whose answers have not arrived.
    pending_answers: u32,
}

impl Events {
    /// The number of a new query.
    pub(super) const fn new_query(&mut self) -> u32 {
        self.pending_answers = self.pending_answers.saturating_add(1);
        self.queries = self.queries.wrapping_add(1);
        self.queries
    }

    /// Queues an event.
    pub(super) fn push(&mut self, event: Event) {
        self.queue.push_back(event);
    }

    /// Removes the oldest queued event.
    pub(super) fn pop(&mut self) -> Option<Event> {
        self.queue.pop_front()
    }

    /// Whether the last event has arrived.
    pub(super) const fn is_over(&self) -> bool {
        self.is_over
    }

    /// Receives an event that has arrived.
    pub(super) fn receive(&mut self, channel: &Channel) -> Result<Event, ControlError> {
        let (event, _) = channel.receive::<Event>(EVENT_MAX)?.ok_or(ControlError::Disconnected)?;
        let is_valid = !self.is_over
            && match event {
                Event::PrebootRefused(_) => !std::mem::replace(&mut self.was_refused, true),
                Event::JailReduced(_) => !std::mem::replace(&mut self.was_reduced, true),
                Event::Started(_) => !std::mem::replace(&mut self.was_started, true),
                Event::DeviceFailed(_) => {
                    self.device_failures += 1;
                    self.device_failures <= MAX_DEVICE_FAILURES
                }
                Event::Answer(..) => match self.pending_answers.checked_sub(1) {
                    Some(rest) => {
                        self.pending_answers = rest;
                        true
                    }
                    None => false,
                },
                Event::Prebooted | Event::Saved | Event::Stopped(_) | Event::Failed(_) => {
                    self.is_over = true;
                    true
                }
            };
        if is_valid { Ok(event) } else { Err(ControlError::Version) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::Answer;
    use super::*;
    use crate::timeline::{Instant, Timeline};
    use std::os::unix::net::UnixStream;

    /// Receives events that a monitor sends; whether the last of them is refused.
    fn refuses_the_last(events: &mut Events, sent: impl IntoIterator<Item = Event>) -> bool {
        let (front, monitor) = UnixStream::pair().unwrap();
        let (front, monitor) = (Channel::new(front), Channel::new(monitor));
        let mut results = Vec::new();
        for event in sent {
            monitor.send(&event, EVENT_MAX, &[]).unwrap();
            results.push(events.receive(&front));
        }
        let last = results.pop();
        assert!(results.iter().all(Result::is_ok));
        matches!(last, Some(Err(ControlError::Version)))
    }

    #[test]
    fn the_number_of_events_is_bounded() {
        let started = || Event::Started(Timeline::starting_at(Instant(0)));
        assert!(refuses_the_last(&mut Events::default(), [started(), started()]));
        let refused = || Event::PrebootRefused(String::new());
        assert!(refuses_the_last(&mut Events::default(), [refused(), started(), refused()]));
        let failures = || (0..=MAX_DEVICE_FAILURES).map(|_| Event::DeviceFailed("disk".to_owned()));
        assert!(refuses_the_last(&mut Events::default(), failures()));
        assert!(!refuses_the_last(&mut Events::default(), failures().skip(1)));
    }

    #[test]
    fn nothing_follows_the_last_event() {
        for event in
            [Event::Prebooted, Event::DeviceFailed("disk".to_owned()), Event::Answer(1, Answer::Done)]
        {
            let mut events = Events::default();
            events.new_query();
            assert!(refuses_the_last(&mut events, [Event::Prebooted, event]));
            assert!(events.is_over());
        }
    }

    #[test]
    fn an_answer_needs_a_query() {
        let answer = || Event::Answer(1, Answer::Done);
        assert!(refuses_the_last(&mut Events::default(), [answer()]));
        let mut events = Events::default();
        assert_eq!((events.new_query(), events.new_query()), (1, 2));
        assert!(refuses_the_last(&mut events, [answer(), answer(), answer()]));
    }
}
