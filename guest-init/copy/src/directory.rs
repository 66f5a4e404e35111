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
    let start: &[u8] = if path.starts_with(b"/") { b"/" } else { b"." };
    let opened = |result: Result<OwnedFd, Errno>| result.map_err(Failure::of(FailureKind::Open, path));
    let mut directory = opened(openat(CWD, start, DIRECTORY, Mode::empty()))?;
    let mut end = 0;
    for name in path.split(|&byte| byte == b'/') {
        end += name.len();
        if !name.is_empty() {
            directory = match openat(&directory, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty()) {
                Err(Errno::NOTDIR | Errno::LOOP) => match follow(directory.as_fd(), name) {
                    Err(Errno::XDEV) => return Err(Failure::new(FailureKind::LinkAway, &path[..end])),
                    result => opened(result)?,
                },
                result => opened(result)?,
            };
        }
        end += 1;
    }
    Ok(directory)
}

/// Opens the directory to which a link leads. The error is EXDEV if the link is not followed.
fn follow(directory: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    // Owner and target are those of one link, whatever replaces it meanwhile.
    let link = openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let stat = fstat(&link)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        return Err(Errno::NOTDIR);
    }
    let is_roots = stat.st_uid == 0 && !geteuid().is_root();
    let limit = if is_roots { ResolveFlags::empty() } else { ResolveFlags::BENEATH };
    openat2(directory, readlinkat(&link, "", Vec::new())?, DIRECTORY, Mode::empty(), limit)
}
