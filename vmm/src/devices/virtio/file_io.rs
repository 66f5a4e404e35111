//! Non-blocking file I/O to and from guest memory.
//!
//! A transfer of limited size whose pages are in the page cache is performed inline, which takes one system call and no
//! switch of threads. Everything else goes to an io_uring, or to a thread if the host does not allow io_uring, and
//! completes with an event. The io_uring or thread is created when it is first needed, or before the guest runs if the
//! process is jailed.
#![expect(unsafe_code, reason = "reads and writes with addresses of guest memory")]

use super::{Segment, Watcher};
use crate::jail::{Jail, Thread};
use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};
use rustix::event::epoll::EventFlags;
use rustix::fs::{FileType, OFlags, fstat};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::EventFd;

/// Maximum number of bytes that are transferred inline: copying them takes two tenths of a millisecond, during which
/// the device is locked. Linux makes no larger requests than 1280 KiB by default (`BLK_DEF_MAX_SECTORS_CAP` in
/// block/blk.h).
const INLINE_MAX: u64 = 2 << 20;

/// A file operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Reads from the file into guest memory.
    Read,
    /// Writes guest memory to the file.
    Write,
    /// Makes completed writes durable (fdatasync(2)).
    Flush,
    /// Makes a range of this many bytes read as zeroes, and deallocates it.
    PunchHole(u64),
    /// Makes a range of this many bytes read as zeroes, and keeps its allocation. In a sparse file this punches a hole,
    /// because otherwise the range would be allocated although it was not before.
    Zero(u64),
}

/// An operation with its offset in the file and its segments of guest memory.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) operation: Operation,
    pub(super) offset: u64,
    /// Segments, which the caller keeps valid until the job is done.
    segments: *const Segment,
    count: usize,
    /// Whether the transfer is too large for the device's thread.
    is_large: bool,
}

// SAFETY: the pointer is to segments that stay valid until the job is done, see `Job::new`.
unsafe impl Send for Job {}

impl Job {
    /// Creates a job for these segments.
    ///
    /// # Safety
    /// The segments, and the guest memory that they refer to, stay valid until the job has been executed or, after a
    /// submission, has completed.
    pub(super) unsafe fn new(operation: Operation, offset: u64, segments: &[Segment]) -> Self {
        let bytes: u64 = segments.iter().map(|segment| segment.len() as u64).sum();
        let is_large = bytes > INLINE_MAX;
        Self { operation, offset, segments: segments.as_ptr(), count: segments.len(), is_large }
    }

