//! The FUSE requests of the guest.

use super::{Folder, LockRequest, MODE, openat2};
use crate::attributes::filesystem;
use crate::inodes::ROOT;
use fuse_backend_rs::abi::fuse_abi::{CreateIn, FsOptions, OpenOptions, SetattrValid, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileLock, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader,
    ZeroCopyWriter,
};
use rustix::fs::{
    AtFlags, FallocateFlags, FileType, Mode, OFlags, RawDir, RenameFlags, SeekFrom, Timespec, Timestamps,
    UTIME_NOW, UTIME_OMIT, XattrFlags,
};
use rustix::io::{Errno, ReadWriteFlags};
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

/// The FUSE features that are enabled.
const OPTIONS: FsOptions = FsOptions::ASYNC_READ
    .union(FsOptions::BIG_WRITES)
    .union(FsOptions::MAX_PAGES)
    .union(FsOptions::PARALLEL_DIROPS)
    .union(FsOptions::ATOMIC_O_TRUNC)
    .union(FsOptions::AUTO_INVAL_DATA)
    // Locks are taken on the host, so that they exclude other guests and programs of the host.
    .union(FsOptions::POSIX_LOCKS)
    .union(FsOptions::FLOCK_LOCKS)
    // The host clears set-user-ID bits and file capabilities itself, since this process has no privileges. Without this
    // feature, the guest would request the capabilities of the file before each write.
    .union(FsOptions::HANDLE_KILLPRIV_V2);
/// Maximum size of an extended attribute and of a list of names, in bytes (XATTR_SIZE_MAX and XATTR_LIST_MAX in
/// linux/limits.h).
const XATTR_MAX: usize = 64 << 10;
/// The prefix of the extended attributes that the guest can access. The host's security attributes are hidden.
const XATTR_PREFIX: &[u8] = b"user.";
/// The handle of a mount point, which is listed as an empty directory. Handles of open files are larger.
const EMPTY_DIRECTORY: u64 = 0;
/// Maximum number of bytes that one request writes.
const WRITE_MAX: usize = 1 << 20;

/// The open flags that are used on the host. O_APPEND is handled in each write request.
fn open_flags(flags: u32) -> OFlags {
    let kept = OFlags::ACCMODE | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC;
    OFlags::from_bits_retain(flags) & kept
}

fn changes(flags: OFlags) -> bool {
    flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC | OFlags::CREATE)
}

fn xattr_name(name: &CStr) -> io::Result<&CStr> {
    if name.to_bytes().starts_with(XATTR_PREFIX) { Ok(name) } else { Err(Errno::OPNOTSUPP.into()) }
}

fn size_of_reply(size: u32) -> usize {
    usize::try_from(size).unwrap_or(XATTR_MAX).min(XATTR_MAX)
}

fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// A timestamp for utimensat: a given time, the present time, or unchanged.
const fn time(is_given: bool, is_now: bool, seconds: i64, nanoseconds: i64) -> Timespec {
    match (is_given, is_now) {
        (_, true) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        (true, false) => Timespec { tv_sec: seconds, tv_nsec: nanoseconds },
        (false, false) => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
    }
}

