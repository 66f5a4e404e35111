use super::*;

#[test]
fn a_block_device_is_not_memory_because_of_its_node_on_tmpfs() {
    // /dev is a tmpfs almost everywhere, and the data of its nodes is elsewhere.
    let device = File::open("/dev/null").unwrap();
    assert_eq!(FileIo::new(device, 1).speed, Speed::Cached);
}

#[test]
fn the_thread_signals_no_completion_that_was_taken_already() {
    // Waits for the job as a reset does, at any point of the thread's progress.
    for _ in 0..500 {
        let worker = Worker::start(Jail::OFF).unwrap();
        // SAFETY: there are no segments.
        let job = unsafe { Job::new(Operation::Flush, 0, &[]) };
        worker.submit(0, job, &Arc::new(File::open("/dev/null").unwrap()));
        let mut done = Vec::new();
        while done.is_empty() {
            worker.wait();
            worker.finished(&mut done);
        }
        let shared = Arc::clone(&worker.shared);
        drop(worker);
        assert!(shared.finished_event.read().is_err(), "a stale event");
    }
}

/// Calls a function on a thread on which one system call fails with `error` (seccomp).
pub(crate) fn refusing<T: Send>(
    call: libc::c_long,
    error: libc::c_int,
    what: impl FnOnce() -> T + Send,
) -> T {
    use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter};
    let instruction = |code: u32, jt, jf, k| sock_filter { code: code.try_into().unwrap(), jt, jf, k };
    let number = u32::try_from(call).unwrap();
    let error = libc::SECCOMP_RET_ERRNO | u32::try_from(error).unwrap();
    let mut filter = [
        instruction(BPF_LD | BPF_W | BPF_ABS, 0, 0, 0),
        instruction(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, number),
        instruction(BPF_RET | BPF_K, 0, 0, error),
        instruction(BPF_RET | BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let mut filter = move || {
        let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
        // SAFETY: the program outlives the call, which copies it, and it is this thread's alone.
        let result = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
                | libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
        };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            filter();
            what()
        });
        thread.join().unwrap()
    })
}

/// Calls a function on a thread on which io_uring_enter fails for lack of memory.
fn without_memory<T: Send>(what: impl FnOnce() -> T + Send) -> T {
    refusing(libc::SYS_io_uring_enter, libc::EAGAIN, what)
}

pub(crate) fn watcher() -> Watcher {
    use rustix::event::epoll;
    Watcher::new(Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).unwrap()), 1)
}

/// A guest that has taken over the monitor can write into its rings.
#[test]
fn a_ring_is_restricted_to_operations_of_disks() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(8).unwrap();
    // Hosts without io_uring have no ring to restrict.
    let Ok(mut ring) = restricted_ring(4) else { return };
    let mut bytes = [0; 8];
    let segment = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let file_number = types::Fd(file.as_raw_fd());
    let mut result = |entry: squeue::Entry| {
        // SAFETY: the buffer outlives the operation, whose completion is awaited.
        unsafe { ring.submission().push(&entry) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        ring.completion().next().unwrap().result()
    };
    assert_eq!(result(opcode::Readv::new(file_number, &raw const segment, 1).build()), 8);
    for entry in [
        opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/etc/passwd".as_ptr()).build(),
        opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build(),
        opcode::Read::new(file_number, bytes.as_mut_ptr(), 8).build(),
    ] {
        assert_eq!(result(entry), -libc::EACCES);
    }
    assert!(ring.submitter().register_files(&[file.as_raw_fd()]).is_err());
}

#[test]
fn no_more_than_depth_jobs_are_accepted() {
    let mut io = FileIo::new(tempfile::tempfile().unwrap(), 4);
    // SAFETY: there are no segments.
    let job = || unsafe { Job::new(Operation::Flush, 0, &[]) };
    let watcher = watcher();
    for number in 0..4 {
        io.submit(number, job(), 0, &watcher).unwrap();
    }
    assert_eq!(io.submit(4, job(), 0, &watcher).unwrap_err().kind(), io::ErrorKind::QuotaExceeded);
    io.drain();
    io.submit(5, job(), 0, &watcher).unwrap();
}

#[test]
fn jobs_that_overflow_the_completion_queue_complete() {
    // Hosts without io_uring have no such queue.
    let Ok(ring) = IoUring::new(4) else { return };
    let mut ring = Ring(ring);
    for number in 0..40 {
        // SAFETY: this operation names no memory.
        unsafe { ring.0.submission().push(&opcode::Nop::new().build().user_data(number)) }.unwrap();
        submit(&ring.0);
    }
    let mut done = Vec::new();
    ring.finished(&mut done);
    assert_eq!(done.iter().map(|(number, _)| *number).collect::<Vec<_>>(), Vec::from_iter(0..40));
}

#[test]
fn a_job_without_host_memory_is_submitted_later_and_once() {
    let watcher = watcher();
    let mut io = FileIo::new(tempfile::tempfile().unwrap(), 4);
    // SAFETY: there are no segments.
    let job = || unsafe { Job::new(Operation::Flush, 0, &[]) };
    without_memory(|| io.submit(0, job(), 0, &watcher)).unwrap();
    if matches!(io.engine, Some(Engine::Ring(_))) {
        assert!(without_memory(|| io.retry_submit()));
    }
    assert!(!io.retry_submit());
    io.submit(1, job(), 0, &watcher).unwrap();
    let mut done = Vec::new();
    while io.is_busy() {
        assert!(done.len() < 2);
        match &mut io.engine {
            Some(Engine::Ring(ring)) => drop(ring.0.submit_and_wait(1)),
            Some(Engine::Thread(worker)) => worker.wait(),
            None => panic!("the job does not complete"),
        }
        io.finished(&mut done);
    }
    let mut numbers: Vec<_> = done.into_iter().map(|(number, result)| (number, result.unwrap())).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, [(0, 0), (1, 0)]);
}

#[test]
fn a_large_job_is_not_performed_inline() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(8 << 20).unwrap();
    let io = FileIo::new(file, 4);
    let mut bytes = vec![0; usize::try_from(INLINE_MAX).unwrap() + 1];
    let all = Segment::host(&mut bytes);
    let job = |segment: Segment| {
        let segments = [segment];
        // SAFETY: the bytes outlive both; a ring never sees the entry.
        let job = unsafe { Job::new(Operation::Read, 0, &segments) };
        (io.try_inline(&job).is_some(), format!("{:?}", job.entry(types::Fd(0))))
    };
    let mut most = all;
    most.skip(1);
    let (is_inline, entry) = job(most);
    // A file that is not in memory is not read inline, regardless of the size.
    assert!(is_inline || io.speed == Speed::Cached);
    assert!(entry.contains("flags: 0,"), "{entry}");
    let (is_inline, entry) = job(all);
    // IOSQE_ASYNC (include/uapi/linux/io_uring.h).
    assert!(!is_inline && entry.contains("flags: 16,"), "{entry}");
}
