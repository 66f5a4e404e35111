//! Locks of the guest's programs as locks of the host, so that guests and programs of the host exclude each other.
//!
//! A flock(2) lock is taken with flock on the handle of the guest. POSIX locks belong to a process, but the host sees
//! all processes of the guest as one. Therefore each lock owner has a separate open file, whose open file description
//! owns the locks (`F_OFD_SETLK`). These conflict with the POSIX locks of the host's programs.
#![expect(unsafe_code, reason = "open file description locks have no safe interface")]

use super::Folder;
use crate::inodes::Inode;
use crate::ranges::{LockKind, Range, Ranges};
use fuse_backend_rs::abi::fuse_abi::LK_FLOCK;
use fuse_backend_rs::api::filesystem::FileLock;
use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Maximum number of locked ranges of a guest, and of open files with flock locks. Each lock takes memory of the host's
/// kernel, which walks all locks of a file on each request and when this process ends.
const LOCKS_MAX: usize = 1 << 11;
/// The largest file offset. As the end of a range it means the end of the file, however long it gets.
const OFFSET_MAX: u64 = i64::MAX.unsigned_abs();

/// A request to lock or unlock a range or a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LockRequest {
    inode: u64,
    handle: u64,
    owner: u64,
    start: u64,
    end: u64,
    /// The lock type, or none for unlocking.
    kind: Option<LockKind>,
    /// The process id in the guest.
    process: u32,
    is_flock: bool,
}

impl LockRequest {
    /// Checks and converts the fields of a message.
    pub(crate) fn new(inode: u64, handle: u64, owner: u64, lock: &FileLock, flags: u32) -> io::Result<Self> {
        let kind = match i32::try_from(lock.lock_type) {
            Ok(libc::F_RDLCK) => Some(LockKind::Read),
            Ok(libc::F_WRLCK) => Some(LockKind::Write),
            Ok(libc::F_UNLCK) => None,
            _ => return Err(Errno::INVAL.into()),
        };
        let (start, end) = (lock.start, lock.end.min(OFFSET_MAX));
        if start > end {
            return Err(Errno::INVAL.into());
        }
        let is_flock = flags & LK_FLOCK != 0;
        Ok(Self { inode, handle, owner, start, end, kind, process: lock.pid, is_flock })
    }
}

/// The locks of the guest.
#[derive(Debug, Default)]
pub(super) struct Locks {
    /// The POSIX locks by inode number and owner.
    held: BTreeMap<(u64, u64), OwnerLocks>,
    /// The number of ranges of all owners.
    ranges: usize,
    /// The handles that may have a flock lock.
    flocks: BTreeSet<u64>,
}

/// The POSIX locks of one owner on a file.
#[derive(Debug)]
struct OwnerLocks {
    file: LockFile,
    ranges: Ranges,
    /// The handle of the last request.
    handle: u64,
    process: u32,
}

/// An open file whose description holds the POSIX locks of one owner.
#[derive(Debug)]
pub(crate) struct LockFile {
    file: File,
    may_write: bool,
}

impl Locks {
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Releases all POSIX locks of an owner on a file.
    fn release(&mut self, key: (u64, u64)) {
        if let Some(held) = self.held.remove(&key) {
            self.ranges -= held.ranges.len();
        }
    }

    /// The process id of another owner that has locked a byte.
    fn process(&self, (inode, owner): (u64, u64), byte: u64) -> Option<u32> {
        let mut held = self.held.range((inode, 0)..=(inode, u64::MAX));
        let found = held.find(|((_, other), held)| *other != owner && held.ranges.contains(byte));
        found.map(|(_, held)| held.process)
    }
}

impl Folder {
    /// Locks or unlocks without waiting, and fails with `EAGAIN` if another owner has a conflicting lock. A retry
    /// passes the same `spare`, so that the file is opened only once: programs of the host may watch it with inotify.
    pub(crate) fn try_lock(&self, request: &LockRequest, spare: &mut Option<LockFile>) -> io::Result<()> {
        if request.kind.is_some() {
            // The handle of a pending request may have been closed in the meantime.
            self.handles().get(request.handle)?;
        }
        if !request.is_flock {
            return self.lock_range(request, spare);
        }
        let operation = match request.kind {
            Some(LockKind::Read) => FlockOperation::NonBlockingLockShared,
            Some(LockKind::Write) => FlockOperation::NonBlockingLockExclusive,
            None => FlockOperation::NonBlockingUnlock,
        };
        let mut locks = self.locks();
        let is_new = request.kind.is_some() && !locks.flocks.contains(&request.handle);
        if is_new && locks.flocks.len() == LOCKS_MAX {
            return Err(Errno::NOLCK.into());
        }
        flock(&*self.handles().get(request.handle)?, operation)?;
        if request.kind.is_some() {
            locks.flocks.insert(request.handle);
        } else {
            locks.flocks.remove(&request.handle);
        }
        Ok(())
    }

