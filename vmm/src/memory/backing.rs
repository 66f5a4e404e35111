//! Files that guest memory is mapped from, and what became of them.

use rustix::fs::{CWD, fstat, inotify, readlinkat_raw};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

/// A file that guest memory is mapped from. If somebody makes it shorter, pages of the guest are gone. This process gets
/// SIGBUS where it touches them. Where the guest does, KVM fails with EFAULT if interrupts are off; if they are on, it
/// waits for the page to come (`kvm_can_do_async_pf` in arch/x86/kvm/x86.c), and asks again for ever.
#[derive(Debug)]
pub struct BackingFile {
    file: File,
    length: i64,
    /// Whether it belongs to others as well.
    is_shared: bool,
    /// Where the host says what its path is.
    link: CString,
}

impl BackingFile {
    /// What is said of one that is not as long as it was, behind its path.
    pub const MADE_SHORTER: &str =
        " is memory of the guest, and somebody made it shorter while the guest ran";

    /// Notes how long it is. One that is shared is watched while the guest runs ([`watch`]).
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(file: &File, is_shared: bool) -> io::Result<Self> {
        let file = file.try_clone()?;
        let length = fstat(&file)?.st_size;
        let link = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        Ok(Self { file, length, is_shared, link })
    }

    /// Whether it is shorter than it was. May be called in a signal handler.
    #[must_use]
    pub fn is_shorter(&self) -> bool {
        fstat(&self.file).is_ok_and(|now| now.st_size < self.length)
    }

    /// Its path, or as much of it as there is room for. May be called in a signal handler.
    pub fn path<'a>(&self, room: &'a mut [u8]) -> &'a [u8] {
        match readlinkat_raw(CWD, self.link.as_c_str(), &mut *room) {
            Ok(length) => &room[..length],
            Err(_) => b"a file",
        }
    }
}

/// Readable when one of these files has been written or made shorter, if one is shared. The others are this program's
/// own, and a watch makes the end of a process wait for the kernel (`fsnotify_destroy_group` in fs/notify/group.c).
///
/// # Errors
/// When the host has no watches left: a user has 128 of them at a time, unless the host is told otherwise.
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
    fn a_file_that_was_made_shorter_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(5000).unwrap();
        let backing = BackingFile::new(file.as_file(), true).unwrap();
        for (length, is_shorter) in [(5000, false), (9000, false), (4999, true), (0, true)] {
            file.as_file().set_len(length).unwrap();
            assert_eq!(backing.is_shorter(), is_shorter, "{length}");
        }
        let path = file.path().to_str().unwrap().as_bytes();
        assert_eq!(backing.path(&mut [0; 256]), path);
        assert_eq!(backing.path(&mut [0; 3]), &path[..3]);
    }
}
