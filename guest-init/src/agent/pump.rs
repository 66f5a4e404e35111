//! Data transfer of one stream of a process, from one descriptor to another. If one of them is a pipe, splice moves the
//! data without a copy in user space.

use super::epoll::{Epoll, Token};
use alloc::vec::Vec;
use rustix::event::epoll::EventFlags;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};

/// Bytes per call of splice: the capacity of a pipe.
const CHUNK: usize = 64 << 10;
/// Bytes per read from a terminal.
const TERMINAL_CHUNK: usize = 4 << 10;
/// Maximum number of transfers before other streams are served.
const MAX_TRANSFERS: u32 = 16;

#[derive(Default)]
pub(super) struct Pump {
    pub(super) source: Option<OwnedFd>,
    pub(super) target: Option<OwnedFd>,
    /// Whether one end is a terminal and the other a socket, so that splice does not work.
    pub(super) is_terminal: bool,
    /// Bytes read from or for a terminal that are not written yet.
    pending: Vec<u8>,
    /// Bytes left to transfer after the process has ended.
    remaining: Option<u64>,
}

enum Transfer {
    Transferred(usize),
    /// The source has no data at the moment.
    SourceEmpty,
    /// The target accepts no data at the moment.
    TargetFull,
    /// The source is at EOF, or the target is closed.
    Ended,
}

impl Pump {
    /// Limits the stream to its buffered data, after the process has ended: what its children write from now on is
    /// discarded.
    pub(super) fn limit_to_buffered(&mut self) {
        match &self.source {
            None => self.close(),
            Some(_) if self.is_terminal => {}
            Some(source) => self.remaining = rustix::io::ioctl_fionread(source).ok(),
        }
    }

    /// Closes both ends: the reader gets EOF, and the writer EPIPE.
    pub(super) fn close(&mut self) {
        (self.source, self.target) = (None, None);
        self.pending = Vec::new();
    }

    /// Transfers data until one end would block, and arms the epoll instance for the next event.
    pub(super) fn advance(&mut self, epoll: &Epoll, token: Token) {
        for _ in 0..MAX_TRANSFERS {
            if self.source.is_some() && self.remaining == Some(0) {
                self.discard();
            }
            let (Some(source), Some(target)) = (&self.source, &self.target) else { return };
            let transfer = if self.is_terminal {
                copy(source, target, &mut self.pending)
            } else {
                move_pages(source, target)
            };
            match transfer {
                Transfer::Transferred(count) => {
                    self.remaining = self.remaining.map(|remaining| remaining.saturating_sub(count as u64))
                }
                Transfer::SourceEmpty => return epoll.arm(source, token, EventFlags::IN),
                Transfer::TargetFull => return epoll.arm(target, token, EventFlags::OUT),
                Transfer::Ended => return self.close(),
            }
        }
        if let Some(source) = &self.source {
            epoll.arm(source, token, EventFlags::IN);
        }
    }

    /// Whether there is data but no connection to send it to. Arms the epoll instance if there is no data yet. Closes a
    /// stream that has ended without data.
    pub(super) fn has_unclaimed(&mut self, epoll: &Epoll, token: Token) -> bool {
        let (Some(source), None) = (&self.source, &self.target) else { return false };
        let state = state(source);
        if !state.intersects(PollFlags::IN | PollFlags::HUP) {
            epoll.arm(source, token, EventFlags::IN);
        } else if !state.contains(PollFlags::IN) {
            self.close();
        }
        state.contains(PollFlags::IN)
    }

    /// Discards all further data. The stream stays open, because SIGPIPE would kill a program that still writes to it.
    fn discard(&mut self) {
        self.remaining = None;
        self.target = open("/dev/null", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).ok();
        if self.target.is_none() {
            self.source = None;
        }
    }
}

/// Moves pages between a pipe and another descriptor without blocking: SPLICE_F_NONBLOCK applies to the pipe, and the
/// other descriptor is nonblocking.
fn move_pages(source: &OwnedFd, target: &OwnedFd) -> Transfer {
    match splice(source, None, target, None, CHUNK, SpliceFlags::NONBLOCK | SpliceFlags::MOVE) {
        Ok(0) => Transfer::Ended,
        Ok(count) => Transfer::Transferred(count),
        // One end would block; the error does not tell which.
        Err(Errno::AGAIN) if !state(source).is_empty() => Transfer::TargetFull,
        Err(Errno::AGAIN | Errno::INTR) => Transfer::SourceEmpty,
        Err(_) => Transfer::Ended,
    }
}

/// Whether the source has data (POLLIN), and whether all writers are gone (POLLHUP).
fn state(source: &OwnedFd) -> PollFlags {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut polled = [PollFd::new(source, PollFlags::IN)];
    let _ = poll(&mut polled, Some(&now));
    polled[0].revents()
}

fn copy(source: &OwnedFd, target: &OwnedFd, pending: &mut Vec<u8>) -> Transfer {
    if pending.is_empty() {
        let mut buffer = [0; TERMINAL_CHUNK];
        match rustix::io::read(source.as_fd(), &mut buffer) {
            Ok(0) => return Transfer::Ended,
            Ok(count) => pending.extend_from_slice(&buffer[..count]),
            Err(Errno::AGAIN | Errno::INTR) => return Transfer::SourceEmpty,
            // EIO: no process has the terminal open any more.
            Err(_) => return Transfer::Ended,
        }
    }
    match rustix::io::write(target, pending) {
        Ok(count) => {
            pending.drain(..count);
            Transfer::Transferred(count)
        }
        Err(Errno::AGAIN | Errno::INTR) => Transfer::TargetFull,
        Err(_) => Transfer::Ended,
    }
}
