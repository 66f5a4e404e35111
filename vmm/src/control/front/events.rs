//! Events of a monitor, as its front receives them: bounded, and in order also where an answer was waited for.

use super::super::channel::Channel;
use super::super::{ControlError, EVENT_MAX, Event};
use std::collections::VecDeque;

/// Events that answer no request: one of each kind, and one for each device.
const UNASKED_MAX: u32 = 64;

/// Events between their arrival and [`super::Monitor::next_event`], and how many there may be. A guest that has taken
/// over its monitor could send them without end.
#[derive(Debug, Default)]
pub(super) struct Events {
    /// Those that arrived while an answer was waited for.
    waiting: VecDeque<Event>,
    /// Events so far that answer no request.
    unasked: u32,
    /// Requests whose answers have not arrived.
    asked: u32,
}

impl Events {
    /// A request is sent that is answered.
    pub(super) const fn ask(&mut self) {
        self.asked = self.asked.saturating_add(1);
    }

    /// Keeps an event for later.
    pub(super) fn keep(&mut self, event: Event) {
        self.waiting.push_back(event);
    }

    /// An event that was kept, in order.
    pub(super) fn kept(&mut self) -> Option<Event> {
        self.waiting.pop_front()
    }

    /// Whether an event was kept.
    pub(super) fn has_kept(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Receives an event that has arrived.
    pub(super) fn receive(&mut self, channel: &Channel) -> Result<Event, ControlError> {
        let (event, _) = channel.receive::<Event>(EVENT_MAX)?.ok_or(ControlError::Gone)?;
        let count = match event {
            Event::Stopped(_) | Event::Failed(_) | Event::Prebooted => return Ok(event),
            Event::Paused | Event::Resumed | Event::Statistics(_) => self.asked.checked_sub(1),
            Event::PrebootRefused(_) | Event::Started(_) | Event::DeviceFailed(_) => {
                self.unasked += 1;
                (self.unasked <= UNASKED_MAX).then_some(self.asked)
            }
        };
        self.asked = count.ok_or(ControlError::Version)?;
        Ok(event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_monitor_cannot_send_events_without_end() {
        let (front, monitor) = UnixStream::pair().unwrap();
        let (front, monitor) = (Channel::new(front), Channel::new(monitor));
        let mut events = Events::default();
        for _ in 0..UNASKED_MAX {
            monitor.send(&Event::DeviceFailed("disk".to_owned()), EVENT_MAX, &[]).unwrap();
            events.receive(&front).unwrap();
        }
        monitor.send(&Event::DeviceFailed("disk".to_owned()), EVENT_MAX, &[]).unwrap();
        assert!(matches!(events.receive(&front), Err(ControlError::Version)));
        // An answer without a request.
        let mut events = Events::default();
        monitor.send(&Event::Paused, EVENT_MAX, &[]).unwrap();
        assert!(matches!(events.receive(&front), Err(ControlError::Version)));
        events.ask();
        monitor.send(&Event::Paused, EVENT_MAX, &[]).unwrap();
        assert!(matches!(events.receive(&front), Ok(Event::Paused)));
        monitor.send(&Event::Resumed, EVENT_MAX, &[]).unwrap();
        assert!(matches!(events.receive(&front), Err(ControlError::Version)));
        drop(monitor);
        assert!(matches!(events.receive(&front), Err(ControlError::Gone)));
    }
}
