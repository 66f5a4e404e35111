//! Files that guest memory is mapped from, and the detection of their truncation.

use rustix::fs::{CWD, fstat, inotify, readlinkat};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

/// A file that guest memory is mapped from. If another process truncates it, the guest loses pages. This process gets
/// SIGBUS when it accesses them. When the guest accesses them, KVM fails with EFAULT if interrupts are disabled; if
/// they are enabled, it waits for the page (`kvm_can_do_async_pf` in arch/x86/kvm/x86.c), and retries forever.
#[derive(Debug)]
pub struct BackingFile {
    file: File,
    length: i64,
    /// Whether other processes may use the file as well.
    is_shared: bool,
    /// The symbolic link in /proc that contains the path.
    link: CString,
    /// The path when the file was mapped. Later, a process in a jail cannot read the link.
    path: Vec<u8>,
}

impl BackingFile {
    /// The file.
    pub(super) const fn file(&self) -> &File {
        &self.file
    }

    /// Whether the file itself is the guest's memory, so that the guest sees all changes of it.
    pub(super) const fn is_shared(&self) -> bool {
        self.is_shared
    }

    /// The message about a truncated file, to be appended to its path.
    pub const TRUNCATED_MESSAGE: &str = " is mapped as guest memory and was truncated while the guest ran";

    /// Records the current length of the file. A shared file is watched while the guest runs.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn new(file: &File, is_shared: bool) -> io::Result<Self> {
        let file = file.try_clone()?;
        let length = fstat(&file)?.st_size;
        let link = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        let path = readlinkat(CWD, link.as_c_str(), Vec::new())
            .map_or_else(|_| b"a file".to_vec(), CString::into_bytes);
        Ok(Self { file, length, is_shared, link, path })
    }

    /// Whether the file is shorter than at its creation. Async-signal-safe.
    #[must_use]
    pub fn is_truncated(&self) -> bool {
        fstat(&self.file).is_ok_and(|now| now.st_size < self.length)
    }

    /// The path that the file had when it was mapped. Async-signal-safe.
    #[must_use]
    pub fn path(&self) -> &[u8] {
        &self.path
    }
}

/// Creates an inotify descriptor that becomes readable when one of the shared files is written or truncated; `None`
/// without shared files. Other files are private to this program, and a watch delays the end of a process
/// (`fsnotify_destroy_group` in fs/notify/group.c).
///
/// # Errors
/// When the user has no inotify instance left: by default, Linux allows 128 at a time.
pub(crate) fn watch(files: &[Arc<BackingFile>]) -> io::Result<Option<OwnedFd>> {
    if !files.iter().any(|file| file.is_shared) {
        return Ok(None);
    }
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    for file in files.iter().filter(|file| file.is_shared) {
        inotify::add_watch(&watch, file.link.as_c_str(), inotify::WatchFlags::MODIFY)?;
    }
    Ok(Some(watch))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_truncated_file_is_reported_with_its_path() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(5000).unwrap();
        let backing = BackingFile::new(file.as_file(), true).unwrap();
        for (length, is_truncated) in [(5000, false), (9000, false), (4999, true), (0, true)] {
            file.as_file().set_len(length).unwrap();
            assert_eq!(backing.is_truncated(), is_truncated, "{length}");
        }
        let path = file.path().to_str().unwrap().as_bytes();
        assert_eq!(backing.path(), path);
    }
}
