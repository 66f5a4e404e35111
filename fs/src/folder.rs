//! The shared folder as a FUSE filesystem: each request of the guest becomes system calls of the host.
//!
//! The guest names a file by an inode number from an earlier reply, or by one name in a directory with such a number. A
//! name must not contain `/` or be `..`, and symbolic links are not followed, so that no path leads out of the folder.
//! Mount points below the folder, such as /proc below /, are not crossed either: the guest sees them as empty
//! directories that cannot be changed.

mod locks;
mod requests;

pub(crate) use locks::{LockFile, LockRequest};

use crate::attributes::OwnerMap;
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

/// How long the guest caches names and attributes: the maximum delay until it sees changes of the host.
const CACHE_TIMEOUT: Duration = Duration::from_secs(1);
/// The mode bits that a guest may set. The set-user-ID and set-group-ID bits are excluded: on the host, they would
/// grant the rights of this process's user.
const MODE: u32 = 0o1777;
/// The flags of a descriptor that refers to a file without opening it.
const PATH_ONLY: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// The shared folder of a guest.
#[derive(Debug)]
pub(crate) struct Folder {
    root: Arc<OwnedFd>,
    /// /proc/self/fd, for reopening an O_PATH descriptor for reading or writing.
    descriptors: OwnedFd,
    /// The device number of the folder.
    device: u64,
    is_read_only: bool,
    owner: OwnerMap,
    inodes: Mutex<Inodes>,
    handles: Mutex<Handles>,
    locks: Mutex<Locks>,
}

/// The open files of the guest.
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
    /// A folder whose files belong to the user and group `owner` in the guest.
    pub(crate) fn new(root: OwnedFd, is_read_only: bool, owner: (u32, u32)) -> io::Result<Self> {
        let path_only = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptors = rustix::fs::open("/proc/self/fd", path_only, Mode::empty())?;
        let stat = rustix::fs::fstat(&root)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Err(Errno::NOTDIR.into());
        }
        let root = Arc::new(root);
        let inode = Inode {
            fd: Arc::clone(&root),
            kind: FileType::Directory,
            is_mount_point: false,
            cached_version: Arc::default(),
        };
        Ok(Self {
            root,
            descriptors,
            device: stat.st_dev,
            is_read_only,
            owner: OwnerMap { host: (geteuid().as_raw(), getegid().as_raw()), guest: owner },
            inodes: Mutex::new(Inodes::new(inode, &stat)),
            handles: Mutex::default(),
            locks: Mutex::default(),
        })
    }

    /// A descriptor of the folder.
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

    /// Drops all state of the guest.
    fn reset(&self) {
        self.locks().clear();
        self.inodes().clear();
        self.handles().open.clear();
    }

    /// Fails if the folder is read-only.
    fn check_writable(&self) -> io::Result<()> {
        if self.is_read_only { Err(Errno::ROFS.into()) } else { Ok(()) }
    }

    /// The directory and the checked name of an entry that is created, removed or renamed.
    fn entry_to_change<'a>(&self, parent: u64, name: &'a CStr) -> io::Result<(Inode, &'a CStr)> {
        self.check_writable()?;
        Ok((self.inode(parent)?, check_name(name)?))
    }

    /// The file with an inode number, which is not a mount point.
    fn inode(&self, number: u64) -> io::Result<Inode> {
        let inode = self.inodes().get(number)?;
        if inode.is_mount_point { Err(Errno::XDEV.into()) } else { Ok(inode) }
    }

    /// Opens a file with these flags. Only regular files and directories are opened: the guest handles other types
    /// itself, and opening a FIFO would wait for its other end.
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

    /// Opens an existing file. Its type is checked before, since opening a device can have side effects.
    fn open_existing(&self, parent: &Inode, name: &CStr, flags: OFlags) -> io::Result<File> {
        let fd = openat2(parent.fd.as_fd(), name, PATH_ONLY, Mode::empty())?;
        match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
            FileType::Symlink => Err(Errno::LOOP.into()),
            FileType::Directory => Err(Errno::ISDIR.into()),
            kind => {
                let inode =
                    Inode { fd: Arc::new(fd), kind, is_mount_point: false, cached_version: Arc::default() };
                self.reopen(&inode, flags)
            }
        }
    }

    /// A path of a file, for system calls that take no descriptor. A symbolic link does not have one.
    fn path(inode: &Inode) -> io::Result<String> {
        if inode.kind == FileType::Symlink {
            return Err(Errno::OPNOTSUPP.into());
        }
        Ok(format!("/proc/self/fd/{}", inode.fd.as_raw_fd()))
    }

    /// The reply to a lookup of a file.
    fn entry(&self, fd: OwnedFd, is_mount_point: bool) -> io::Result<Entry> {
        let stat = rustix::fs::fstat(&fd)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let inode = Inode { fd: Arc::new(fd), kind, is_mount_point, cached_version: Arc::default() };
        let mut inodes = self.inodes();
        let inode = inodes.lookup(inode, &stat);
        inodes.get(inode)?.cached_version.update(&stat);
        Ok(Entry {
            inode,
            attr: self.attributes(&stat),
            attr_timeout: CACHE_TIMEOUT,
            entry_timeout: CACHE_TIMEOUT,
            ..Entry::default()
        })
    }

    /// Looks a name up in a directory.
    fn find(&self, parent: &Inode, name: &CStr) -> io::Result<Entry> {
        match openat2(parent.fd.as_fd(), name, PATH_ONLY, Mode::empty()) {
            Ok(fd) => self.entry(fd, false),
            // The guest only sees the attributes of a mount point.
            Err(Errno::XDEV) => self
                .entry(rustix::fs::openat(&*parent.fd, check_name(name)?, PATH_ONLY, Mode::empty())?, true),
            Err(error) => Err(error.into()),
        }
    }

    fn stat(&self, inode: &Inode) -> io::Result<(stat64, Duration)> {
        let stat = rustix::fs::fstat(&*inode.fd)?;
        inode.cached_version.update(&stat);
        Ok((self.attributes(&stat), CACHE_TIMEOUT))
    }

    fn attributes(&self, stat: &Stat) -> stat64 {
        let mut attributes = self.owner.attributes(stat);
        attributes.st_ino = self.number(stat.st_dev, stat.st_ino);
        attributes
    }

    /// The inode number in the attributes of a file, by which programs of the guest identify it: the host's, which is
    /// stable. On another device than the folder's, such as a subvolume, the device number is mixed in, since the inode
    /// numbers of different devices overlap.
    const fn number(&self, device: u64, number: u64) -> u64 {
        /// 2^64 divided by the golden ratio, the factor of multiplicative (Fibonacci) hashing, which spreads similar
        /// device numbers.
        const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
        number ^ (device ^ self.device).wrapping_mul(SPREAD)
    }
}

/// Checks that a name is a single component that stays in its directory.
fn check_name(name: &CStr) -> Result<&CStr, Errno> {
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
    rustix::fs::openat2(parent, check_name(name)?, flags, mode, resolve)
}
