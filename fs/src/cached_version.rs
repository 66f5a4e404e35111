//! The version of a file that the guest has cached, for close-to-open consistency.
//!
//! The guest caches the attributes of a file for a while, and would read a file that has changed on the host only up to
//! the cached length. Therefore the first open of a changed file fails with ESTALE. The guest's kernel then looks the
//! name up again, in spite of its cache, and retries the open (`do_filp_open` in fs/namei.c, `fuse_dentry_revalidate`
//! in fs/fuse/dir.c). It retries only once: a second ESTALE would reach the program. The file may have changed again in
//! the meantime, and other threads may open it, so the retry is tracked for each thread of the guest.

use rustix::fs::Stat;
use std::sync::{Mutex, PoisonError};

/// Maximum number of threads that are tracked per file. Further threads open the file without a new lookup.
const REFUSED_MAX: usize = 64;

/// The version of a file that the guest has cached.
#[derive(Debug, Default)]
pub(crate) struct CachedVersion(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    version: Option<Version>,
    /// The threads of the guest that got ESTALE and have not retried yet.
    refused: Vec<i32>,
}

/// The size and the modification time.
type Version = (i64, i64, i64);

impl CachedVersion {
    /// Records the attributes that are sent to the guest.
    pub(crate) fn update(&self, stat: &Stat) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).version = Some(version(stat));
    }

    /// Whether a thread that opens the file has to look it up again: because it differs from the cached version, or
    /// because its last name was removed, so that the name may belong to a new file. A thread with the id 0, of another
    /// PID namespace, is never refused.
    pub(crate) fn is_stale(&self, stat: &Stat, thread: i32) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = state.refused.iter().position(|refused| *refused == thread) {
            state.refused.swap_remove(at);
            return false;
        }
        let is_changed = stat.st_nlink == 0 || state.version.is_some_and(|cached| cached != version(stat));
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
        let cached_version = CachedVersion::default();
        let stat = |file: &tempfile::NamedTempFile| fstat(file.as_file()).unwrap();
        assert!(!cached_version.is_stale(&stat(&file), 1), "the guest has cached nothing");
        cached_version.update(&stat(&file));
        assert!(!cached_version.is_stale(&stat(&file), 1));
        file.write_all(b"more").unwrap();
        assert!(cached_version.is_stale(&stat(&file), 1));
        cached_version.update(&stat(&file));
        assert!(!cached_version.is_stale(&stat(&file), 1));
        // A file that changes between lookup and open is not refused again.
        file.write_all(b"more").unwrap();
        assert!(cached_version.is_stale(&stat(&file), 1));
        assert!(!cached_version.is_stale(&stat(&file), 1));
        cached_version.update(&stat(&file));
        std::fs::remove_file(file.path()).unwrap();
        assert!(cached_version.is_stale(&stat(&file), 1), "another file may have its name");
        assert!(!cached_version.is_stale(&stat(&file), 1));
    }

    /// Several threads open a file that changes all the time: each is refused once, whatever the others do.
    #[test]
    fn no_thread_is_refused_twice() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let cached_version = CachedVersion::default();
        let mut open = |thread| {
            cached_version.update(&fstat(file.as_file()).unwrap());
            file.write_all(b"more").unwrap();
            cached_version.is_stale(&fstat(file.as_file()).unwrap(), thread)
        };
        assert!(open(1));
        assert!(open(2));
        assert!(!open(2));
        assert!(!open(1), "the retry of another thread does not count");
        assert!(!open(0), "a thread of another PID namespace");
        assert_eq!((1..200).filter(|thread| open(*thread)).count(), REFUSED_MAX);
    }
}