    fn lock_range(&self, request: &LockRequest, spare: &mut Option<LockFile>) -> io::Result<()> {
        let key = (request.inode, request.owner);
        let inode = self.inode(request.inode)?;
        let mut locks = self.locks();
        let (file, before) = match locks.held.remove(&key) {
            Some(held) => (Some(held.file), held.ranges),
            None if request.kind.is_none() => return Ok(()),
            None => (spare.take(), Ranges::default()),
        };
        locks.ranges -= before.len();
        let mut file = file.map_or_else(|| self.lock_file(&inode, request.handle), Ok)?;
        let after = before.with(request.start, request.end, request.kind);
        let result = if locks.ranges + after.len() > LOCKS_MAX {
            Err(Errno::NOLCK.into())
        } else {
            self.set_lock(&mut file, &inode, request, &before)
        };
        let ranges = if result.is_ok() { after } else { before };
        if ranges.is_empty() {
            *spare = Some(file);
        } else {
            locks.ranges += ranges.len();
            let held = OwnerLocks { file, ranges, handle: request.handle, process: request.process };
            locks.held.insert(key, held);
        }
        result
    }

    /// Requests a lock from the host. An exclusive lock requires a file that is open for writing. If the owner's lock
    /// file is not, but the handle of this request is, a new lock file is opened and takes over the shared locks.
    fn set_lock(
        &self,
        file: &mut LockFile,
        inode: &Inode,
        request: &LockRequest,
        before: &Ranges,
    ) -> io::Result<()> {
        let lock = |file: &LockFile, request: &LockRequest| {
            control(&file.file, libc::F_OFD_SETLK, &mut range_of(request))
        };
        if request.kind == Some(LockKind::Write) && !file.may_write {
            if !self.may_write(request.handle)? {
                return Err(Errno::BADF.into());
            }
            let other = self.lock_file(inode, request.handle)?;
            // Both files hold the shared locks until the old one is closed.
            before.iter().try_for_each(|&Range { start, end, kind }| {
                lock(&other, &LockRequest { start, end, kind: Some(kind), ..*request })
            })?;
            *file = other;
        }
        lock(file, request)
    }

    /// The lock that conflicts with a request, or `F_UNLCK` if there is none.
    pub(super) fn find_lock(&self, request: &LockRequest) -> io::Result<FileLock> {
        let none =
            FileLock { start: request.start, end: request.end, lock_type: number(libc::F_UNLCK), pid: 0 };
        let key = (request.inode, request.owner);
        let locks = self.locks();
        let mut lock = range_of(request);
        match locks.held.get(&key) {
            Some(held) => control(&held.file.file, libc::F_OFD_GETLK, &mut lock)?,
            // The owner has no locks.
            None => control(self.handles().get(request.handle)?, libc::F_OFD_GETLK, &mut lock)?,
        }
        if lock.l_type == short(libc::F_UNLCK) {
            return Ok(none);
        }
        let start = lock.l_start.unsigned_abs();
        let end = match lock.l_len.unsigned_abs() {
            0 => OFFSET_MAX,
            length => start.saturating_add(length - 1),
        };
        // Processes of the host have no process id in the guest.
        let pid = locks.process(key, start).unwrap_or(0);
        Ok(FileLock { start, end, lock_type: number(lock.l_type.into()), pid })
    }

    /// Releases the POSIX locks of a process that has closed the file; any close of the file releases all of them.
    pub(super) fn release_owner(&self, inode: u64, owner: u64) {
        self.locks().release((inode, owner));
    }

    /// Releases the locks that were last requested through a handle when it is closed, since locks that belong to the
    /// open file are not released by `release_owner`.
    pub(super) fn release_handle(&self, inode: u64, handle: u64) {
        let mut locks = self.locks();
        let held = locks.held.range((inode, 0)..=(inode, u64::MAX));
        let gone: Vec<_> = held.filter(|(_, held)| held.handle == handle).map(|(key, _)| *key).collect();
        gone.into_iter().for_each(|key| locks.release(key));
        locks.flocks.remove(&handle);
    }

    /// Whether a handle is open for writing.
    fn may_write(&self, handle: u64) -> io::Result<bool> {
        let flags = rustix::fs::fcntl_getfl(self.handles().get(handle)?)?;
        Ok(flags & OFlags::RWMODE != OFlags::RDONLY)
    }

    /// Opens a lock file, for writing only if the handle is open for writing: programs of the host can observe an open
    /// for writing.
    fn lock_file(&self, inode: &Inode, handle: u64) -> io::Result<LockFile> {
        let may_write = self.may_write(handle)?;
        let file = if may_write {
            // Shared locks require a file that is open for reading.
            self.reopen(inode, OFlags::RDWR).or_else(|_| self.reopen(inode, OFlags::WRONLY))?
        } else {
            self.reopen(inode, OFlags::RDONLY)?
        };
        Ok(LockFile { file, may_write })
    }
}

fn range_of(request: &LockRequest) -> libc::flock {
    let kind = match request.kind {
        Some(LockKind::Read) => libc::F_RDLCK,
        Some(LockKind::Write) => libc::F_WRLCK,
        None => libc::F_UNLCK,
    };
    // The length 0 means up to the end of the file.
    let length = if request.end >= OFFSET_MAX { 0 } else { request.end - request.start + 1 };
    libc::flock {
        l_type: short(kind),
        l_whence: short(libc::SEEK_SET),
        l_start: request.start.cast_signed(),
        l_len: length.cast_signed(),
        l_pid: 0,
    }
}

fn control(file: &File, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the kernel reads the structure, and writes it for F_OFD_GETLK. It is valid during the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn short(number: libc::c_int) -> libc::c_short {
    libc::c_short::try_from(number).unwrap_or_default()
}

fn number(kind: libc::c_int) -> u32 {
    kind.unsigned_abs()
}
