//! One stream of a process on its way: from one descriptor to another, without a copy of its own where one is a pipe.

use super::watch::{Token, Watch};
use alloc::vec::Vec;
use rustix::event::epoll::EventFlags;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};

/// Bytes that are moved at once: what a pipe holds.
const CHUNK: usize = 64 << 10;
/// Of a terminal.
const TERMINAL_CHUNK: usize = 4 << 10;
/// Times that a stream goes on before others have their turn.
const TURNS: u32 = 16;

#[derive(Default)]
pub(super) struct Pump {
    pub(super) source: Option<OwnedFd>,
    pub(super) target: Option<OwnedFd>,
    /// Neither of them is a pipe.
    pub(super) is_terminal: bool,
    /// What a terminal said or is to be told and the other side has not taken.
    rest: Vec<u8>,
    /// Bytes that still belong to the process, which has ended.
    left: Option<u64>,
}

enum Step {
    Moved(usize),
    /// The source has nothing now.
    Empty,
    /// The target takes nothing now.
    Full,
    /// The source has ended, or the target is gone.
    Ended,
}

impl Pump {
    /// The process has ended: what it wrote is still delivered, and what its children write from now on is not.
    pub(super) fn cut(&mut self) {
        match &self.source {
            None => self.close(),
            Some(_) if self.is_terminal => {}
            Some(source) => self.left = rustix::io::ioctl_fionread(source).ok(),
        }
    }

    /// Ends the stream: its reader finds its end, and its writer nobody who reads.
    pub(super) fn close(&mut self) {
        (self.source, self.target) = (None, None);
        self.rest = Vec::new();
    }

    /// Moves what can be moved now, and asks to be called when there is more.
    pub(super) fn advance(&mut self, watch: &Watch, token: Token) {
        for _ in 0..TURNS {
            if self.source.is_some() && self.left == Some(0) {
                self.discard();
            }
            let (Some(source), Some(target)) = (&self.source, &self.target) else { return };
            let step = if self.is_terminal {
                copy(source, target, &mut self.rest)
            } else {
                move_pages(source, target)
            };
            match step {
                Step::Moved(count) => self.left = self.left.map(|left| left.saturating_sub(count as u64)),
                Step::Empty => return watch.once(source, token, EventFlags::IN),
                Step::Full => return watch.once(target, token, EventFlags::OUT),
                Step::Ended => return self.close(),
            }
        }
        if let Some(source) = &self.source {
            watch.once(source, token, EventFlags::IN);
        }
    }

    /// Whether there is something to read that nobody has come for. Asks to be called when there may be; a stream that
    /// has ended without it is closed.
    pub(super) fn has_unclaimed(&mut self, watch: &Watch, token: Token) -> bool {
        let (Some(source), None) = (&self.source, &self.target) else { return false };
        let state = state(source);
        if !state.intersects(PollFlags::IN | PollFlags::HUP) {
            watch.once(source, token, EventFlags::IN);
        } else if !state.contains(PollFlags::IN) {
            self.close();
        }
        state.contains(PollFlags::IN)
    }

    /// From here on nobody wants what comes; a program that a closed pipe would end goes on.
    fn discard(&mut self) {
        self.left = None;
        self.target = open("/dev/null", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).ok();
        if self.target.is_none() {
            self.source = None;
        }
    }
}

/// Moves pages between a pipe and something else. Without waiting: the pipe because of the flag, the other because it
/// was opened so.
fn move_pages(source: &OwnedFd, target: &OwnedFd) -> Step {
    match splice(source, None, target, None, CHUNK, SpliceFlags::NONBLOCK | SpliceFlags::MOVE) {
        Ok(0) => Step::Ended,
        Ok(count) => Step::Moved(count),
        // One of the two has to wait; the kernel does not say which.
        Err(Errno::AGAIN) if !state(source).is_empty() => Step::Full,
        Err(Errno::AGAIN | Errno::INTR) => Step::Empty,
        Err(_) => Step::Ended,
    }
}

/// Whether there is something to read, and whether nobody can write any more.
fn state(source: &OwnedFd) -> PollFlags {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut polled = [PollFd::new(source, PollFlags::IN)];
    let _ = poll(&mut polled, Some(&now));
    polled[0].revents()
}

fn copy(source: &OwnedFd, target: &OwnedFd, rest: &mut Vec<u8>) -> Step {
    if rest.is_empty() {
        let mut buffer = [0; TERMINAL_CHUNK];
        match rustix::io::read(source.as_fd(), &mut buffer) {
            Ok(0) => return Step::Ended,
            Ok(count) => rest.extend_from_slice(&buffer[..count]),
            Err(Errno::AGAIN | Errno::INTR) => return Step::Empty,
            // EIO: no process has the terminal any more.
            Err(_) => return Step::Ended,
        }
    }
    match rustix::io::write(target, rest) {
        Ok(count) => {
            rest.drain(..count);
            Step::Moved(count)
        }
        Err(Errno::AGAIN | Errno::INTR) => Step::Full,
        Err(_) => Step::Ended,
    }
}
