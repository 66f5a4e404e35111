//! What the guest was told of a file, which it believes for a while.
//!
//! A file that changed on the host since then would be read up to the length that it had. So opening it is answered
//! ESTALE, once: the guest's kernel then looks its name up anew, whatever it believes, and opens what it has found
//! (`do_filp_open` in fs/namei.c, `fuse_dentry_revalidate` in fs/fuse/dir.c). It does so once; a second ESTALE would be
//! the program's. A file may have changed again meanwhile, and others may open it, so that each thread of the guest has
//! its own turn.

use rustix::fs::Stat;
use std::sync::{Mutex, PoisonError};

/// Threads of the guest that may be looking up a file at a time. Others open it as it is.
const REFUSED_MAX: usize = 64;

/// What the guest was told.
#[derive(Debug, Default)]
pub(crate) struct Seen(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    version: Option<Version>,
    /// The guest's threads that were sent back and have not come again.
    refused: Vec<i32>,
}

/// Size and time of the last change.
type Version = (i64, i64, i64);

impl Seen {
    /// The guest is told.
    pub(crate) fn tell(&self, stat: &Stat) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).version = Some(version(stat));
    }

    /// Whether a thread that opens the file has to look it up again: it is another one than the guest believes, or its
    /// last name has gone, maybe to a new file. A thread without a number is never told so.
    pub(crate) fn is_stale(&self, stat: &Stat, thread: i32) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = state.refused.iter().position(|refused| *refused == thread) {
            state.refused.swap_remove(at);
            return false;
        }
        let is_changed = stat.st_nlink == 0 || state.version.is_some_and(|seen| seen != version(stat));
        let is_refused = is_changed && thread != 0 && state.refused.len() < REFUSED_MAX;
        if is_refused {
            state.refused.push(thread);
        }
        is_refused
    }
}

const fn version(stat: &Stat) -> Version {
    (stat.st_size, stat.st_mtime, stat.st_mtime_nsec.cast_signed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::fstat;
    use std::io::Write;

    #[test]
    fn a_file_that_changed_is_looked_up_again_once() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let seen = Seen::default();
        let stat = |file: &tempfile::NamedTempFile| fstat(file.as_file()).unwrap();
        assert!(!seen.is_stale(&stat(&file), 1), "the guest was told of nothing");
        seen.tell(&stat(&file));
        assert!(!seen.is_stale(&stat(&file), 1));
        file.write_all(b"more").unwrap();
        assert!(seen.is_stale(&stat(&file), 1));
        seen.tell(&stat(&file));
        assert!(!seen.is_stale(&stat(&file), 1));
        // One that changes between look and open is not refused without end.
        file.write_all(b"more").unwrap();
        assert!(seen.is_stale(&stat(&file), 1));
        assert!(!seen.is_stale(&stat(&file), 1));
        seen.tell(&stat(&file));
        std::fs::remove_file(file.path()).unwrap();
        assert!(seen.is_stale(&stat(&file), 1), "another may have its name");
        assert!(!seen.is_stale(&stat(&file), 1));
    }

    /// Threads that open a file which changes all the time: each is sent back once, whatever the others do.
    #[test]
    fn no_thread_is_sent_back_twice() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let seen = Seen::default();
        let mut open = |thread| {
            seen.tell(&fstat(file.as_file()).unwrap());
            file.write_all(b"more").unwrap();
            seen.is_stale(&fstat(file.as_file()).unwrap(), thread)
        };
        assert!(open(1));
        assert!(open(2));
        assert!(!open(2));
        assert!(!open(1), "the other's second turn is not this one's");
        assert!(!open(0), "a thread of another namespace");
        assert_eq!((1..200).filter(|thread| open(*thread)).count(), REFUSED_MAX);
    }
}
