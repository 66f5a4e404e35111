//! Reading and writing a file on behalf of a guest, without ever waiting for it.
//!
//! What the host can do at once, because the file's pages are in memory and not many, is done at once: that costs one
//! system call and no change of threads. Everything else goes to an io_uring, or where the host has none to a
//! thread, and comes back as an event. Either is made when it is first needed.
#![expect(unsafe_code, reason = "reads and writes with addresses of guest memory")]

use super::{Segment, Watcher};
use io_uring::{IoUring, opcode, squeue, types};
use rustix::event::epoll::EventFlags;
use rustix::fs::OFlags;
use std::collections::VecDeque;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::EventFd;

/// Bytes of the largest job that is done inline: copying these takes two tenths of a millisecond, in which the device is
/// locked. Linux makes no larger requests than 1280 KiB unless it is told to (`BLK_DEF_MAX_SECTORS_CAP` in block/blk.h).
const INLINE_MAX: u64 = 2 << 20;

/// What is to be done with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Into guest memory.
    Read,
    /// From guest memory.
    Write,
    /// What was written is to be on the disk.
    Flush,
    /// A range reads as zeroes; it may lose its place on the disk.
    PunchHole(u64),
    /// A range reads as zeroes and keeps its place, which it has to have ([`FileIo::zero`]).
    Zero(u64),
}

/// An operation with its place in the file and in guest memory.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) operation: Operation,
    pub(super) offset: u64,
    /// Guest memory, which whoever asks keeps until the operation is done.
    segments: *const Segment,
    count: usize,
    /// Whether moving its bytes takes so long that the device's thread has no time for it.
    is_large: bool,
}

// SAFETY: the pointer is to segments that stay where they are until the job is done, see `Job::new`.
unsafe impl Send for Job {}

impl Job {
    /// An operation on these segments.
    ///
    /// # Safety
    /// The segments and the guest memory that they name stay until the job has been done or, having been
    /// submitted, has come back.
    pub(super) unsafe fn new(operation: Operation, offset: u64, segments: &[Segment]) -> Self {
        let bytes: u64 = segments.iter().map(|segment| segment.len() as u64).sum();
        let is_large = bytes > INLINE_MAX;
        Self { operation, offset, segments: segments.as_ptr(), count: segments.len(), is_large }
    }