impl FileSystem for Folder {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, _: FsOptions) -> io::Result<FsOptions> {
        // A guest that mounts the folder again has no state of the earlier mount.
        self.reset();
        Ok(OPTIONS)
    }

    fn destroy(&self) {
        self.reset();
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let parent = self.inodes().get(parent)?;
        if parent.is_mount_point {
            return Err(Errno::NOENT.into());
        }
        self.find(&parent, name)
    }

    fn forget(&self, _: &Context, inode: u64, count: u64) {
        self.inodes().forget(inode, count);
    }

    fn getattr(&self, _: &Context, inode: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        self.stat(&self.inodes().get(inode)?)
    }

    fn setattr(
        &self,
        _: &Context,
        inode: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        self.check_writable()?;
        let inode = self.inode(inode)?;
        let stat = rustix::fs::fstat(&*inode.fd)?;
        // The owner of a file cannot be changed. Setting the same owner succeeds.
        let changes_owner = valid.contains(SetattrValid::UID) && attr.st_uid != self.owner.user(stat.st_uid)
            || valid.contains(SetattrValid::GID) && attr.st_gid != self.owner.group(stat.st_gid);
        if changes_owner {
            return Err(Errno::PERM.into());
        }
        if valid.contains(SetattrValid::MODE) {
            let mode = Mode::from_raw_mode(attr.st_mode & MODE);
            rustix::fs::chmod(Self::path(&inode)?, mode)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let size = u64::try_from(attr.st_size).map_err(|_| Errno::INVAL)?;
            match handle {
                Some(handle) => rustix::fs::ftruncate(self.handles().get(handle)?, size)?,
                None => rustix::fs::ftruncate(self.reopen(&inode, OFlags::WRONLY)?, size)?,
            }
        }
        let has = |flag| valid.contains(flag);
        let (access, change) = (SetattrValid::ATIME_NOW, SetattrValid::MTIME_NOW);
        if has(SetattrValid::ATIME) || has(SetattrValid::MTIME) || has(access) || has(change) {
            let times = Timestamps {
                last_access: time(has(SetattrValid::ATIME), has(access), attr.st_atime, attr.st_atime_nsec),
                last_modification: time(
                    has(SetattrValid::MTIME),
                    has(change),
                    attr.st_mtime,
                    attr.st_mtime_nsec,
                ),
            };
            rustix::fs::utimensat(&*inode.fd, "", &times, AtFlags::EMPTY_PATH)?;
        }
        self.stat(&inode)
    }

    fn readlink(&self, _: &Context, inode: u64) -> io::Result<Vec<u8>> {
        let inode = self.inode(inode)?;
        Ok(rustix::fs::readlinkat(&*inode.fd, "", Vec::new())?.into_bytes())
    }

    fn symlink(&self, _: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        let (parent, name) = self.entry_to_change(parent, name)?;
        rustix::fs::symlinkat(target, &*parent.fd, name)?;
        self.find(&parent, name)
    }

    fn mknod(&self, _: &Context, parent: u64, name: &CStr, mode: u32, _: u32, _: u32) -> io::Result<Entry> {
        let (parent, name) = self.entry_to_change(parent, name)?;
        let kind = FileType::from_raw_mode(mode);
        if !matches!(kind, FileType::RegularFile | FileType::Fifo | FileType::Socket) {
            return Err(Errno::PERM.into());
        }
        rustix::fs::mknodat(&*parent.fd, name, kind, Mode::from_raw_mode(mode & MODE), 0)?;
        self.find(&parent, name)
    }

    fn mkdir(&self, _: &Context, parent: u64, name: &CStr, mode: u32, _: u32) -> io::Result<Entry> {
        let (parent, name) = self.entry_to_change(parent, name)?;
        rustix::fs::mkdirat(&*parent.fd, name, Mode::from_raw_mode(mode & MODE))?;
        self.find(&parent, name)
    }

    fn unlink(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let (parent, name) = self.entry_to_change(parent, name)?;
        Ok(rustix::fs::unlinkat(&*parent.fd, name, AtFlags::empty())?)
    }

    fn rmdir(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let (parent, name) = self.entry_to_change(parent, name)?;
        Ok(rustix::fs::unlinkat(&*parent.fd, name, AtFlags::REMOVEDIR)?)
    }

    fn rename(&self, _: &Context, from: u64, old: &CStr, to: u64, new: &CStr, flags: u32) -> io::Result<()> {
        let (from, old) = self.entry_to_change(from, old)?;
        let (to, new) = self.entry_to_change(to, new)?;
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE;
        let flags =
            RenameFlags::from_bits(flags).filter(|flags| known.contains(*flags)).ok_or(Errno::INVAL)?;
        Ok(rustix::fs::renameat_with(&*from.fd, old, &*to.fd, new, flags)?)
    }

    fn link(&self, _: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let (parent, name) = self.entry_to_change(parent, name)?;
        let inode = self.inode(inode)?;
        // Through /proc, since AT_EMPTY_PATH requires a privilege. Only the link in /proc is followed, not a link in
        // the folder.
        let number = inode.fd.as_raw_fd().to_string();
        rustix::fs::linkat(&self.descriptors, number, &*parent.fd, name, AtFlags::SYMLINK_FOLLOW)?;
        self.find(&parent, name)
    }

    fn open(
        &self,
        context: &Context,
        inode: u64,
        flags: u32,
        _: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let flags = open_flags(flags);
        if changes(flags) {
            self.check_writable()?;
        }
        let inode = self.inode(inode)?;
        if inode.kind == FileType::RegularFile
            && inode.cached_version.is_stale(&rustix::fs::fstat(&*inode.fd)?, context.pid)
        {
            return Err(Errno::STALE.into());
        }
        let file = self.reopen(&inode, flags)?;
        Ok((Some(self.handles().add(file)), OpenOptions::empty(), None))
    }

    /// Creates and opens a file. With O_TMPFILE, which `serve.rs` sets for FUSE_TMPFILE, the file has no name.
    fn create(
        &self,
        _: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let requested = OFlags::from_bits_retain(args.flags);
        // Linux passes the name `/` for an unnamed file (`vfs_tmpfile` in fs/namei.c).
        let is_unnamed = requested.contains(OFlags::TMPFILE);
        let (parent, name) = self.entry_to_change(parent, if is_unnamed { c"unnamed" } else { name })?;
        let flags = open_flags(args.flags);
        let mode = Mode::from_raw_mode(args.mode & MODE);
        let new = flags | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = if is_unnamed {
            let unnamed = flags.difference(OFlags::TRUNC) | OFlags::TMPFILE | OFlags::CLOEXEC;
            File::from(rustix::fs::openat(&*parent.fd, ".", unnamed | requested & OFlags::EXCL, mode)?)
        } else {
            match openat2(parent.fd.as_fd(), name, new, mode) {
                Err(Errno::EXIST) if !requested.contains(OFlags::EXCL) => {
                    self.open_existing(&parent, name, flags)?
                }
                result => File::from(result?),
            }
        };
        let number = file.as_raw_fd().to_string();
        let path_only = OFlags::PATH | OFlags::CLOEXEC;
        let named = rustix::fs::openat(&self.descriptors, number, path_only, Mode::empty())?;
        let entry = self.entry(named, false)?;
        Ok((entry, Some(self.handles().add(file)), OpenOptions::empty(), None))
    }

    fn read(
        &self,
        _: &Context,
        _: u64,
        handle: u64,
        writer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        writer.write_from(self.handles().get(handle)?, size, offset)
    }

    fn write(
        &self,
        _: &Context,
        _: u64,
        handle: u64,
        reader: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _: Option<u64>,
        is_from_cache: bool,
        flags: u32,
        _: u32,
    ) -> io::Result<usize> {
        let mut handles = self.handles();
        let file = handles.get(handle)?;
        let size = usize::try_from(size).unwrap_or(WRITE_MAX).min(WRITE_MAX);
        // Pages of a shared mapping are written at their offset, even if the file was opened for appending.
        if is_from_cache || !OFlags::from_bits_retain(flags).contains(OFlags::APPEND) {
            return reader.read_to(file, size, offset);
        }
        let mut bytes = vec![0; size];
        reader.read_exact(&mut bytes)?;
        Ok(rustix::io::pwritev2(file, &[IoSlice::new(&bytes)], offset, ReadWriteFlags::APPEND)?)
    }

    fn fsync(&self, _: &Context, _: u64, only_data: bool, handle: u64) -> io::Result<()> {
        let mut handles = self.handles();
        let file = handles.get(handle)?;
        if only_data { file.sync_data() } else { file.sync_all() }
    }

    fn fsyncdir(&self, context: &Context, inode: u64, only_data: bool, handle: u64) -> io::Result<()> {
        self.fsync(context, inode, only_data, handle)
    }

    fn fallocate(
        &self,
        _: &Context,
        _: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.check_writable()?;
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
        Ok(rustix::fs::fallocate(self.handles().get(handle)?, mode, offset, length)?)
    }

    fn lseek(&self, _: &Context, _: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        // The guest handles all other values of whence itself.
        let target = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL.into()),
        };
        Ok(rustix::fs::seek(self.handles().get(handle)?, target)?)
    }

    fn getlk(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        owner: u64,
        lock: FileLock,
        flags: u32,
    ) -> io::Result<FileLock> {
        self.find_lock(&LockRequest::new(inode, handle, owner, &lock, flags)?)
    }

    /// Locks without waiting; requests that wait for a lock are handled in `serve.rs` and not by the library.
    fn setlk(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        owner: u64,
        lock: FileLock,
        flags: u32,
    ) -> io::Result<()> {
        self.try_lock(&LockRequest::new(inode, handle, owner, &lock, flags)?, &mut None)
    }

    fn flush(&self, _: &Context, inode: u64, _: u64, owner: u64) -> io::Result<()> {
        self.release_owner(inode, owner);
        Ok(())
    }

    fn release(
        &self,
        _: &Context,
        inode: u64,
        _: u32,
        handle: u64,
        _: bool,
        _: bool,
        _: Option<u64>,
    ) -> io::Result<()> {
        self.release_handle(inode, handle);
        self.handles().open.remove(&handle);
        Ok(())
    }

    fn statfs(&self, _: &Context, inode: u64) -> io::Result<statvfs64> {
        let inode = self.inode(inode)?;
        Ok(filesystem(&rustix::fs::fstatvfs(&*inode.fd)?))
    }

    fn setxattr(&self, _: &Context, inode: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        self.check_writable()?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let path = Self::path(&self.inode(inode)?)?;
        Ok(rustix::fs::setxattr(path, xattr_name(name)?, value, flags)?)
    }

    fn getxattr(&self, _: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let path = Self::path(&self.inode(inode)?)?;
        let mut value = vec![0; size_of_reply(size)];
        let length = rustix::fs::getxattr(path, xattr_name(name)?, &mut value[..])?;
        if size == 0 {
            return Ok(GetxattrReply::Count(count(length)));
        }
        value.truncate(length);
        Ok(GetxattrReply::Value(value))
    }

    fn listxattr(&self, _: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let path = Self::path(&self.inode(inode)?)?;
        let mut names = vec![0; XATTR_MAX];
        let length = rustix::fs::listxattr(path, &mut names[..])?;
        let names = names[..length].split_inclusive(|byte| *byte == 0);
        let names = names.filter(|name| name.starts_with(XATTR_PREFIX)).collect::<Vec<_>>().concat();
        match usize::try_from(size) {
            Ok(0) => Ok(ListxattrReply::Count(count(names.len()))),
            Ok(size) if size < names.len() => Err(Errno::RANGE.into()),
            _ => Ok(ListxattrReply::Names(names)),
        }
    }

    fn removexattr(&self, _: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.check_writable()?;
        let path = Self::path(&self.inode(inode)?)?;
        Ok(rustix::fs::removexattr(path, xattr_name(name)?)?)
    }

    fn opendir(&self, _: &Context, inode: u64, _: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let inode = self.inodes().get(inode)?;
        if inode.is_mount_point && inode.kind == FileType::Directory {
            return Ok((Some(EMPTY_DIRECTORY), OpenOptions::empty()));
        }
        let directory = self.reopen(&inode, OFlags::RDONLY | OFlags::DIRECTORY)?;
        Ok((Some(self.handles().add(directory)), OpenOptions::empty()))
    }

    fn readdir(
        &self,
        _: &Context,
        _: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        /// Limits of the buffer for directory entries, in bytes: about as large as requested, but enough for the
        /// longest name.
        const MIN_BUFFER: usize = 1 << 10;
        const MAX_BUFFER: usize = 64 << 10;
        if handle == EMPTY_DIRECTORY {
            return Ok(());
        }
        let mut handles = self.handles();
        let directory = handles.get(handle)?;
        let device = rustix::fs::fstat(&*directory)?.st_dev;
        rustix::fs::seek(&*directory, SeekFrom::Start(offset))?;
        let mut buffer =
            Vec::with_capacity(usize::try_from(size).unwrap_or(MAX_BUFFER).clamp(MIN_BUFFER, MAX_BUFFER));
        let mut entries = RawDir::new(directory, buffer.spare_capacity_mut());
        loop {
            let Some(entry) = entries.next() else { return Ok(()) };
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            // The guest adds these itself.
            if name == b"." || name == b".." {
                continue;
            }
            let added = add(DirEntry {
                ino: self.number(device, entry.ino()),
                offset: entry.next_entry_cookie(),
                type_: entry.file_type().as_raw_mode() >> 12,
                name,
            })?;
            if added == 0 {
                return Ok(());
            }
        }
    }

    fn releasedir(&self, _: &Context, _: u64, _: u32, handle: u64) -> io::Result<()> {
        self.handles().open.remove(&handle);
        Ok(())
    }
}

const _: () = assert!(ROOT == fuse_backend_rs::abi::fuse_abi::ROOT_ID);
