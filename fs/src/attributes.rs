//! Conversion of file attributes for the guest.
#![expect(unsafe_code, reason = "a structure of libc has private padding fields and no constructor")]

use fuse_backend_rs::abi::fuse_abi::{stat64, statvfs64};
use fuse_backend_rs::api::filesystem::Entry;
use rustix::fs::{FileType, Stat, StatVfs};

/// The owner of files of other users: the overflow id, as in a user namespace (/proc/sys/kernel/overflowuid).
const OVERFLOW_ID: u32 = 65_534;
/// The set-user-ID and set-group-ID bits. They are hidden from the guest, where they would give a program the rights of
/// another user.
const SET_ID: u32 = 0o6000;

/// The mapping of owners between the host and the guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OwnerMap {
    /// The user and group of this process.
    pub(crate) host: (u32, u32),
    /// The owner of their files in the guest.
    pub(crate) guest: (u32, u32),
}

impl OwnerMap {
    /// Maps a UID of the host to the guest.
    pub(crate) const fn user(&self, user: u32) -> u32 {
        if user == self.host.0 { self.guest.0 } else { OVERFLOW_ID }
    }

    /// Maps a GID of the host to the guest.
    pub(crate) const fn group(&self, group: u32) -> u32 {
        if group == self.host.1 { self.guest.1 } else { OVERFLOW_ID }
    }

    /// Converts all attributes except the inode number.
    pub(crate) fn attributes(&self, stat: &Stat) -> stat64 {
        let hidden = if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile { SET_ID } else { 0 };
        let mut attributes = Entry::default().attr;
        attributes.st_mode = stat.st_mode & !hidden;
        attributes.st_nlink = stat.st_nlink;
        attributes.st_uid = self.user(stat.st_uid);
        attributes.st_gid = self.group(stat.st_gid);
        attributes.st_rdev = stat.st_rdev;
        attributes.st_size = stat.st_size;
        attributes.st_blksize = stat.st_blksize;
        attributes.st_blocks = stat.st_blocks;
        attributes.st_atime = stat.st_atime;
        attributes.st_atime_nsec = nanoseconds(stat.st_atime_nsec);
        attributes.st_mtime = stat.st_mtime;
        attributes.st_mtime_nsec = nanoseconds(stat.st_mtime_nsec);
        attributes.st_ctime = stat.st_ctime;
        attributes.st_ctime_nsec = nanoseconds(stat.st_ctime_nsec);
        attributes
    }
}

fn nanoseconds(nanoseconds: u64) -> i64 {
    i64::try_from(nanoseconds).unwrap_or(0)
}

/// Converts the size and free space of the host's filesystem.
pub(crate) const fn filesystem(stat: &StatVfs) -> statvfs64 {
    // SAFETY: all fields are integers, for which zero is a valid value.
    let mut attributes: statvfs64 = unsafe { std::mem::zeroed() };
    attributes.f_bsize = stat.f_bsize;
    attributes.f_frsize = stat.f_frsize;
    attributes.f_blocks = stat.f_blocks;
    attributes.f_bfree = stat.f_bfree;
    attributes.f_bavail = stat.f_bavail;
    attributes.f_files = stat.f_files;
    attributes.f_ffree = stat.f_ffree;
    attributes.f_favail = stat.f_favail;
    attributes.f_namemax = stat.f_namemax;
    attributes
}
