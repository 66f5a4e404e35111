//! The epoll instance. Descriptors are registered with EPOLLONESHOT and armed again for each event, because epoll
//! reports a closed pipe continuously, even if no event is requested.

use core::time::Duration;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;

/// The owner and the purpose of a descriptor.
#[derive(Clone, Copy)]
pub(super) enum Token {
    Listener,
    Signals,
    Pending(usize),
    Control(usize),
    /// The pipe that reports the exec of a session's program.
    Execution(usize),
    /// A stream of a session, by slot and number.
    Stream(usize, usize),
}

impl Token {
    const fn to_bits(self) -> u64 {
        match self {
            Self::Listener => 0,
            Self::Signals => 1,
            Self::Pending(slot) => ((slot as u64) << 8) | 2,
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
            2 => Self::Pending(slot),
            3 => Self::Control(slot),
            4 => Self::Execution(slot),
            number => Self::Stream(slot, usize::try_from(number).unwrap_or(usize::MAX).saturating_sub(5)),
        }
    }
}

pub(super) struct Epoll(OwnedFd);

impl Epoll {
    /// Maximum number of events per call of epoll_wait.
    const MAX_EVENTS: usize = 32;

    pub(super) fn new() -> Result<Self, Errno> {
        epoll::create(CreateFlags::CLOEXEC).map(Self)
    }

    /// Arms a descriptor for one event.
    pub(super) fn arm(&self, descriptor: impl AsFd, token: Token, flags: EventFlags) {
        let (data, flags) = (EventData::new_u64(token.to_bits()), flags | EventFlags::ONESHOT);
        if let Err(Errno::NOENT) = epoll::modify(&self.0, descriptor.as_fd(), data, flags) {
            // Fails if the kernel is out of memory; the stream then stalls.
            let _ = epoll::add(&self.0, descriptor.as_fd(), data, flags);
        }
    }

    /// Waits for events, for a limited time if there is a limit.
    pub(super) fn wait(&self, limit: Option<Duration>) -> impl Iterator<Item = Token> + use<> {
        let mut events = alloc::vec::Vec::with_capacity(Self::MAX_EVENTS);
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        // The only possible error is EINTR, which leaves the list empty.
        let _ = epoll::wait(&self.0, rustix::buffer::spare_capacity(&mut events), limit.as_ref());
        events.into_iter().map(|event: epoll::Event| Token::from_bits(event.data.u64()))
    }
}