    /// Executes the job. With `nowait` it fails with EAGAIN when it would block, and with EOPNOTSUPP when the
    /// filesystem does not support non-blocking I/O.
    fn execute(&self, file: BorrowedFd<'_>, nowait: bool) -> io::Result<u64> {
        let fd = file.as_raw_fd();
        let again = || Err(io::Error::from_raw_os_error(libc::EAGAIN));
        let Ok(offset) = i64::try_from(self.offset) else { return Err(io::ErrorKind::InvalidInput.into()) };
        let Ok(count) = i32::try_from(self.count) else { return Err(io::ErrorKind::InvalidInput.into()) };
        let flags = if nowait { libc::RWF_NOWAIT } else { 0 };
        let segments: *const libc::iovec = self.segments.cast();
        // SAFETY: the creator of the job keeps its segments and their memory valid; a segment is an iovec. The guest
        // may access the memory concurrently, which the kernel tolerates.
        let result = unsafe {
            match self.operation {
                Operation::Read => libc::preadv2(fd, segments, count, offset, flags),
                Operation::Write => libc::pwritev2(fd, segments, count, offset, flags),
                _ if nowait => return again(),
                Operation::Flush => libc::fdatasync(fd) as isize,
                Operation::PunchHole(length) | Operation::Zero(length) => {
                    let Ok(length) = i64::try_from(length) else {
                        return Err(io::ErrorKind::InvalidInput.into());
                    };
                    libc::fallocate(fd, self.mode(), offset, length) as isize
                }
            }
        };
        u64::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// The mode of fallocate(2).
    const fn mode(&self) -> i32 {
        let what = match self.operation {
            Operation::Zero(_) => libc::FALLOC_FL_ZERO_RANGE,
            _ => libc::FALLOC_FL_PUNCH_HOLE,
        };
        what | libc::FALLOC_FL_KEEP_SIZE
    }

    fn entry(&self, fd: types::Fd) -> squeue::Entry {
        let count = u32::try_from(self.count).unwrap_or(u32::MAX);
        let entry = match self.operation {
            Operation::Read => {
                opcode::Readv::new(fd, self.segments.cast(), count).offset(self.offset).build()
            }
            Operation::Write => {
                opcode::Writev::new(fd, self.segments.cast(), count).offset(self.offset).build()
            }
            Operation::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Operation::PunchHole(length) | Operation::Zero(length) => {
                opcode::Fallocate::new(fd, length).offset(self.offset).mode(self.mode()).build()
            }
        };
        // Without this flag io_uring first tries to complete the job in the submitting call, which for cached pages
        // means copying all of them there.
        if self.is_large { entry.flags(squeue::Flags::ASYNC) } else { entry }
    }
}

/// A completed job: its number and the transferred bytes.
pub(super) type Completion = (u32, io::Result<u64>);

/// The backing file of a device.
#[derive(Debug)]
pub(super) struct FileIo {
    file: Arc<File>,
    speed: Speed,
    /// Number of jobs that have been submitted and have not completed.
    pending: u32,
    engine: Option<Engine>,
    /// Maximum number of pending jobs.
    depth: u32,
}

/// How fast a file can be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Speed {
    /// On tmpfs: no access blocks.
    Memory,
    /// Buffered I/O: an access to the page cache does not block, and the host reports if it would (RWF_NOWAIT).
    Cached,
    /// Direct I/O, which waits for the disk even with RWF_NOWAIT.
    Direct,
}

#[derive(Debug)]
enum Engine {
    Ring(Box<Ring>),
    Thread(Worker),
}

struct Ring(IoUring);

impl Ring {
    /// Takes the completed jobs. Completions that do not fit into the completion queue stay in the kernel, which keeps
    /// the ring readable and moves them to the queue on the next io_uring_enter(2).
    fn finished(&mut self, into: &mut Vec<Completion>) {
        loop {
            let before = into.len();
            into.extend(self.0.completion().map(|entry| {
                let number = u32::try_from(entry.user_data()).unwrap_or(u32::MAX);
                let result = u64::try_from(entry.result());
                (number, result.map_err(|_| io::Error::from_raw_os_error(-entry.result())))
            }));
            if into.len() == before || !self.0.submission().cq_overflow() {
                return;
            }
            submit(&self.0);
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("io_uring")
    }
}

impl FileIo {
    /// Creates the I/O of a file with at most `depth` pending jobs.
    pub(super) fn new(file: File, depth: u16) -> Self {
        // For a block device, fstatfs reports the filesystem of its device node, which is not the data's.
        let is_memory = file.metadata().is_ok_and(|metadata| metadata.is_file())
            && rustix::fs::fstatfs(&file)
                .is_ok_and(|status| u64::try_from(status.f_type) == Ok(libc::TMPFS_MAGIC.unsigned_abs()));
        let is_direct = rustix::fs::fcntl_getfl(&file).is_ok_and(|flags| flags.contains(OFlags::DIRECT));
        let speed = match (is_memory, is_direct) {
            (true, _) => Speed::Memory,
            (false, true) => Speed::Direct,
            (false, false) => Speed::Cached,
        };
        Self { file: Arc::new(file), speed, pending: 0, engine: None, depth: depth.into() }
    }

    /// Treats a file like a disk whose every access blocks.
    #[cfg(test)]
    pub(super) fn slow(file: File) -> Self {
        let mut this = Self::new(file, 4);
        this.speed = Speed::Direct;
        this
    }

    /// Whether jobs can be performed inline.
    pub(super) const fn supports_inline(&self) -> bool {
        !matches!(self.speed, Speed::Direct)
    }

    /// Whether jobs are pending.
    pub(super) const fn is_busy(&self) -> bool {
        self.pending > 0
    }

