//! Pending lock requests (FUSE_SETLKW), which do not block other requests.
//!
//! The kernel of the host reports a released lock only to a thread that is blocked in the request. Therefore pending
//! requests are retried: after each request, since the guest itself may have released the lock, and periodically, since
//! another process may have.

use crate::folder::{Folder, LockFile, LockRequest};
use rustix::event::Timespec;
use std::io;

/// Maximum number of pending requests. Each occupies an entry of the guest's virtqueue, which other requests need, too.
const PENDING_MAX: usize = 64;
/// The delay between retries in nanoseconds, which doubles from the minimum to the maximum.
const MIN_RETRY_DELAY: i64 = 1_000_000;
const MAX_RETRY_DELAY: i64 = 64_000_000;

/// The unique id of a request.
pub(crate) type Unique = u64;

/// The pending requests, oldest first.
#[derive(Debug)]
pub(crate) struct PendingLocks {
    requests: Vec<(Unique, LockRequest, Option<LockFile>)>,
    delay: i64,
}

impl PendingLocks {
    pub(crate) const fn new() -> Self {
        Self { requests: Vec::new(), delay: MIN_RETRY_DELAY }
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Tries to lock. Returns the result, or none if the request is now pending.
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
        if self.requests.len() == PENDING_MAX {
            return Some(Err(io::Error::from_raw_os_error(libc::ENOLCK)));
        }
        self.requests.push((unique, request, spare));
        self.delay = MIN_RETRY_DELAY;
        None
    }

    /// Retries all pending requests and returns the results of those that are done.
    pub(crate) fn retry(&mut self, folder: &Folder) -> Vec<(Unique, io::Result<()>)> {
        let mut replies = Vec::new();
        self.requests.retain_mut(|(unique, request, spare)| match folder.try_lock(request, spare) {
            Err(error) if is_held(&error) => true,
            result => {
                replies.push((*unique, result));
                false
            }
        });
        replies
    }

    /// Removes a pending request, and returns whether it was pending.
    pub(crate) fn interrupt(&mut self, unique: Unique) -> bool {
        let before = self.requests.len();
        self.requests.retain(|(waiting, ..)| *waiting != unique);
        self.requests.len() < before
    }

    /// Removes all pending requests.
    pub(crate) fn interrupt_all(&mut self) -> Vec<Unique> {
        self.requests.drain(..).map(|(unique, ..)| unique).collect()
    }

    /// The time until the next retry.
    pub(crate) fn next_delay(&mut self) -> Timespec {
        let delay = self.delay;
        self.delay = MAX_RETRY_DELAY.min(delay * 2);
        Timespec { tv_sec: 0, tv_nsec: delay }
    }
}

/// Whether another owner holds a conflicting lock.
fn is_held(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}
