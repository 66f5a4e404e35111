//! Locks exclude guests and programs of the host from each other.

use crate::folder;
use crate::server::{O_RDWR, ROOT, Server, long, longs, number, op, words};
use rustix::fs::inotify::{self, ReadFlags, WatchFlags};
use rustix::fs::{FlockOperation, fcntl_lock, flock};
use rustix::io::Errno;
use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;

/// A lock request for an open file of the guest.
#[derive(Clone, Copy)]
struct Lock {
    inode: u64,
    handle: u64,
    owner: u64,
    range: (u64, u64),
    kind: u32,
    flags: u32,
}

const READ_LOCK: u32 = 0;
const WRITE_LOCK: u32 = 1;
const UNLOCK: u32 = 2;
const END: u64 = i64::MAX as u64;

impl Lock {
    fn new(server: &mut Server, owner: u64) -> Self {
        let inode = server.lookup(ROOT, "file").unwrap();
        let handle = server.open(inode, O_RDWR).unwrap();
        Self { inode, handle, owner, range: (0, END), kind: WRITE_LOCK, flags: 0 }
    }

    /// The same lock with flock(2).
    fn flock(self) -> Self {
        Self { flags: 1, ..self }
    }

    fn body(&self) -> Vec<u8> {
        let (start, end) = self.range;
        [longs(&[self.handle, self.owner, start, end]), words(&[self.kind, 77, self.flags, 0])].concat()
    }
}

impl Server {
    fn lock(&mut self, lock: Lock) -> Result<(), i32> {
        self.ask(op::SETLK, lock.inode, &lock.body()).map(drop)
    }

    fn unlock(&mut self, lock: Lock) {
        self.lock(Lock { kind: UNLOCK, ..lock }).unwrap();
    }

    /// Sends a request that waits for a lock, and returns its id.
    fn wait_for(&mut self, lock: Lock) -> u64 {
        self.send(op::SETLKW, lock.inode, &lock.body());
        let unique = self.next;
        // Other requests are served in the meantime.
        self.ask(op::GETATTR, ROOT, &[0; 16]).unwrap();
        unique
    }

    fn close(&mut self, lock: Lock) {
        self.ask(op::FLUSH, lock.inode, &longs(&[lock.handle, 0, lock.owner])).unwrap();
    }

    fn release(&mut self, lock: Lock) {
        let body = [longs(&[lock.handle]), words(&[0, 0]), longs(&[0])].concat();
        self.ask(op::RELEASE, lock.inode, &body).unwrap();
    }
}

/// Opens the guest's file on the host.
fn open_on_host(folder: &Path) -> fs::File {
    fs::File::options().read(true).write(true).open(folder.join("file")).unwrap()
}

/// An inotify watch of the host.
struct Watch(OwnedFd);

impl Watch {
    fn new(file: &Path) -> Self {
        let watch = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
        inotify::add_watch(&watch, file, WatchFlags::OPEN | WatchFlags::CLOSE_WRITE).unwrap();
        Self(watch)
    }

    /// The number of events of a type since the last call.
    fn count(&self, what: ReadFlags) -> usize {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.0, &mut buffer);
        let mut count = 0;
        while let Ok(event) = reader.next() {
            count += usize::from(event.events().contains(what));
        }
        count
    }
}

