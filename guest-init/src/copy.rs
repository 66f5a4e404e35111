//! Copies of directories with all below them, for volumes that begin with what an image has: owners, permissions,
//! times and extended attributes are kept, names of one file become copies.
//!
//! Nothing is kept of a tree but two descriptors for each directory on the way down: how deep one may be is what
//! this process may open.

use alloc::vec;
use alloc::vec::Vec;
use core::ffi::CStr;
use core::mem::MaybeUninit;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, RawDir, Stat, Timespec, Timestamps, Uid, XattrFlags, chmodat,
    chownat, lgetxattr, lgetxattr_query, llistxattr, llistxattr_query, lsetxattr, mkdirat, mknodat, openat,
    readlinkat, sendfile, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use rustix::path::DecInt;

/// Bytes of directory entries that are read at once.
const ENTRIES: usize = 2048;
/// Bytes of a file that are copied at once, by the kernel.
const CHUNK: usize = 1 << 20;

/// Copies what a directory has, and what it is, to one that is new and empty.
pub(crate) fn directory(from: &OwnedFd, to: &OwnedFd) -> Result<(), Errno> {
    content(from, to)?;
    let name = c".";
    attributes(from, to, name, &statat(from, name, AtFlags::empty())?)
}

fn content(from: &OwnedFd, to: &OwnedFd) -> Result<(), Errno> {
    each_entry(from, |name| {
        let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                mkdirat(to, name, Mode::RWXU)?;
                content(&open_directory(from, name)?, &open_directory(to, name)?)?;
            }
            FileType::RegularFile => file(from, to, name)?,
            FileType::Symlink => symlinkat(readlinkat(from, name, Vec::new())?.as_c_str(), to, name)?,
            kind => mknodat(to, name, kind, Mode::RUSR, stat.st_rdev)?,
        }
        attributes(from, to, name, &stat)
    })
}

fn file(from: &OwnedFd, to: &OwnedFd, name: &CStr) -> Result<(), Errno> {
    let source = openat(from, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let new = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let target = openat(to, name, new, Mode::RUSR | Mode::WUSR)?;
    while sendfile(&target, &source, None, CHUNK)? > 0 {}
    Ok(())
}

/// Owner first, because a change of it takes setuid bits away, and times last.
fn attributes(from: &OwnedFd, to: &OwnedFd, name: &CStr, stat: &Stat) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    chownat(to, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        chmodat(to, name, Mode::from_raw_mode(stat.st_mode), AtFlags::empty())?;
    }
    extended_attributes(from, to, name)?;
    let time = |seconds, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: i64::try_from(nanoseconds).unwrap_or(0),
    };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    };
    utimensat(to, name, &times, AtFlags::SYMLINK_NOFOLLOW)
}

fn extended_attributes(from: &OwnedFd, to: &OwnedFd, name: &CStr) -> Result<(), Errno> {
    // There are no such calls for a name in a directory, and nothing else that would not open what it is about.
    let path = |directory: &OwnedFd| -> Vec<u8> {
        let number = DecInt::from_fd(directory);
        [b"/proc/self/fd/", number.as_bytes(), b"/", name.to_bytes()].concat()
    };
    let (from, to) = (path(from), path(to));
    let mut names = vec![0; llistxattr_query(from.as_slice()).unwrap_or(0)];
    if names.is_empty() {
        return Ok(());
    }
    let length = llistxattr(from.as_slice(), &mut names[..])?;
    for name in names[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; lgetxattr_query(from.as_slice(), name)?];
        let length = lgetxattr(from.as_slice(), name, &mut value[..])?;
        match lsetxattr(to.as_slice(), name, &value[..length], XattrFlags::empty()) {
            // A kind of attributes that the kernel's other filesystem does not have.
            Ok(()) | Err(Errno::NOTSUP) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Removes whatever has this name, if anything has.
pub(crate) fn remove(directory: &OwnedFd, name: &CStr) -> Result<(), Errno> {
    match unlinkat(directory, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {
            let inside = open_directory(directory, name)?;
            each_entry(&inside, |name| remove(&inside, name))?;
            unlinkat(directory, name, AtFlags::REMOVEDIR)
        }
        Err(Errno::NOENT) => Ok(()),
        result => result,
    }
}

pub(crate) fn open_directory(directory: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(directory, name, flags, Mode::empty())
}

fn each_entry(directory: &OwnedFd, mut action: impl FnMut(&CStr) -> Result<(), Errno>) -> Result<(), Errno> {
    let mut buffer = [MaybeUninit::uninit(); ENTRIES];
    let mut entries = RawDir::new(directory, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            action(name)?;
        }
    }
    Ok(())
}
