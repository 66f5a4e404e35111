//! The folder as a filesystem: each request of the guest as calls of the host.
//!
//! The guest names files by numbers that it was given, and by one name in a directory that it has such a number for. No
//! name has a `/` in it or is `..`, and no symbolic link is followed, so that there is no path that could lead out.

use crate::attributes::{Owner, filesystem};
use crate::inodes::{Inode, Inodes, ROOT};
use fuse_backend_rs::abi::fuse_abi::{CreateIn, FsOptions, OpenOptions, SetattrValid, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader, ZeroCopyWriter,
};
use rustix::fs::{
    AtFlags, FallocateFlags, FileType, Mode, OFlags, RawDir, RenameFlags, ResolveFlags, SeekFrom, Stat,
    Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags,
};
use rustix::io::{Errno, ReadWriteFlags};
use rustix::process::{getegid, geteuid};
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long the guest believes what it was told. What changes on the host is seen after that at the latest.
const VALID: Duration = Duration::from_secs(1);
/// What the guest can do beside the least that there is.
const OPTIONS: FsOptions = FsOptions::ASYNC_READ
    .union(FsOptions::BIG_WRITES)
    .union(FsOptions::MAX_PAGES)
    .union(FsOptions::PARALLEL_DIROPS)
    .union(FsOptions::ATOMIC_O_TRUNC)
    .union(FsOptions::AUTO_INVAL_DATA)
    // The host clears the bits itself, since this process has no privileges. Where it is not said that it does, the
    // guest asks before each write whether the file has capabilities.
    .union(FsOptions::HANDLE_KILLPRIV_V2);
/// Bits that a guest may give a file: no set-user-ID and no set-group-ID, which would be the caller's on the host.
const MODE: u32 = 0o1777;
/// Bytes of extended attributes of a file at most (XATTR_SIZE_MAX of linux/limits.h).
const XATTR_MAX: usize = 64 << 10;
/// The only extended attributes that are passed on: the host's security is no guest's business.
const XATTR_PREFIX: &[u8] = b"user.";
/// Bytes that one request writes at most.
const WRITE_MAX: usize = 1 << 20;

/// The folder of a guest.
#[derive(Debug)]
pub(crate) struct Folder {
    root: Arc<OwnedFd>,
    /// /proc/self/fd, through which a descriptor that only names a file becomes one that reads or writes it.
    descriptors: OwnedFd,
    is_read_only: bool,
    owner: Owner,
    inodes: Mutex<Inodes>,
    handles: Mutex<Handles>,
}

/// Files that the guest has open.
#[derive(Debug, Default)]
struct Handles {
    open: BTreeMap<u64, File>,
    next: u64,
}

impl Handles {
    fn add(&mut self, file: File) -> u64 {
        self.next += 1;
        self.open.insert(self.next, file);
        self.next
    }

    fn get(&mut self, handle: u64) -> io::Result<&mut File> {
        Ok(self.open.get_mut(&handle).ok_or(Errno::BADF)?)
    }
}

impl Folder {
    /// Opens a folder, whose files belong to this user and group in the guest.
    pub(crate) fn open(path: &Path, is_read_only: bool, owner: (u32, u32)) -> io::Result<Self> {
        let only_name = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = Arc::new(rustix::fs::open(path, only_name, Mode::empty())?);
        let descriptors = rustix::fs::open("/proc/self/fd", only_name, Mode::empty())?;
        let stat = rustix::fs::fstat(&root)?;
        let inode = Inode { fd: Arc::clone(&root), kind: FileType::Directory, seen: Arc::default() };
        Ok(Self {
            root,
            descriptors,
            is_read_only,
            owner: Owner { here: (geteuid().as_raw(), getegid().as_raw()), there: owner },
            inodes: Mutex::new(Inodes::new(inode, identity(&stat))),
            handles: Mutex::default(),
        })
    }

    /// The folder itself.
    pub(crate) fn root(&self) -> &OwnedFd {
        &self.root
    }

