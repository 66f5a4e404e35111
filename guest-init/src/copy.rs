//! Recursive copies of directories, for new volumes, which start with the image's content. Owners, permissions, times
//! and extended attributes are kept; hard links become separate files.
//!
//! The copy holds two descriptors for each directory on the path to the current entry, and no other state of the tree.
//! The depth of a tree is limited by the number of descriptors that this process may open.

use crate::files::{each_entry, open_directory};
use alloc::vec;
use alloc::vec::Vec;
use core::ffi::CStr;
use rustix::fd::OwnedFd;
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat,
    lgetxattr, lgetxattr_query, llistxattr, llistxattr_query, lsetxattr, mkdirat, mknodat, openat,
    readlinkat, sendfile, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use rustix::path::DecInt;

/// Bytes per call of sendfile.
const CHUNK: usize = 1 << 20;

/// Copies the content and attributes of a directory to a new and empty directory.
pub(crate) fn directory(from: &OwnedFd, to: &OwnedFd) -> Result<(), Errno> {
    content(from, to)?;
    let name = c".";
    attributes(from, to, name, &statat(from, name, AtFlags::empty())?)
}

fn content(from: &OwnedFd, to: &OwnedFd) -> Result<(), Errno> {
    each_entry(from, &mut |entry| {
        let name = entry.file_name();
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

/// Sets the owner first, because chown clears setuid bits, and times last.
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
    // Linux has no fgetxattr relative to a directory, and the calls that take a descriptor would have to open the file.
    // The path through /proc names it without opening it.
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
            // The target filesystem does not support this namespace of attributes.
            Ok(()) | Err(Errno::NOTSUP) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Removes a file or a directory with its content, if it exists.
pub(crate) fn remove(directory: &OwnedFd, name: &CStr) -> Result<(), Errno> {
    match unlinkat(directory, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {
            let inside = open_directory(directory, name)?;
            each_entry(&inside, &mut |entry| remove(&inside, entry.file_name()))?;
            unlinkat(directory, name, AtFlags::REMOVEDIR)
        }
        Err(Errno::NOENT) => Ok(()),
        result => result,
    }
}
