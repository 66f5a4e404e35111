//! Directories that are being created or removed, and those that killed processes left behind.
//!
//! Such a directory has a temporary name, and the process that works on it holds the directory's lock, which is the first
//! file created in it and the last one removed.

use super::LOCK;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::Errno;
use std::io;
use std::path::Path;

/// A unique name for a directory that is being created or removed. No guest can have it, because it starts with a dot.
/// Processes in different PID namespaces can have the same runtime directory, so that it is random.
pub(super) fn temporary_name() -> String {
    format!(".{:016x}", crate::token())
}

fn is_temporary_name(name: &str) -> bool {
    let number = name.strip_prefix('.');
    number.is_some_and(|number| number.len() == 16 && number.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Removes a directory, its lock last.
pub(super) fn remove(folder: &Path) -> io::Result<()> {
    for entry in folder.read_dir()? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name != LOCK) {
            // Guests have no directories in theirs.
            std::fs::remove_file(path)?;
        }
    }
    match std::fs::remove_file(folder.join(LOCK)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => std::fs::remove_dir(folder),
    }
}

/// Removes a directory with a temporary name if no process works on it. A process that has created one without having
/// locked it yet loses it, and creates another.
pub(super) fn remove_if_abandoned(parent: &Path, name: &str) {
    if !is_temporary_name(name) {
        return;
    }
    let folder = parent.join(name);
    let lock = match open(folder.join(LOCK), OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
    {
        Err(Errno::NOENT) => {
            // Only an empty directory is removed: it may be locked by now.
            let _ = std::fs::remove_dir(&folder);
            return;
        }
        Err(_) => return,
        Ok(lock) => lock,
    };
    // The new name makes its creator, who cannot lock it any more, fail in whatever it does next.
    let aside = parent.join(temporary_name());
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
        && std::fs::rename(&folder, &aside).is_ok()
    {
        let _ = remove(&aside);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{create_dir, write};

    #[test]
    fn only_directories_that_no_process_has_locked_are_removed() {
        let parent = tempfile::tempdir().unwrap();
        let make = |name: &str, files: &[&str]| {
            create_dir(parent.path().join(name)).unwrap();
            files.iter().for_each(|file| write(parent.path().join(name).join(file), "").unwrap());
        };
        make(".0000000000000000", &[]);
        make(".0000000000000001", &[LOCK, "front", "vsock"]);
        make(".0000000000000002", &[LOCK]);
        // It is not empty, and may be locked by the time of the check.
        make(".0000000000000003", &["front"]);
        make(".draft", &[LOCK]);
        make("guest", &[LOCK]);
        let held = std::fs::File::open(parent.path().join(".0000000000000002").join(LOCK)).unwrap();
        flock(&held, FlockOperation::LockShared).unwrap();
        let names = || {
            let entries = parent.path().read_dir().unwrap();
            let mut names: Vec<_> =
                entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        for name in names() {
            remove_if_abandoned(parent.path(), &name);
        }
        assert_eq!(names(), [".0000000000000002", ".0000000000000003", ".draft", "guest"]);
    }

    #[test]
    fn names_of_guests_are_not_temporary() {
        assert!(is_temporary_name(&temporary_name()));
        for name in
            ["", ".", "..", ".1", "0123456789abcdef", ".0123456789abcdeg", ".0123456789abcdef0", ".draft"]
        {
            assert!(!is_temporary_name(name), "{name}");
        }
    }
}