/// Two guests and the host.
#[test]
fn locks_hold_among_guests_and_with_the_host() {
    let folder = folder();
    let host_file = open_on_host(folder.path());
    let (mut one, mut other) = (Server::start(folder.path(), &[]), Server::start(folder.path(), &[]));
    let (first, second) = (Lock::new(&mut one, 1), Lock::new(&mut other, 1));
    let exclusive = FlockOperation::NonBlockingLockExclusive;
    let unlock = FlockOperation::NonBlockingUnlock;
    // POSIX locks.
    one.lock(first).unwrap();
    assert_eq!(other.lock(second), Err(libc::EAGAIN));
    assert_eq!(other.lock(Lock { kind: READ_LOCK, ..second }), Err(libc::EAGAIN));
    assert_eq!(fcntl_lock(&host_file, exclusive), Err(Errno::AGAIN));
    one.unlock(first);
    fcntl_lock(&host_file, exclusive).unwrap();
    assert_eq!(one.lock(first), Err(libc::EAGAIN));
    assert_eq!(other.lock(Lock { kind: READ_LOCK, ..second }), Err(libc::EAGAIN));
    fcntl_lock(&host_file, unlock).unwrap();
    for server in [(&mut one, first), (&mut other, second)] {
        server.0.lock(Lock { kind: READ_LOCK, ..server.1 }).unwrap();
    }
    assert_eq!(one.lock(first), Err(libc::EAGAIN), "the other guest has a shared lock");
    other.unlock(second);
    one.lock(first).unwrap();
    // flock locks are independent of POSIX locks.
    other.lock(second.flock()).unwrap();
    assert_eq!(one.lock(first.flock()), Err(libc::EAGAIN));
    assert_eq!(flock(&host_file, exclusive), Err(Errno::AGAIN));
    other.unlock(second.flock());
    flock(&host_file, exclusive).unwrap();
    assert_eq!(one.lock(first.flock()), Err(libc::EAGAIN));
    flock(&host_file, unlock).unwrap();
    // The end of a guest releases its locks.
    one.lock(first.flock()).unwrap();
    one.end();
    other.lock(second).unwrap();
    other.lock(second.flock()).unwrap();
    other.end();
}

#[test]
fn each_owner_has_its_own_locks() {
    let folder = folder();
    let mut server = Server::start(folder.path(), &[]);
    let lock = Lock { range: (10, 19), ..Lock::new(&mut server, 1) };
    let other = Lock { owner: 2, ..Lock::new(&mut server, 2) };
    server.lock(lock).unwrap();
    server.lock(Lock { kind: READ_LOCK, ..lock }).unwrap();
    server.lock(lock).unwrap();
    for (range, result) in [
        ((0, 9), Ok(())),
        ((20, END), Ok(())),
        ((0, 10), Err(libc::EAGAIN)),
        ((19, u64::MAX), Err(libc::EAGAIN)),
    ] {
        assert_eq!(server.lock(Lock { range, ..other }), result, "{range:?}");
    }
    // The conflicting lock and the process of the guest that holds it.
    let found = server.ask(op::GETLK, other.inode, &Lock { range: (0, 15), ..other }.body()).unwrap();
    assert_eq!(
        (long(&found, 0), long(&found, 8), number(&found, 16), number(&found, 20)),
        (10, 19, WRITE_LOCK, 77)
    );
    let found = server.ask(op::GETLK, other.inode, &Lock { range: (0, 5), ..other }.body()).unwrap();
    assert_eq!(number(&found, 16), UNLOCK);
    // A part is unlocked, then a process that closes the file unlocks the rest.
    server.unlock(Lock { range: (15, 30), ..lock });
    server.lock(Lock { range: (15, 30), ..other }).unwrap();
    assert_eq!(server.lock(Lock { range: (14, 14), ..other }), Err(libc::EAGAIN));
    server.close(other);
    assert_eq!(server.lock(other), Err(libc::EAGAIN));
    server.close(lock);
    server.lock(other).unwrap();
    // Locks of an open file are released with the handle, without a FLUSH of their owner.
    server.release(other);
    server.lock(lock).unwrap();
    // A new mount by the guest.
    server.lock(lock.flock()).unwrap();
    server.ask(op::INIT, 0, &[&words(&[7, 38, 0, 0, 0, 0])[..], &[0; 40]].concat()).unwrap();
    let lock = Lock::new(&mut server, 3);
    server.lock(lock).unwrap();
    server.lock(lock.flock()).unwrap();
    server.end();
}

