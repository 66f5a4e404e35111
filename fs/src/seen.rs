//! What the guest was told of a file, which it believes for a while.
//!
//! A file that changed on the host since then would be read up to the length that it had. So who opens it is answered
//! ESTALE, once: the guest's kernel then looks its name up anew, whatever it believes, and opens what it has found
//! (`do_filp_open` in fs/namei.c, `fuse_dentry_revalidate` in fs/fuse/dir.c).

use rustix::fs::Stat;
use std::sync::{Mutex, PoisonError};

/// What the guest was told.
#[derive(Debug, Default)]
pub(crate) struct Seen(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    version: Option<Version>,
    /// The last who opened it was sent back. The next one is not: a file may change all the time.
    is_refused: bool,
}

/// Size and time of the last change.
type Version = (i64, i64, i64);

impl Seen {
    /// The guest is told.
    pub(crate) fn tell(&self, stat: &Stat) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).version = Some(version(stat));
    }

    /// Whether somebody who opens the file has to look again: it is another one than the guest believes, or its last
    /// name has gone, maybe to a new file.
    pub(crate) fn is_stale(&self, stat: &Stat) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_changed = stat.st_nlink == 0 || state.version.is_some_and(|seen| seen != version(stat));
        state.is_refused = is_changed && !state.is_refused;
        state.is_refused
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
    fn who_opens_a_file_that_changed_looks_again_once() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let seen = Seen::default();
        let stat = |file: &tempfile::NamedTempFile| fstat(file.as_file()).unwrap();
        assert!(!seen.is_stale(&stat(&file)), "the guest was told of nothing");
        seen.tell(&stat(&file));
        assert!(!seen.is_stale(&stat(&file)));
        file.write_all(b"more").unwrap();
        assert!(seen.is_stale(&stat(&file)));
        seen.tell(&stat(&file));
        assert!(!seen.is_stale(&stat(&file)));
        // One that changes between look and open is not refused without end.
        file.write_all(b"more").unwrap();
        assert!(seen.is_stale(&stat(&file)));
        assert!(!seen.is_stale(&stat(&file)));
        seen.tell(&stat(&file));
        std::fs::remove_file(file.path()).unwrap();
        assert!(seen.is_stale(&stat(&file)), "another may have its name");
        assert!(!seen.is_stale(&stat(&file)));
    }
}
