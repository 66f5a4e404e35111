//! Messages of the host to a guest's agent, over a control connection.
//!
//! A guest may read them late or never: without credit from the guest, the connection accepts no more bytes. Sending
//! does not block, and the queue is bounded: a terminal size replaces a queued one, and a signal that is queued already
//! is not added, as with the pending signals of a process.

use guest_protocol::agent::{Message, TerminalSize};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A message about a process that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostMessage {
    Signal(u8),
    Resize(TerminalSize),
    EndInput,
    ReportStart,
}

impl HostMessage {
    const fn encoded_as(self) -> Message<'static> {
        match self {
            Self::Signal(number) => Message::Signal(number),
            Self::Resize(size) => Message::Resize(size),
            Self::EndInput => Message::EndInput,
            Self::ReportStart => Message::ReportStart,
        }
    }
}

/// The write half of a control connection, with a queue.
#[derive(Debug)]
pub(super) struct Sender {
    stream: UnixStream,
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    /// Unsent bytes of the current message.
    unsent: Vec<u8>,
    messages: VecDeque<HostMessage>,
}

impl Sender {
    /// A sender whose first bytes are `first`, before any message.
    pub(super) const fn new(stream: UnixStream, first: Vec<u8>) -> Self {
        Self { stream, queue: Mutex::new(Queue { unsent: first, messages: VecDeque::new() }) }
    }

    /// The connection, for reading.
    pub(super) const fn stream(&self) -> &UnixStream {
        &self.stream
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether all bytes were sent.
    pub(super) fn is_empty(&self) -> bool {
        let queue = self.queue();
        queue.unsent.is_empty() && queue.messages.is_empty()
    }

    /// Queues a message, and sends as much of the queue as the connection accepts.
    pub(super) fn send(&self, message: HostMessage) {
        self.queue().push(message);
        self.flush();
    }

    /// Sends as much of the queue as the connection accepts. Does not block.
    pub(super) fn flush(&self) {
        let queue = &mut *self.queue();
        while queue.encode_next() {
            match send(&self.stream, &queue.unsent, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => drop(queue.unsent.drain(..count)),
                Err(Errno::INTR) => {}
                // A host without memory accepts no more bytes for now either.
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => return,
                // The guest has closed the connection; the queue has no receiver.
                Err(_) => *queue = Queue::default(),
            }
        }
    }
}

impl Queue {
    fn push(&mut self, message: HostMessage) {
        if matches!(message, HostMessage::Resize(_)) {
            self.messages.retain(|queued| !matches!(queued, HostMessage::Resize(_)));
        }
        if !self.messages.contains(&message) {
            self.messages.push_back(message);
        }
    }

    /// Encodes the next message when the current one is sent. Returns whether there are unsent bytes.
    fn encode_next(&mut self) -> bool {
        if self.unsent.is_empty()
            && let Some(message) = self.messages.pop_front()
        {
            message.encoded_as().encode(&mut self.unsent);
        }
        !self.unsent.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    /// The messages that the guest's end receives when it starts to read.
    fn receive_all(sender: &Sender, mut guest: UnixStream) -> Vec<HostMessage> {
        guest.set_nonblocking(true).unwrap();
        let mut bytes = Vec::new();
        loop {
            let before = bytes.len();
            let _ = guest.read_to_end(&mut bytes);
            sender.flush();
            if bytes.len() == before && sender.is_empty() {
                break;
            }
        }
        let (mut rest, mut messages) = (&bytes[..], Vec::new());
        while let Some((message, length)) = Message::split(rest).unwrap() {
            messages.push(match message {
                Message::Signal(number) => HostMessage::Signal(number),
                Message::Resize(size) => HostMessage::Resize(size),
                Message::EndInput => HostMessage::EndInput,
                Message::ReportStart => HostMessage::ReportStart,
                _ => panic!("{message:?}"),
            });
            rest = &rest[length..];
        }
        assert!(rest.is_empty(), "half a message");
        messages
    }

    #[test]
    fn sending_to_a_guest_that_does_not_read_does_not_block_and_keeps_the_newest_state() {
        let (host, guest) = UnixStream::pair().unwrap();
        let sender = Sender::new(host, Vec::new());
        let resize = |rows| HostMessage::Resize(TerminalSize { rows, columns: 80 });
        for rows in 0..20_000 {
            sender.send(resize(rows));
            sender.send(HostMessage::Signal(if rows % 2 == 0 { 2 } else { 15 }));
        }
        sender.send(HostMessage::EndInput);
        sender.send(HostMessage::EndInput);
        assert!(!sender.is_empty(), "the socket accepts everything");
        assert!(sender.queue().messages.len() <= 4);
        let messages = receive_all(&sender, guest);
        for expected in
            [resize(19_999), HostMessage::Signal(2), HostMessage::Signal(15), HostMessage::EndInput]
        {
            assert!(
                messages.iter().rev().take(5).any(|message| *message == expected),
                "{expected:?} is lost"
            );
        }
        assert_eq!(messages.iter().filter(|message| **message == HostMessage::EndInput).count(), 1);
    }

    #[test]
    fn messages_for_a_closed_connection_are_dropped() {
        let (host, guest) = UnixStream::pair().unwrap();
        let sender = Sender::new(host, vec![1; 100]);
        drop(guest);
        sender.send(HostMessage::Signal(15));
        assert!(sender.is_empty());
    }
}
