//! Locks that programs of the guest wait for, while all other requests are served.
//!
//! The host's kernel tells nobody but a thread that waits when a lock is free. So a lock is tried for again: after each
//! request, because the guest itself may have given it back, and from time to time, because another process may have.

use crate::folder::{Folder, LockFile, LockRequest};
use rustix::event::Timespec;
use std::io;

/// Requests that wait at most: each takes a place in the guest's queue, of which others must remain.
const WAITING_MAX: usize = 64;
/// Nanoseconds between two tries: few at first, and twice as many each time.
const FIRST_PAUSE: i64 = 1_000_000;
const LAST_PAUSE: i64 = 64_000_000;

/// A request's number in the stream.
pub(crate) type Unique = u64;

/// The requests that wait, the oldest first.
#[derive(Debug)]
pub(crate) struct Waiting {
    requests: Vec<(Unique, LockRequest, Option<LockFile>)>,
    pause: i64,
}

impl Waiting {
    pub(crate) const fn new() -> Self {
        Self { requests: Vec::new(), pause: FIRST_PAUSE }
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Locks, or waits; the answer where there is one.
    pub(crate) fn lock(
        &mut self,
        folder: &Folder,
        unique: Unique,
        request: LockRequest,
    ) -> Option<io::Result<()>> {
        let mut spare = None;
        match folder.try_lock(&request, &mut spare) {
            Err(error) if is_held(&error) => {}
            result => return Some(result),
        }
        if self.requests.len() == WAITING_MAX {
            return Some(Err(io::Error::from_raw_os_error(libc::ENOLCK)));
        }
        self.requests.push((unique, request, spare));
        self.pause = FIRST_PAUSE;
        None
    }

    /// Tries for each lock again; the answers.
    pub(crate) fn retry(&mut self, folder: &Folder) -> Vec<(Unique, io::Result<()>)> {
        let mut answers = Vec::new();
        self.requests.retain_mut(|(unique, request, spare)| match folder.try_lock(request, spare) {
            Err(error) if is_held(&error) => true,
            result => {
                answers.push((*unique, result));
                false
            }
        });
        answers
    }

    /// A request that the guest does not wait for any longer; whether there is one.
    pub(crate) fn interrupt(&mut self, unique: Unique) -> bool {
        let before = self.requests.len();
        self.requests.retain(|(waiting, ..)| *waiting != unique);
        self.requests.len() < before
    }

    /// All of them, when the guest begins anew.
    pub(crate) fn interrupt_all(&mut self) -> Vec<Unique> {
        self.requests.drain(..).map(|(unique, ..)| unique).collect()
    }

    /// The time until the next try.
    pub(crate) fn pause(&mut self) -> Timespec {
        let pause = self.pause;
        self.pause = LAST_PAUSE.min(pause * 2);
        Timespec { tv_sec: 0, tv_nsec: pause }
    }
}

/// Whether another owner has the lock.
fn is_held(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}
