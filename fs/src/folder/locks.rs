//! Locks of the guest's programs, which are locks of the host: two guests, or a guest and its host, exclude each other.
//!
//! Each kind is its own kind on the host. A lock of flock(2) is one of the file that the guest has open. POSIX locks
//! belong to a process, of which the guest has many and the host sees one: each owner has an open file of its own, whose
//! open file description owns the locks (`F_OFD_SETLK`). They conflict with the POSIX locks of the host's programs.
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

/// Ranges that a guest may have locked, and as many open files: each is memory of the host's kernel, which looks through
/// all of a file's at each request and at the end of this process.
const LOCKS_MAX: usize = 1 << 11;
/// The largest offset of a file, which as the end of a range means all that follows.
const OFFSET_MAX: u64 = i64::MAX.unsigned_abs();

/// A lock that the guest asks for, or gives back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LockRequest {
    inode: u64,
    handle: u64,
    owner: u64,
    start: u64,
    end: u64,
    /// Nothing where a lock is given back.
    kind: Option<LockKind>,
    /// The guest's process.
    process: u32,
    is_flock: bool,
}

impl LockRequest {
    /// The request that a message makes.
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

/// POSIX locks of the guest, by file and owner.
#[derive(Debug, Default)]
pub(super) struct Locks {
    held: BTreeMap<(u64, u64), Held>,
    /// The number of ranges of all.
    ranges: usize,
    /// Open files that may have a lock of flock.
    flocks: BTreeSet<u64>,
}

/// The locks of one owner on a file.
#[derive(Debug)]
struct Held {
    file: LockFile,
    ranges: Ranges,
    /// The open file through which the guest asked last.
    handle: u64,
    process: u32,
}

/// An open file whose description has the POSIX locks of one owner.
#[derive(Debug)]
pub(crate) struct LockFile {
    file: File,
    may_write: bool,
}

impl Locks {
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Gives back what an owner has locked of a file.
    fn release(&mut self, key: (u64, u64)) {
        if let Some(held) = self.held.remove(&key) {
            self.ranges -= held.ranges.len();
        }
    }

    /// The guest's process, other than this owner's, that has locked a byte.
    fn process(&self, (inode, owner): (u64, u64), byte: u64) -> Option<u32> {
        let mut held = self.held.range((inode, 0)..=(inode, u64::MAX));
        let found = held.find(|((_, other), held)| *other != owner && held.ranges.contain(byte));
        found.map(|(_, held)| held.process)
    }
}

impl Folder {
    /// Locks or unlocks without waiting: `EAGAIN` where another owner has the lock. A retry passes the same `spare`, so
    /// that the file is opened once: programs of the host may watch openings.
    pub(crate) fn try_lock(&self, request: &LockRequest, spare: &mut Option<LockFile>) -> io::Result<()> {
        if request.kind.is_some() {
            // A request that waits may be of a handle that has been closed meanwhile.
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
            let held = Held { file, ranges, handle: request.handle, process: request.process };
            locks.held.insert(key, held);
        }
        result
    }

    /// Asks the host for a lock. An exclusive lock needs a file that is open for writing: where the owner's file is not
    /// and the handle of this request is, the shared locks move to a new file that is.
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
            // Both files hold them for a moment.
            before.iter().try_for_each(|&Range { start, end, kind }| {
                lock(&other, &LockRequest { start, end, kind: Some(kind), ..*request })
            })?;
            *file = other;
        }
        lock(file, request)
    }

    /// The lock that keeps a request from being granted, or none.
    pub(super) fn find_lock(&self, request: &LockRequest) -> io::Result<FileLock> {
        let none =
            FileLock { start: request.start, end: request.end, lock_type: number(libc::F_UNLCK), pid: 0 };
        let key = (request.inode, request.owner);
        let locks = self.locks();
        let mut lock = range_of(request);
        match locks.held.get(&key) {
            Some(held) => control(&held.file.file, libc::F_OFD_GETLK, &mut lock)?,
            // It has no locks of its own.
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
        // Processes of the host have no numbers in a guest.
        let pid = locks.process(key, start).unwrap_or(0);
        Ok(FileLock { start, end, lock_type: number(lock.l_type.into()), pid })
    }

    /// A process of the guest has closed the file, which gives back its locks, however often it has it open.
    pub(super) fn release_owner(&self, inode: u64, owner: u64) {
        self.locks().release((inode, owner));
    }

    /// An open file of the guest is gone, and with it what it locked as one: nobody else can give that back.
    pub(super) fn release_handle(&self, inode: u64, handle: u64) {
        let mut locks = self.locks();
        let held = locks.held.range((inode, 0)..=(inode, u64::MAX));
        let gone: Vec<_> = held.filter(|(_, held)| held.handle == handle).map(|(key, _)| *key).collect();
        gone.into_iter().for_each(|key| locks.release(key));
        locks.flocks.remove(&handle);
    }

    /// Whether the guest has a file open for writing.
    fn may_write(&self, handle: u64) -> io::Result<bool> {
        let flags = rustix::fs::fcntl_getfl(self.handles().get(handle)?)?;
        Ok(flags & OFlags::RWMODE != OFlags::RDONLY)
    }

    /// Opens a file for writing only where the guest has it open for writing: programs of the host notice such an opening.
    fn lock_file(&self, inode: &Inode, handle: u64) -> io::Result<LockFile> {
        let may_write = self.may_write(handle)?;
        let file = if may_write {
            // Shared locks need a file that is open for reading.
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
    // Up to the end is a length of zero.
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
    // SAFETY: the kernel reads the structure, and writes it for F_OFD_GETLK; it lives as long as the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn short(number: libc::c_int) -> libc::c_short {
    libc::c_short::try_from(number).unwrap_or_default()
}

fn number(kind: libc::c_int) -> u32 {
    kind.unsigned_abs()
}
