//! The directory of a destination, for a sender that is not trusted.

use crate::failure::{Failure, FailureKind};
use alloc::vec::Vec;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2, readlinkat};
use rustix::io::Errno;
use rustix::process::geteuid;

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Opens a directory component by component. A symbolic link is followed if root owns it and the caller is not root, or if
/// it leads to a directory below the one in which it stands: a sender with access to that directory gains nothing by it.
/// Other links may be the sender's, and lead to directories that only the caller can write.
///
/// # Errors
/// When the directory does not exist, or a link is not followed.
pub(crate) fn open_directory(path: &[u8]) -> Result<OwnedFd, Failure> {
    walk(CWD, path, 0).map_err(|(error, end)| match error {
        Errno::XDEV => Failure::new(FailureKind::LinkAway, &path[..end]),
        error => Failure::of(FailureKind::Open, path)(error),
    })
}

/// Walks along a path. An error has the length of the path up to the component at which it occurred; it is EXDEV if that is
/// a link that is not followed.
fn walk(from: BorrowedFd<'_>, path: &[u8], links: u32) -> Result<OwnedFd, (Errno, usize)> {
    let start: &[u8] = if path.starts_with(b"/") { b"/" } else { b"." };
    let mut directory = openat(from, start, DIRECTORY, Mode::empty()).map_err(|error| (error, 0))?;
    let mut end = 0;
    for name in path.split(|&byte| byte == b'/') {
        end += name.len();
        if !name.is_empty() {
            let entry = match openat(&directory, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty()) {
                Err(Errno::NOTDIR | Errno::LOOP) => follow(directory.as_fd(), name, links),
                result => result,
            };
            directory = entry.map_err(|error| (error, end))?;
        }
        end += 1;
    }
    Ok(directory)
}

/// Opens the directory to which a link leads. The error is EXDEV if the link is not followed.
fn follow(directory: BorrowedFd<'_>, name: &[u8], links: u32) -> Result<OwnedFd, Errno> {
    /// As in the kernel (`MAXSYMLINKS` in include/linux/namei.h).
    const LINKS_MAX: u32 = 40;
    // Owner and target are those of one link, even if another one replaces it.
    let link = openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let stat = fstat(&link)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        return Err(Errno::NOTDIR);
    }
    let target = readlinkat(&link, "", Vec::new())?;
    if stat.st_uid == 0 && !geteuid().is_root() {
        // The same applies to links in the target.
        return if links == LINKS_MAX {
            Err(Errno::LOOP)
        } else {
            walk(directory, target.as_bytes(), links + 1).map_err(|(error, _)| error)
        };
    }
    openat2(directory, target, DIRECTORY, Mode::empty(), ResolveFlags::BENEATH)
}