    fn inodes(&self) -> MutexGuard<'_, Inodes> {
        self.inodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handles(&self) -> MutexGuard<'_, Handles> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget_all(&self) {
        self.inodes().clear();
        self.handles().open.clear();
    }

    /// Refuses what changes something, where nothing is to be changed.
    fn for_writing(&self) -> io::Result<()> {
        if self.is_read_only { Err(Errno::ROFS.into()) } else { Ok(()) }
    }

    /// A directory and a name in it, of something that is to be made, removed or moved.
    fn to_change<'a>(&self, parent: u64, name: &'a CStr) -> io::Result<(Inode, &'a CStr)> {
        self.for_writing()?;
        Ok((self.inodes().get(parent)?, single(name)?))
    }

    /// Opens a file that the guest knows for what it wants to do with it. Only files and directories: all else is the
    /// guest's own affair, and opening a FIFO would wait for its other end.
    fn reopen(&self, inode: &Inode, flags: OFlags) -> io::Result<File> {
        if !matches!(inode.kind, FileType::RegularFile | FileType::Directory) {
            return Err(Errno::NXIO.into());
        }
        let name = inode.fd.as_raw_fd().to_string();
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        Ok(rustix::fs::openat(&self.descriptors, name, flags, Mode::empty())?.into())
    }

    /// The path of a file that the guest knows, for calls that take no descriptor. A symbolic link has none.
    fn path(inode: &Inode) -> io::Result<String> {
        if inode.kind == FileType::Symlink {
            return Err(Errno::OPNOTSUPP.into());
        }
        Ok(format!("/proc/self/fd/{}", inode.fd.as_raw_fd()))
    }

    /// Tells the guest of a file.
    fn entry(&self, fd: OwnedFd) -> io::Result<Entry> {
        let stat = rustix::fs::fstat(&fd)?;
        let inode =
            Inode { fd: Arc::new(fd), kind: FileType::from_raw_mode(stat.st_mode), seen: Arc::default() };
        let mut inodes = self.inodes();
        let inode = inodes.remember(inode, identity(&stat));
        inodes.get(inode)?.seen.tell(&stat);
        Ok(Entry {
            inode,
            attr: self.owner.attributes(&stat),
            attr_timeout: VALID,
            entry_timeout: VALID,
            ..Entry::default()
        })
    }

    fn find(&self, parent: &Inode, name: &CStr) -> io::Result<Entry> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        self.entry(openat2(parent.fd.as_fd(), name, flags, Mode::empty())?)
    }

    fn stat(&self, inode: &Inode) -> io::Result<(stat64, Duration)> {
        let stat = rustix::fs::fstat(&*inode.fd)?;
        inode.seen.tell(&stat);
        Ok((self.owner.attributes(&stat), VALID))
    }
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

/// Checks that a name leads to something in its directory and no further.
fn single(name: &CStr) -> io::Result<&CStr> {
    let bytes = name.to_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(Errno::INVAL.into());
    }
    Ok(name)
}

fn openat2(parent: BorrowedFd<'_>, name: &CStr, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    Ok(rustix::fs::openat2(parent, single(name)?, flags, mode, resolve)?)
}

/// What counts of the flags with which the guest opens a file. Appending is done with each write.
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

