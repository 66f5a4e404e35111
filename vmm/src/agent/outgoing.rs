//! What the host says to a guest's agent over a control connection.
//!
//! A guest may take it late or never: the connection takes no more when the guest gives no credit. Nothing here waits
//! for that, and what waits has a bound: a size of the terminal takes the place of the one before it, and a signal that
//! waits already is not added, as with a process's own pending signals.

use guest_protocol::agent::{Message, TerminalSize};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What is said of a process that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Signal(u8),
    Resize(TerminalSize),
    EndInput,
    TellStart,
}

impl Order {
    const fn message(self) -> Message<'static> {
        match self {
            Self::Signal(number) => Message::Signal(number),
            Self::Resize(size) => Message::Resize(size),
            Self::EndInput => Message::EndInput,
            Self::TellStart => Message::ReportStart,
        }
    }
}

/// The writing half of a control connection.
#[derive(Debug)]
pub(super) struct Outgoing {
    stream: UnixStream,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// What the connection has not taken of the message that it began with, or of the one whose turn it is.
    begun: Vec<u8>,
    orders: VecDeque<Order>,
}

impl Outgoing {
    /// Of a connection that begins with these bytes.
    pub(super) const fn new(stream: UnixStream, first: Vec<u8>) -> Self {
        Self { stream, waiting: Mutex::new(Waiting { begun: first, orders: VecDeque::new() }) }
    }

    /// The connection, for what the guest says.
    pub(super) const fn stream(&self) -> &UnixStream {
        &self.stream
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the connection has taken all that was said.
    pub(super) fn is_empty(&self) -> bool {
        let waiting = self.waiting();
        waiting.begun.is_empty() && waiting.orders.is_empty()
    }

    /// Says something now, or when the connection takes it.
    pub(super) fn say(&self, order: Order) {
        self.waiting().add(order);
        self.flush();
    }

    /// Goes on with what waits, as far as the connection takes it.
    pub(super) fn flush(&self) {
        let waiting = &mut *self.waiting();
        while waiting.has_begun() {
            match send(&self.stream, &waiting.begun, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => drop(waiting.begun.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // A guest that is gone does not want to know.
                Err(_) => *waiting = Waiting::default(),
            }
        }
    }
}

impl Waiting {
    fn add(&mut self, order: Order) {
        if matches!(order, Order::Resize(_)) {
            self.orders.retain(|waiting| !matches!(waiting, Order::Resize(_)));
        }
        if !self.orders.contains(&order) {
            self.orders.push_back(order);
        }
    }

    /// Whether there is something to send, which `begun` then has.
    fn has_begun(&mut self) -> bool {
        if self.begun.is_empty()
            && let Some(order) = self.orders.pop_front()
        {
            order.message().encode(&mut self.begun);
        }
        !self.begun.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    /// Messages that arrive when the other end reads at last.
    fn arrive(outgoing: &Outgoing, mut there: UnixStream) -> Vec<Order> {
        there.set_nonblocking(true).unwrap();
        let mut bytes = Vec::new();
        loop {
            let before = bytes.len();
            let _ = there.read_to_end(&mut bytes);
            outgoing.flush();
            if bytes.len() == before && outgoing.is_empty() {
                break;
            }
        }
        let (mut rest, mut orders) = (&bytes[..], Vec::new());
        while let Some((message, length)) = Message::split(rest).unwrap() {
            orders.push(match message {
                Message::Signal(number) => Order::Signal(number),
                Message::Resize(size) => Order::Resize(size),
                Message::EndInput => Order::EndInput,
                Message::ReportStart => Order::TellStart,
                _ => panic!("{message:?}"),
            });
            rest = &rest[length..];
        }
        assert!(rest.is_empty(), "half a message");
        orders
    }

    #[test]
    fn a_guest_that_takes_nothing_lets_nobody_wait_and_gets_what_counts_in_the_end() {
        let (here, there) = UnixStream::pair().unwrap();
        let outgoing = Outgoing::new(here, Vec::new());
        let resize = |rows| Order::Resize(TerminalSize { rows, columns: 80 });
        for rows in 0..20_000 {
            outgoing.say(resize(rows));
            outgoing.say(Order::Signal(if rows % 2 == 0 { 2 } else { 15 }));
        }
        outgoing.say(Order::EndInput);
        outgoing.say(Order::EndInput);
        assert!(!outgoing.is_empty(), "the socket takes everything");
        assert!(outgoing.waiting().orders.len() <= 4);
        let orders = arrive(&outgoing, there);
        for expected in [resize(19_999), Order::Signal(2), Order::Signal(15), Order::EndInput] {
            assert!(orders.iter().rev().take(5).any(|order| *order == expected), "{expected:?} is lost");
        }
        assert_eq!(orders.iter().filter(|order| **order == Order::EndInput).count(), 1);
    }

    #[test]
    fn a_guest_that_is_gone_is_told_nothing() {
        let (here, there) = UnixStream::pair().unwrap();
        let outgoing = Outgoing::new(here, vec![1; 100]);
        drop(there);
        outgoing.say(Order::Signal(15));
        assert!(outgoing.is_empty());
    }
}