    /// Does it now. With `must_not_wait` it fails with EAGAIN where that would take time, or where the
    /// file's filesystem cannot tell.
    fn execute(&self, file: BorrowedFd<'_>, must_not_wait: bool) -> io::Result<u64> {
        let fd = file.as_raw_fd();
        let again = || Err(io::Error::from_raw_os_error(libc::EAGAIN));
        let Ok(offset) = i64::try_from(self.offset) else { return Err(io::ErrorKind::InvalidInput.into()) };
        let Ok(count) = i32::try_from(self.count) else { return Err(io::ErrorKind::InvalidInput.into()) };
        let flags = if must_not_wait { libc::RWF_NOWAIT } else { 0 };
        let segments: *const libc::iovec = self.segments.cast();
        // SAFETY: whoever made the job keeps its segments and their memory; a segment is an iovec. The
        // guest's memory is shared with the guest, and the kernel copes with that.
        let result = unsafe {
            match self.operation {
                // Without flags the older call, which every filesystem has.
                Operation::Read if flags == 0 => libc::preadv(fd, segments, count, offset),
                Operation::Read => libc::preadv2(fd, segments, count, offset, flags),
                Operation::Write if flags == 0 => libc::pwritev(fd, segments, count, offset),
                Operation::Write => libc::pwritev2(fd, segments, count, offset, flags),
                _ if must_not_wait => return again(),
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

    /// What fallocate(2) is to do.
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
        // Without the flag io_uring tries first whether a job can be done in the call that submits it, which for
        // pages in memory means copying all of them.
        if self.is_large { entry.flags(squeue::Flags::ASYNC) } else { entry }
    }
}

/// A job that has come back, by the number that it was given, with the bytes that it moved.
pub(super) type Done = (u32, io::Result<u64>);

/// The file behind a device.
#[derive(Debug)]
pub(super) struct FileIo {
    file: Arc<File>,
    speed: Speed,
    /// Jobs that were submitted and have not come back.
    pending: u32,
    engine: Option<Engine>,
    /// Entries that the engine has to have room for.
    depth: u32,
}

/// What is known of how long a file takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Speed {
    /// It is memory: nothing takes time.
    Memory,
    /// What is in the page cache takes none, and the host says what is not.
    Cached,
    /// It is opened for direct I/O, with which the host waits for the disk whatever it is asked.
    Direct,
}

#[derive(Debug)]
enum Engine {
    Ring(Box<Ring>),
    Thread(Worker),
}

struct Ring(IoUring);

impl Ring {
    /// Takes the jobs that have come back. Those for which the completion queue has no room stay with the kernel,
    /// which keeps the ring readable and puts them there when it is entered.
    fn finished(&mut self, into: &mut Vec<Done>) {
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
    /// For at most `depth` jobs at a time.
    pub(super) fn new(file: File, depth: u16) -> Self {
        // The filesystem of a block device is the one that has its name.
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

    /// For a file that stands for a disk of which everything takes time.
    #[cfg(test)]
    pub(super) fn slow(file: File) -> Self {
        let mut this = Self::new(file, 4);
        this.speed = Speed::Direct;
        this
    }

    /// Whether there are jobs that it can do at once.
    pub(super) const fn can_be_quick(&self) -> bool {
        !matches!(self.speed, Speed::Direct)
    }

    /// Whether jobs are on their way.
    pub(super) const fn is_busy(&self) -> bool {
        self.pending > 0
    }

    /// What makes a range read as zeroes that is to keep its place on the disk. In a file that has no place for all of
    /// it, a sparse one, that is a hole: the range would otherwise get a place that it did not have, of any size and for
    /// nothing.
    pub(super) fn zero(&self, length: u64) -> Operation {
        /// Bytes in which `st_blocks` counts, whatever the filesystem's blocks are.
        const BLOCK: u64 = 512;
        let is_sparse = |file: &Metadata| file.is_file() && file.blocks().saturating_mul(BLOCK) < file.len();
        match self.file.metadata() {
            Ok(metadata) if is_sparse(&metadata) => Operation::PunchHole(length),
            _ => Operation::Zero(length),
        }
    }

    /// Does a job if the host can do it at once; otherwise `None`, or what is wrong with it.
    pub(super) fn attempt(&self, job: &Job) -> Option<io::Result<u64>> {
        match self.speed {
            // Many bytes, or giving back a large range, take time all the same.
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

    /// Lets a job be done elsewhere. It comes back from [`Self::finished`], after an event with this token.
    ///
    /// # Errors
    /// When as many jobs are on their way as the engine has room for, or the host has no engine.
    pub(super) fn submit(&mut self, number: u32, job: Job, token: u32, watcher: &Watcher) -> io::Result<()> {
        if self.pending >= self.depth {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        if self.engine.is_none() {
            self.engine = Some(Engine::new(self.depth, token, watcher)?);
        }
        match &mut self.engine {
            Some(Engine::Ring(ring)) => {
                let entry = job.entry(types::Fd(self.file.as_raw_fd())).user_data(number.into());
                // SAFETY: whoever made the job keeps its memory until it comes back, and the file is open as
                // long as `self`, which waits for its jobs.
                unsafe { ring.0.submission().push(&entry) }.map_err(|_| io::ErrorKind::WouldBlock)?;
                // Where the host has no memory for it, the job stays in the ring, see `is_held_up`.
                submit(&ring.0);
            }
            Some(Engine::Thread(worker)) => worker.submit(number, job, &self.file),
            None => {}
        }
        self.pending += 1;
        Ok(())
    }

    /// Whether the host had no memory for a job yet. It is asked again with each call.
    pub(super) fn is_held_up(&mut self) -> bool {
        let Some(Engine::Ring(ring)) = &mut self.engine else { return false };
        if !ring.0.submission().is_empty() {
            submit(&ring.0);
        }
        !ring.0.submission().is_empty()
    }

    /// Jobs that have come back.
    pub(super) fn finished(&mut self, into: &mut Vec<Done>) {
        let before = into.len();
        match &mut self.engine {
            Some(Engine::Ring(ring)) => ring.finished(into),
            Some(Engine::Thread(worker)) => worker.finished(into),
            None => {}
        }
        self.pending -= u32::try_from(into.len() - before).unwrap_or(0);
    }

    /// Waits until no job is on its way: guest memory is the guest's alone again.
    pub(super) fn drain(&mut self) {
        let mut done = Vec::new();
        while self.pending > 0 {
            match &mut self.engine {
                // A signal may interrupt the wait, and nothing else can be wrong with it.
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

/// Submits what is in the ring. What the host does not take now is still there afterwards.
fn submit(ring: &IoUring) {
    while ring.submit().is_err_and(|error| error.kind() == io::ErrorKind::Interrupted) {}
}

impl Engine {
    fn new(depth: u32, token: u32, watcher: &Watcher) -> io::Result<Self> {
        // Containers and cautious hosts allow no io_uring.
        if let Ok(ring) = IoUring::new(depth) {
            // SAFETY: the ring is open as long as the engine.
            let fd = unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) };
            watcher.add(fd, token, EventFlags::IN)?;
            return Ok(Self::Ring(Box::new(Ring(ring))));
        }
        let worker = Worker::start()?;
        watcher.add(crate::poll::borrow(&worker.shared.finished_event), token, EventFlags::IN)?;
        Ok(Self::Thread(worker))
    }
}

/// A thread that does one job after the other.
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
    finished: Vec<Done>,
    ends: bool,
}

impl Worker {
    fn start() -> io::Result<Self> {
        let finished_event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let shared = Arc::new(Shared { work: Mutex::default(), changed: Condvar::new(), finished_event });
        let worker = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("file".into()).spawn(move || worker.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    fn submit(&self, number: u32, job: Job, file: &Arc<File>) {
        self.shared.lock().waiting.push_back((number, job, Arc::clone(file)));
        self.shared.changed.notify_all();
    }

    fn finished(&self, into: &mut Vec<Done>) {
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
            // The event belongs to the entry: whoever takes one has taken both. Of one that came later a device
            // after a reset would know nothing, and the event loop would see it for ever.
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
