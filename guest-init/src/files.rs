//! Directories and small files, such as those of the kernel.

use core::mem::MaybeUninit;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, RawDir, RawDirEntry, openat};
use rustix::io::Errno;
use rustix::path::Arg;

/// Buffer size for directory entries in bytes.
const ENTRIES: usize = 2048;

/// Opens a directory for [`each_entry`], and not through a symbolic link.
pub(crate) fn open_directory(parent: impl AsFd, path: impl Arg) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(parent, path, flags, Mode::empty())
}

/// Calls `action` for each entry of a directory but `.` and `..`, until an error.
#[inline(never)]
pub(crate) fn each_entry(
    directory: &OwnedFd,
    action: &mut dyn FnMut(&RawDirEntry<'_>) -> Result<(), Errno>,
) -> Result<(), Errno> {
    let mut buffer = [MaybeUninit::uninit(); ENTRIES];
    let mut entries = RawDir::new(directory, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        if ![c".", c".."].contains(&entry.file_name()) {
            action(&entry)?;
        }
    }
    Ok(())
}

/// Writes a file with one call, as the kernel requires it of its own files. A new file is readable for all.
#[inline(never)]
pub(crate) fn write(parent: impl AsFd, path: &[u8], flags: OFlags, content: &[u8]) -> Result<(), Errno> {
    let flags = flags | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = openat(parent, path, flags, Mode::from_raw_mode(0o644))?;
    rustix::io::write(file, content).map(drop)
}

/// Parses the number of a process or descriptor, which the kernel has formatted.
pub(crate) fn number(digits: &[u8]) -> Option<i32> {
    core::str::from_utf8(digits).ok()?.parse().ok()
}