#[test]
fn pending_locks_do_not_block_other_requests() {
    let folder = folder();
    let host_file = open_on_host(folder.path());
    let mut server = Server::start(folder.path(), &[]);
    let holder = Lock::new(&mut server, 1);
    for flags in [0, 1] {
        let holder = Lock { flags, ..holder };
        let waiter = Lock { flags, ..Lock::new(&mut server, 2) };
        server.lock(holder).unwrap();
        let unique = server.wait_for(waiter);
        // The guest unlocks; the two replies may come in any order.
        server.send(op::SETLK, holder.inode, &Lock { kind: UNLOCK, ..holder }.body());
        let mut answers = [server.receive_any(), server.receive_any()];
        answers.sort();
        assert_eq!(
            answers.map(|(unique, result)| (unique, result.is_ok())),
            [(unique, true), (server.next, true)]
        );
        assert_eq!(server.lock(holder), Err(libc::EAGAIN));
        server.unlock(waiter);
        // The host unlocks.
        let lock = |operation| {
            if flags == 0 { fcntl_lock(&host_file, operation) } else { flock(&host_file, operation) }
        };
        lock(FlockOperation::NonBlockingLockExclusive).unwrap();
        let unique = server.wait_for(waiter);
        lock(FlockOperation::NonBlockingUnlock).unwrap();
        assert_eq!(server.receive_any(), (unique, Ok(Vec::new())));
        server.unlock(waiter);
        // A free lock is granted without waiting.
        server.ask(op::SETLKW, waiter.inode, &waiter.body()).unwrap();
        server.unlock(waiter);
    }
    server.end();
}

#[test]
fn pending_locks_can_be_interrupted() {
    let folder = folder();
    let mut server = Server::start(folder.path(), &[]);
    let (holder, waiter) = (Lock::new(&mut server, 1), Lock::new(&mut server, 2));
    server.lock(holder).unwrap();
    let (first, second) = (server.wait_for(waiter), server.wait_for(waiter));
    for interrupted in [second, 1 << 40] {
        server.send(op::INTERRUPT, 0, &longs(&[interrupted]));
    }
    server.send(op::INTERRUPT, 0, &[]);
    assert_eq!(server.receive_any(), (second, Err(libc::EINTR)));
    // The end of a mount interrupts pending requests.
    server.send(op::DESTROY, 0, &[]);
    assert_eq!(server.receive_any(), (first, Err(libc::EINTR)));
    assert_eq!(server.receive(), Ok(Vec::new()));
    server.end();
}

/// Opening a file for writing is visible on the host: inotify reports it, and the file cannot be executed meanwhile.
#[test]
fn a_lock_opens_a_file_for_writing_only_if_the_guest_has() {
    let folder = folder();
    let host_file = open_on_host(folder.path());
    let exclusive = FlockOperation::NonBlockingLockExclusive;
    for options in [&[][..], &["--read-only"]] {
        let watch = Watch::new(&folder.path().join("file"));
        let mut server = Server::start(folder.path(), options);
        let inode = server.lookup(ROOT, "file").unwrap();
        let handle = server.open(inode, 0).unwrap();
        let lock = Lock { inode, handle, owner: 1, range: (0, END), kind: WRITE_LOCK, flags: 0 };
        assert_eq!(server.lock(lock), Err(libc::EBADF));
        server.ask(op::GETLK, inode, &lock.body()).unwrap();
        let shared = Lock { kind: READ_LOCK, ..lock };
        server.lock(shared).unwrap();
        assert_eq!(fcntl_lock(&host_file, exclusive), Err(Errno::AGAIN));
        if options.is_empty() {
            // The same process also opens the file for writing, and keeps its locks.
            let both = server.open(inode, O_RDWR).unwrap();
            server.lock(Lock { handle: both, range: (5, 9), ..lock }).unwrap();
            assert_eq!(fcntl_lock(&host_file, FlockOperation::NonBlockingLockShared), Err(Errno::AGAIN));
            server.unlock(Lock { handle: both, range: (5, 9), ..lock });
            assert_eq!(fcntl_lock(&host_file, exclusive), Err(Errno::AGAIN));
        }
        server.close(lock);
        // Only the process with write access caused an event.
        assert_eq!(watch.count(ReadFlags::CLOSE_WRITE), usize::from(options.is_empty()));
        fcntl_lock(&host_file, exclusive).unwrap();
        fcntl_lock(&host_file, FlockOperation::NonBlockingUnlock).unwrap();
        // A file that is not open has no locks.
        assert_eq!(server.lock(Lock { handle: 99, ..shared }), Err(libc::EBADF));
        server.end();
    }
}