    /// Whether the file has holes.
    fn is_sparse(&self) -> bool {
        /// The unit of `st_blocks` in bytes, regardless of the filesystem's block size.
        const BLOCK: i64 = 512;
        fstat(&self.file).is_ok_and(|file| {
            FileType::from_raw_mode(file.st_mode).is_file()
                && file.st_blocks.saturating_mul(BLOCK) < file.st_size
        })
    }

    /// Performs a job inline, and returns its result; `None` when it would block.
    pub(super) fn try_inline(&self, job: &Job) -> Option<io::Result<u64>> {
        match self.speed {
            // On tmpfs there is nothing to flush.
            Speed::Memory if job.operation == Operation::Flush => Some(Ok(0)),
            // Large transfers and deallocations take long even when they do not block.
            _ if job.is_large || matches!(job.operation, Operation::PunchHole(_) | Operation::Zero(_)) => {
                None
            }
            Speed::Memory => Some(job.execute(self.file.as_fd(), false)),
            Speed::Direct => None,
            Speed::Cached => match job.execute(self.file.as_fd(), true) {
                Err(error)
                    if [Some(libc::EAGAIN), Some(libc::EOPNOTSUPP)].contains(&error.raw_os_error()) =>
                {
                    None
                }
                result => Some(result),
            },
        }
    }

    /// Creates the io_uring or the thread now, because `jail` forbids it later.
    ///
    /// # Errors
    /// When neither is available.
    pub(super) fn prepare(&mut self, token: u32, watcher: &Watcher, jail: Jail) -> io::Result<()> {
        self.engine = Some(Engine::new(self.depth, token, watcher, jail)?);
        Ok(())
    }

    /// Submits a job. Its completion is returned by [`Self::finished`] after an event with this token.
    ///
    /// # Errors
    /// When `depth` jobs are pending, or neither io_uring nor a thread is available.
    pub(super) fn submit(
        &mut self,
        number: u32,
        mut job: Job,
        token: u32,
        watcher: &Watcher,
    ) -> io::Result<()> {
        if self.pending >= self.depth {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        if self.engine.is_none() {
            self.engine = Some(Engine::new(self.depth, token, watcher, Jail::OFF)?);
        }
        if let Operation::Zero(length) = job.operation
            && self.is_sparse()
        {
            job.operation = Operation::PunchHole(length);
        }
        match &mut self.engine {
            Some(Engine::Ring(ring)) => {
                let entry = job.entry(types::Fd(self.file.as_raw_fd())).user_data(number.into());
                // SAFETY: the creator of the job keeps its memory valid until it completes, and the file stays open as
                // long as `self`, which drains its jobs.
                unsafe { ring.0.submission().push(&entry) }.map_err(|_| io::ErrorKind::WouldBlock)?;
                // If the host is out of memory, the job stays in the submission queue, see `retry_submit`.
                submit(&ring.0);
            }
            Some(Engine::Thread(worker)) => worker.submit(number, job, &self.file),
            None => {}
        }
        self.pending += 1;
        Ok(())
    }

    /// Submits jobs again that the host had no memory for; returns whether such jobs are left.
    pub(super) fn retry_submit(&mut self) -> bool {
        let Some(Engine::Ring(ring)) = &mut self.engine else { return false };
        if !ring.0.submission().is_empty() {
            submit(&ring.0);
        }
        !ring.0.submission().is_empty()
    }

    /// Appends the completed jobs to `into`.
    pub(super) fn finished(&mut self, into: &mut Vec<Completion>) {
        let before = into.len();
        match &mut self.engine {
            Some(Engine::Ring(ring)) => ring.finished(into),
            Some(Engine::Thread(worker)) => worker.finished(into),
            None => {}
        }
        self.pending -= u32::try_from(into.len() - before).unwrap_or(0);
    }

    /// Waits until no job is pending, so that the host does not access guest memory any more.
    pub(super) fn drain(&mut self) {
        let mut done = Vec::new();
        while self.pending > 0 {
            match &mut self.engine {
                // A signal may interrupt the wait; no other error is possible.
                Some(Engine::Ring(ring)) => drop(ring.0.submit_and_wait(1)),
                Some(Engine::Thread(worker)) => worker.wait(),
                None => return,
            }
            self.finished(&mut done);
        }
    }
}

impl Drop for FileIo {
    fn drop(&mut self) {
        self.drain();
    }
}

/// Submits the submission queue. Entries that the host does not accept now stay in the queue.
fn submit(ring: &IoUring) {
    while ring.submit().is_err_and(|error| error.kind() == io::ErrorKind::Interrupted) {}
}

impl Engine {
    fn new(depth: u32, token: u32, watcher: &Watcher, jail: Jail) -> io::Result<Self> {
        // Many container runtimes and hardened hosts forbid io_uring.
        if let Ok(ring) = restricted_ring(depth) {
            // SAFETY: the ring is open as long as the engine.
            let fd = unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) };
            watcher.add(fd, token, EventFlags::IN)?;
            return Ok(Self::Ring(Box::new(Ring(ring))));
        }
        let worker = Worker::start(jail)?;
        watcher.add(crate::poll::borrow(&worker.shared.finished_event), token, EventFlags::IN)?;
        Ok(Self::Thread(worker))
    }
}

