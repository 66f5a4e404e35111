//! The one epoll. A descriptor is reported once and has to be asked for again: a closed pipe would be reported
//! without end, even to those who do not want to know.

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;

/// What a descriptor is.
#[derive(Clone, Copy)]
pub(super) enum Token {
    Listener,
    Signals,
    Newcomer(usize),
    Control(usize),
    /// Says that a session's program is executed.
    Execution(usize),
    /// A session's stream of a number.
    Stream(usize, usize),
}

impl Token {
    const fn to_bits(self) -> u64 {
        match self {
            Self::Listener => 0,
            Self::Signals => 1,
            Self::Newcomer(slot) => ((slot as u64) << 8) | 2,
            Self::Control(slot) => ((slot as u64) << 8) | 3,
            Self::Execution(slot) => ((slot as u64) << 8) | 4,
            Self::Stream(slot, number) => ((slot as u64) << 8) | (5 + number as u64),
        }
    }

    fn from_bits(bits: u64) -> Self {
        let slot = usize::try_from(bits >> 8).unwrap_or(usize::MAX);
        match bits & 0xff {
            0 => Self::Listener,
            1 => Self::Signals,
            2 => Self::Newcomer(slot),
            3 => Self::Control(slot),
            4 => Self::Execution(slot),
            number => Self::Stream(slot, usize::try_from(number).unwrap_or(usize::MAX).saturating_sub(5)),
        }
    }
}

pub(super) struct Watch(OwnedFd);

impl Watch {
    /// Events that are taken at once.
    const EVENTS: usize = 32;

    pub(super) fn new() -> Result<Self, Errno> {
        epoll::create(CreateFlags::CLOEXEC).map(Self)
    }

    /// Asks for a descriptor's next event.
    pub(super) fn once(&self, descriptor: impl AsFd, token: Token, flags: EventFlags) {
        let (data, flags) = (EventData::new_u64(token.to_bits()), flags | EventFlags::ONESHOT);
        if let Err(Errno::NOENT) = epoll::modify(&self.0, descriptor.as_fd(), data, flags) {
            // It fails where the kernel has no memory left for another one; that stream then stands still.
            let _ = epoll::add(&self.0, descriptor.as_fd(), data, flags);
        }
    }

    /// Waits for events.
    pub(super) fn wait(&self) -> impl Iterator<Item = Token> + use<> {
        let mut events = alloc::vec::Vec::with_capacity(Self::EVENTS);
        // An error is a signal's; there is nothing to serve then.
        let _ = epoll::wait(&self.0, rustix::buffer::spare_capacity(&mut events), None);
        events.into_iter().map(|event: epoll::Event| Token::from_bits(event.data.u64()))
    }
}