#[test]
fn a_pending_lock_opens_its_file_once() {
    let folder = folder();
    let host_file = open_on_host(folder.path());
    let mut server = Server::start(folder.path(), &[]);
    let waiter = Lock::new(&mut server, 1);
    fcntl_lock(&host_file, FlockOperation::NonBlockingLockExclusive).unwrap();
    let unique = server.wait_for(waiter);
    let watch = Watch::new(&folder.path().join("file"));
    // The lock is retried after each of these requests.
    for _ in 0..20 {
        server.ask(op::GETATTR, ROOT, &[0; 16]).unwrap();
    }
    assert_eq!(watch.count(ReadFlags::OPEN), 0);
    server.release(waiter);
    assert_eq!(server.receive_any(), (unique, Err(libc::EBADF)));
    server.end();
}

#[test]
fn locks_are_bounded() {
    let folder = folder();
    let mut server = Server::start(folder.path(), &[]);
    let (holder, waiter) = (Lock::new(&mut server, 1), Lock::new(&mut server, 2));
    server.lock(holder).unwrap();
    let waiting: Vec<_> = (0..64).map(|_| server.wait_for(waiter)).collect();
    assert_eq!(server.ask(op::SETLKW, waiter.inode, &waiter.body()), Err(libc::ENOLCK));
    for unique in waiting {
        server.send(op::INTERRUPT, 0, &longs(&[unique]));
        assert_eq!(server.receive_any(), (unique, Err(libc::EINTR)));
    }
    server.unlock(holder);
    // Single bytes that are not adjacent, of two owners.
    let mut locked = 0;
    while server.lock(Lock { owner: 1 + locked % 2, range: (2 * locked, 2 * locked), ..holder }).is_ok() {
        locked += 1;
    }
    assert_eq!(locked, 1 << 11);
    assert_eq!(server.lock(Lock { owner: 9, range: (END, END), ..holder }), Err(libc::ENOLCK));
    server.close(holder);
    server.lock(Lock { owner: 9, range: (END, END), ..holder }).unwrap();
    // Open files with a flock lock.
    let shared = Lock { kind: READ_LOCK, ..holder.flock() };
    let handles: Vec<_> = (0..=1 << 11).map(|_| server.open(holder.inode, O_RDWR).unwrap()).collect();
    let (last, others) = handles.split_last().unwrap();
    for &handle in others {
        server.lock(Lock { handle, ..shared }).unwrap();
    }
    assert_eq!(server.lock(Lock { handle: *last, ..shared }), Err(libc::ENOLCK));
    server.lock(Lock { handle: others[0], ..shared }).unwrap();
    server.release(Lock { handle: others[0], ..shared });
    server.lock(Lock { handle: *last, ..shared }).unwrap();
    for lock in [
        Lock { range: (5, 4), ..holder },
        Lock { range: (u64::MAX, u64::MAX), ..holder },
        Lock { kind: 3, ..holder },
        Lock { inode: 99, ..holder },
        Lock { handle: u64::MAX, ..holder.flock() },
    ] {
        assert!(matches!(server.lock(lock), Err(libc::EINVAL | libc::ESTALE | libc::EBADF)));
        let waiting = server.ask(op::SETLKW, lock.inode, &lock.body());
        assert!(matches!(waiting, Err(libc::EINVAL | libc::ESTALE | libc::EBADF)));
    }
    server.end();
}