/// An io_uring that is restricted to the operations of [`Job::entry`] (from Linux 5.10). It is not restricted to the disk's
/// file: a ring keeps files that are registered open for a while after its process has ended, and so their locks.
fn restricted_ring(depth: u32) -> io::Result<IoUring> {
    let ring = IoUring::builder().setup_r_disabled().build(depth)?;
    let operations =
        [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
    let mut restrictions: Vec<_> = operations.into_iter().map(Restriction::sqe_op).collect();
    restrictions.push(Restriction::sqe_flags_allowed(squeue::Flags::ASYNC.bits()));
    ring.submitter().register_restrictions(&mut restrictions)?;
    ring.submitter().register_enable_rings()?;
    Ok(ring)
}

/// A thread that executes one job after the other.
#[derive(Debug)]
struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    work: Mutex<Work>,
    changed: Condvar,
    finished_event: EventFd,
}

#[derive(Debug, Default)]
struct Work {
    waiting: VecDeque<(u32, Job, Arc<File>)>,
    finished: Vec<Completion>,
    /// Whether the thread is confined, once that is known.
    is_confined: Option<bool>,
    ends: bool,
}

impl Worker {
    /// Starts the thread, and waits until it is confined: a guest must not run beside a thread that is not.
    fn start(jail: Jail) -> io::Result<Self> {
        let finished_event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let shared = Arc::new(Shared { work: Mutex::default(), changed: Condvar::new(), finished_event });
        let worker = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("file".into()).spawn(move || {
            let is_confined = jail.confine_thread(Thread::Worker).is_ok();
            worker.lock().is_confined = Some(is_confined);
            worker.changed.notify_all();
            if is_confined {
                worker.run();
            }
        })?;
        let work = shared.changed.wait_while(shared.lock(), |work| work.is_confined.is_none());
        let is_confined = work.unwrap_or_else(PoisonError::into_inner).is_confined == Some(true);
        let this = Self { shared, thread: Some(thread) };
        if is_confined { Ok(this) } else { Err(io::ErrorKind::PermissionDenied.into()) }
    }

    fn submit(&self, number: u32, job: Job, file: &Arc<File>) {
        self.shared.lock().waiting.push_back((number, job, Arc::clone(file)));
        self.shared.changed.notify_all();
    }

    fn finished(&self, into: &mut Vec<Completion>) {
        let mut work = self.shared.lock();
        let _ = self.shared.finished_event.read();
        into.append(&mut work.finished);
    }

    fn wait(&self) {
        let work = self.shared.lock();
        let has_finished = self.shared.changed.wait_while(work, |work| work.finished.is_empty());
        drop(has_finished);
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        loop {
            let work = self.lock();
            let waits = |work: &mut Work| work.waiting.is_empty() && !work.ends;
            let mut work = self.changed.wait_while(work, waits).unwrap_or_else(PoisonError::into_inner);
            let Some((number, job, file)) = work.waiting.pop_front() else { return };
            drop(work);
            let result = job.execute(file.as_fd(), false);
            // The event and the completion are published together, so that taking the completion also clears the event.
            // A later event would be unknown to a device after a reset, and the event loop would report it forever.
            let mut work = self.lock();
            work.finished.push((number, result));
            let _ = self.finished_event.write(1);
            drop(work);
            self.changed.notify_all();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.lock().ends = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