/// A time that is to be set: one that is given, the present one, or none.
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
        // A guest that mounts the folder once more knows nothing of the last time.
        self.forget_all();
        Ok(OPTIONS)
    }

    fn destroy(&self) {
        self.forget_all();
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let parent = self.inodes().get(parent)?;
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
        self.for_writing()?;
        let inode = self.inodes().get(inode)?;
        let stat = rustix::fs::fstat(&*inode.fd)?;
        // A file has one owner and stays that one's: what changes nothing is done.
        let is_others = valid.contains(SetattrValid::UID) && attr.st_uid != self.owner.user(stat.st_uid)
            || valid.contains(SetattrValid::GID) && attr.st_gid != self.owner.group(stat.st_gid);
        if is_others {
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
        let inode = self.inodes().get(inode)?;
        Ok(rustix::fs::readlinkat(&*inode.fd, "", Vec::new())?.into_bytes())
    }

    fn symlink(&self, _: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        let (parent, name) = self.to_change(parent, name)?;
        rustix::fs::symlinkat(target, &*parent.fd, name)?;
        self.find(&parent, name)
    }

    fn mknod(&self, _: &Context, parent: u64, name: &CStr, mode: u32, _: u32, _: u32) -> io::Result<Entry> {
        let (parent, name) = self.to_change(parent, name)?;
        let kind = FileType::from_raw_mode(mode);
        if !matches!(kind, FileType::RegularFile | FileType::Fifo | FileType::Socket) {
            return Err(Errno::PERM.into());
        }
        rustix::fs::mknodat(&*parent.fd, name, kind, Mode::from_raw_mode(mode & MODE), 0)?;
        self.find(&parent, name)
    }

    fn mkdir(&self, _: &Context, parent: u64, name: &CStr, mode: u32, _: u32) -> io::Result<Entry> {
        let (parent, name) = self.to_change(parent, name)?;
        rustix::fs::mkdirat(&*parent.fd, name, Mode::from_raw_mode(mode & MODE))?;
        self.find(&parent, name)
    }

    fn unlink(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let (parent, name) = self.to_change(parent, name)?;
        Ok(rustix::fs::unlinkat(&*parent.fd, name, AtFlags::empty())?)
    }

    fn rmdir(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        let (parent, name) = self.to_change(parent, name)?;
        Ok(rustix::fs::unlinkat(&*parent.fd, name, AtFlags::REMOVEDIR)?)
    }

    fn rename(&self, _: &Context, from: u64, old: &CStr, to: u64, new: &CStr, flags: u32) -> io::Result<()> {
        let (from, old) = self.to_change(from, old)?;
        let (to, new) = self.to_change(to, new)?;
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE;
        let flags =
            RenameFlags::from_bits(flags).filter(|flags| known.contains(*flags)).ok_or(Errno::INVAL)?;
        Ok(rustix::fs::renameat_with(&*from.fd, old, &*to.fd, new, flags)?)
    }

    fn link(&self, _: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let (parent, name) = self.to_change(parent, name)?;
        let inode = self.inodes().get(inode)?;
        // Through /proc, as a link by descriptor needs a privilege; what is followed is that name and no link of the
        // folder's.
        let number = inode.fd.as_raw_fd().to_string();
        rustix::fs::linkat(&self.descriptors, number, &*parent.fd, name, AtFlags::SYMLINK_FOLLOW)?;
        self.find(&parent, name)
    }

    fn open(
        &self,
        _: &Context,
        inode: u64,
        flags: u32,
        _: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let flags = open_flags(flags);
        if changes(flags) {
            self.for_writing()?;
        }
        let inode = self.inodes().get(inode)?;
        if inode.kind == FileType::RegularFile && inode.seen.is_stale(&rustix::fs::fstat(&*inode.fd)?) {
            return Err(Errno::STALE.into());
        }
        let file = self.reopen(&inode, flags)?;
        Ok((Some(self.handles().add(file)), OpenOptions::empty(), None))
    }

    fn create(
        &self,
        _: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let (parent, name) = self.to_change(parent, name)?;
        let exclusive = OFlags::from_bits_retain(args.flags) & OFlags::EXCL;
        // What is there already may be a FIFO, which must not be waited for.
        let safe = OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let flags = open_flags(args.flags) | exclusive | safe;
        let file = openat2(parent.fd.as_fd(), name, flags, Mode::from_raw_mode(args.mode & MODE))?;
        if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::RegularFile {
            return Err(Errno::NXIO.into());
        }
        let number = file.as_raw_fd().to_string();
        let only_name = OFlags::PATH | OFlags::CLOEXEC;
        let entry = self.entry(rustix::fs::openat(&self.descriptors, number, only_name, Mode::empty())?)?;
        Ok((entry, Some(self.handles().add(file.into())), OpenOptions::empty(), None))
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
        // Pages of a mapping go to where they are from, whatever the file was opened for.
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
        self.for_writing()?;
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
        Ok(rustix::fs::fallocate(self.handles().get(handle)?, mode, offset, length)?)
    }

    fn lseek(&self, _: &Context, _: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        // All others are the guest's own.
        let target = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL.into()),
        };
        Ok(rustix::fs::seek(self.handles().get(handle)?, target)?)
    }

    fn release(
        &self,
        _: &Context,
        _: u64,
        _: u32,
        handle: u64,
        _: bool,
        _: bool,
        _: Option<u64>,
    ) -> io::Result<()> {
        self.handles().open.remove(&handle);
        Ok(())
    }

    fn statfs(&self, _: &Context, inode: u64) -> io::Result<statvfs64> {
        let inode = self.inodes().get(inode)?;
        Ok(filesystem(&rustix::fs::fstatvfs(&*inode.fd)?))
    }

    fn setxattr(&self, _: &Context, inode: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        self.for_writing()?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let path = Self::path(&self.inodes().get(inode)?)?;
        Ok(rustix::fs::setxattr(path, xattr_name(name)?, value, flags)?)
    }

    fn getxattr(&self, _: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let path = Self::path(&self.inodes().get(inode)?)?;
        let mut value = vec![0; size_of_reply(size)];
        let length = rustix::fs::getxattr(path, xattr_name(name)?, &mut value[..])?;
        if size == 0 {
            return Ok(GetxattrReply::Count(count(length)));
        }
        value.truncate(length);
        Ok(GetxattrReply::Value(value))
    }

    fn listxattr(&self, _: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let path = Self::path(&self.inodes().get(inode)?)?;
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
        self.for_writing()?;
        let path = Self::path(&self.inodes().get(inode)?)?;
        Ok(rustix::fs::removexattr(path, xattr_name(name)?)?)
    }

    fn opendir(&self, _: &Context, inode: u64, _: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let inode = self.inodes().get(inode)?;
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
        /// Bytes of names that are read at once: as many as the guest asks for, about, but a longest name at least.
        const MIN: usize = 1 << 10;
        const MAX: usize = 64 << 10;
        let mut handles = self.handles();
        let directory = handles.get(handle)?;
        rustix::fs::seek(&*directory, SeekFrom::Start(offset))?;
        let mut buffer = Vec::with_capacity(usize::try_from(size).unwrap_or(MAX).clamp(MIN, MAX));
        let mut entries = RawDir::new(directory, buffer.spare_capacity_mut());
        loop {
            let Some(entry) = entries.next() else { return Ok(()) };
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            // The guest has its own.
            if name == b"." || name == b".." {
                continue;
            }
            let added = add(DirEntry {
                ino: entry.ino(),
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
