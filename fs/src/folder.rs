//! The folder as a filesystem: each request of the guest as calls of the host.
//!
//! The guest names files by numbers that it was given, and by one name in a directory that it has such a number for. No
//! name has a `/` in it or is `..`, and no symbolic link is followed, so that there is no path that could lead out. Nor
//! does one lead to another filesystem that is mounted below the folder, such as /proc below /: the guest sees that there
//! is a directory, which is empty and stays so.

mod locks;
mod requests;

pub(crate) use locks::{LockFile, LockRequest};

use crate::attributes::Owner;
use crate::inodes::{Inode, Inodes};
use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::Entry;
use locks::Locks;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use rustix::process::{getegid, geteuid};
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long the guest believes what it was told. What changes on the host is seen after that at the latest.
const VALID: Duration = Duration::from_secs(1);
/// Bits that a guest may give a file: no set-user-ID and no set-group-ID, which would be the caller's on the host.
const MODE: u32 = 0o1777;
/// Flags of a descriptor that names a file without opening it.
const ONLY_NAME: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// The folder of a guest.
#[derive(Debug)]
pub(crate) struct Folder {
    root: Arc<OwnedFd>,
    /// /proc/self/fd, through which a descriptor that only names a file becomes one that reads or writes it.
    descriptors: OwnedFd,
    /// The device that it is on.
    device: u64,
    is_read_only: bool,
    owner: Owner,
    inodes: Mutex<Inodes>,
    handles: Mutex<Handles>,
    locks: Mutex<Locks>,
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
    /// A folder, whose files belong to this user and group in the guest.
    pub(crate) fn new(root: OwnedFd, is_read_only: bool, owner: (u32, u32)) -> io::Result<Self> {
        let only_name = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptors = rustix::fs::open("/proc/self/fd", only_name, Mode::empty())?;
        let stat = rustix::fs::fstat(&root)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Err(Errno::NOTDIR.into());
        }
        let root = Arc::new(root);
        let inode = Inode {
            fd: Arc::clone(&root),
            kind: FileType::Directory,
            is_mount_point: false,
            seen: Arc::default(),
        };
        Ok(Self {
            root,
            descriptors,
            device: stat.st_dev,
            is_read_only,
            owner: Owner { here: (geteuid().as_raw(), getegid().as_raw()), there: owner },
            inodes: Mutex::new(Inodes::new(inode, &stat)),
            handles: Mutex::default(),
            locks: Mutex::default(),
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

    fn locks(&self) -> MutexGuard<'_, Locks> {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget_all(&self) {
        self.locks().clear();
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
        Ok((self.inode(parent)?, single(name)?))
    }

    /// A file that the guest knows, to do something with it.
    fn inode(&self, number: u64) -> io::Result<Inode> {
        let inode = self.inodes().get(number)?;
        if inode.is_mount_point { Err(Errno::XDEV.into()) } else { Ok(inode) }
    }

    /// Opens a file that the guest knows for what it wants to do with it. Only files and directories: all else is the
    /// guest's own affair, and opening a FIFO would wait for its other end.
    fn reopen(&self, inode: &Inode, flags: OFlags) -> io::Result<File> {
        if inode.is_mount_point {
            return Err(Errno::XDEV.into());
        }
        if !matches!(inode.kind, FileType::RegularFile | FileType::Directory) {
            return Err(Errno::NXIO.into());
        }
        let name = inode.fd.as_raw_fd().to_string();
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        Ok(rustix::fs::openat(&self.descriptors, name, flags, Mode::empty())?.into())
    }

    /// Opens a file that is there. Its kind is known before: opening a device alone may do something.
    fn open_existing(&self, parent: &Inode, name: &CStr, flags: OFlags) -> io::Result<File> {
        let fd = openat2(parent.fd.as_fd(), name, ONLY_NAME, Mode::empty())?;
        match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
            FileType::Symlink => Err(Errno::LOOP.into()),
            FileType::Directory => Err(Errno::ISDIR.into()),
            kind => {
                let inode = Inode { fd: Arc::new(fd), kind, is_mount_point: false, seen: Arc::default() };
                self.reopen(&inode, flags)
            }
        }
    }

    /// The path of a file that the guest knows, for calls that take no descriptor. A symbolic link has none.
    fn path(inode: &Inode) -> io::Result<String> {
        if inode.kind == FileType::Symlink {
            return Err(Errno::OPNOTSUPP.into());
        }
        Ok(format!("/proc/self/fd/{}", inode.fd.as_raw_fd()))
    }

    /// Tells the guest of a file.
    fn entry(&self, fd: OwnedFd, is_mount_point: bool) -> io::Result<Entry> {
        let stat = rustix::fs::fstat(&fd)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let inode = Inode { fd: Arc::new(fd), kind, is_mount_point, seen: Arc::default() };
        let mut inodes = self.inodes();
        let inode = inodes.remember(inode, &stat);
        inodes.get(inode)?.seen.tell(&stat);
        Ok(Entry {
            inode,
            attr: self.attributes(&stat),
            attr_timeout: VALID,
            entry_timeout: VALID,
            ..Entry::default()
        })
    }

    fn find(&self, parent: &Inode, name: &CStr) -> io::Result<Entry> {
        match openat2(parent.fd.as_fd(), name, ONLY_NAME, Mode::empty()) {
            Ok(fd) => self.entry(fd, false),
            // Its attributes are what the guest sees of it, and nothing else.
            Err(Errno::XDEV) => {
                self.entry(rustix::fs::openat(&*parent.fd, single(name)?, ONLY_NAME, Mode::empty())?, true)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn stat(&self, inode: &Inode) -> io::Result<(stat64, Duration)> {
        let stat = rustix::fs::fstat(&*inode.fd)?;
        inode.seen.tell(&stat);
        Ok((self.attributes(&stat), VALID))
    }

    fn attributes(&self, stat: &Stat) -> stat64 {
        let mut attributes = self.owner.attributes(stat);
        attributes.st_ino = self.number(stat.st_dev, stat.st_ino);
        attributes
    }

    /// The number by which programs of the guest tell a file from others: the host's, which stays the same. Files of
    /// another device than the folder's, such as those of a subvolume, may have the numbers of others.
    const fn number(&self, device: u64, number: u64) -> u64 {
        /// Spreads neighbours over all numbers: 2^64 divided by the golden ratio, as multiplicative hashing has it.
        const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
        number ^ (device ^ self.device).wrapping_mul(SPREAD)
    }
}

/// Checks that a name leads to something in its directory and no further.
fn single(name: &CStr) -> Result<&CStr, Errno> {
    let bytes = name.to_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(Errno::INVAL);
    }
    Ok(name)
}

fn openat2(parent: BorrowedFd<'_>, name: &CStr, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(parent, single(name)?, flags, mode, resolve)
}
