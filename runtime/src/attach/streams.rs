//! The standard streams of a process in a guest, and the threads that forward them.

use super::Notify;
use crate::log::{Log, Stream};
use kindling_vmm::agent::{AgentError, Control, ProcessAddress, Role};
use kindling_vmm::with_causes;
use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// Buffer size in bytes: the capacity of a pipe.
const CHUNK: usize = 64 << 10;

/// Source and destinations of a process's standard streams.
#[derive(Debug)]
pub struct Streams {
    /// Source of the standard input; `None` for an empty input.
    pub input: Option<File>,
    /// Destination of the standard output.
    pub output: OutputTarget,
    /// Destination of the standard error. A process on a terminal has none: all its output is standard output.
    pub error: OutputTarget,
}

/// Destination of an output stream.
#[derive(Debug)]
pub enum OutputTarget {
    /// A file, pipe, socket or terminal, which may be non-blocking.
    File(File),
    /// A guest's log, as this stream.
    Log(Arc<Log>, Stream),
}

impl Streams {
    /// The standard streams of the calling process. The null device is an empty input.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn inherited() -> io::Result<Self> {
        let input = File::from(rustix::stdio::stdin().try_clone_to_owned()?);
        Ok(Self {
            input: (!is_null_device(&input)).then_some(input),
            output: OutputTarget::copy_of(rustix::stdio::stdout())?,
            error: OutputTarget::copy_of(rustix::stdio::stderr())?,
        })
    }

    /// Empty input; all output goes to the standard error of the calling process.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn stderr_only() -> io::Result<Self> {
        let copy = || OutputTarget::copy_of(rustix::stdio::stderr());
        Ok(Self { input: None, output: copy()?, error: copy()? })
    }

    /// Empty input; output goes to a log.
    #[must_use]
    pub fn to_log(log: Log) -> Self {
        let log = Arc::new(log);
        Self {
            input: None,
            output: OutputTarget::Log(Arc::clone(&log), Stream::Output),
            error: OutputTarget::Log(log, Stream::Error),
        }
    }
}

impl OutputTarget {
    /// /dev/null.
    pub(crate) fn null() -> io::Result<Self> {
        File::options().write(true).open("/dev/null").map(Self::File)
    }

    /// A duplicate of a descriptor.
    pub(crate) fn copy_of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        fd.try_clone_to_owned().map(|copy| Self::File(copy.into()))
    }
}

/// Threads that forward output.
#[derive(Default)]
pub(super) struct Writers {
    threads: Vec<JoinHandle<()>>,
    running: u64,
    /// An eventfd that counts the threads that have ended.
    pub(super) done: Option<Arc<OwnedFd>>,
    /// The first error of a thread.
    failure: Arc<Mutex<Option<OutputError>>>,
}

impl Writers {
    /// Starts a thread.
    pub(super) fn start(
        &mut self,
        work: impl FnOnce() -> Result<(), OutputError> + Send + 'static,
    ) -> io::Result<()> {
        let done = match &self.done {
            Some(done) => Arc::clone(done),
            None => Arc::clone(self.done.insert(Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?))),
        };
        let failure = Arc::clone(&self.failure);
        spawn(move || {
            if let Err(error) = work() {
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
            let _ = rustix::io::write(&*done, &1_u64.to_ne_bytes());
        })
        .map(|thread| self.threads.push(thread))?;
        self.running += 1;
        Ok(())
    }

    /// Why output is incomplete, if it is.
    pub(super) fn failure(&self) -> Option<String> {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.as_ref().map(|error| with_causes(error))
    }

    pub(super) const fn is_any_running(&self) -> bool {
        self.running > 0
    }

    /// Waits until the threads, which have all ended their work, have exited.
    pub(super) fn join(self) {
        for thread in self.threads {
            // Threads do not panic: the profile aborts the process on a panic.
            let _ = thread.join();
        }
    }

    /// Subtracts the threads that have ended.
    pub(super) fn count_finished(&mut self) {
        let mut count = [0; 8];
        if let Some(done) = &self.done
            && rustix::io::read(&**done, &mut count).is_ok()
        {
            self.running = self.running.saturating_sub(u64::from_ne_bytes(count));
        }
    }
}

/// Starts a thread.
pub(super) fn spawn(work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().spawn(work)
}

/// Forwards input to a process. The connection is made when there is input.
pub(super) fn forward_input(from: File, address: &ProcessAddress, control: &Control, notify: &Notify) {
    let failed = |source| {
        notify(&with_causes(&AgentError::Host { what: "read the input of the command", source }));
    };
    let mut first = Vec::with_capacity(CHUNK);
    read(&from, &mut first).unwrap_or_else(failed);
    if first.is_empty() {
        return control.end_input();
    }
    match address.connect(Role::Input) {
        Ok(mut to) => {
            // A process that takes no more input is no error.
            if to.write_all(&first).is_ok() {
                copy_input(from, &to).unwrap_or_else(failed);
            }
            let _ = to.shutdown(Shutdown::Write);
        }
        Err(error) => {
            // A process that has ended takes no input, which is no error.
            if let AgentError::Connect { .. } = error {
                notify(&with_causes(&error));
            }
            control.end_input();
        }
    }
}

/// Copies input until its end, or until the process takes no more.
///
/// # Errors
/// When the input cannot be read.
pub(crate) fn copy_input(from: File, mut to: &UnixStream) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(CHUNK);
    loop {
        read(&from, &mut buffer)?;
        if buffer.is_empty() || to.write_all(&buffer).is_err() {
            return Ok(());
        }
    }
}

/// Why output is incomplete.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OutputError {
    #[error("cannot receive the output of the command")]
    Receive(#[source] io::Error),
    #[error("cannot receive the output of the command")]
    Connect(#[source] AgentError),
    #[error("cannot write the output of the command")]
    Write(#[source] io::Error),
}

/// Connects to an output stream, and forwards it.
pub(super) fn forward_output(
    address: &ProcessAddress,
    role: Role,
    to: &OutputTarget,
) -> Result<(), OutputError> {
    copy_output(address.connect(role).map_err(OutputError::Connect)?, to)
}

/// Copies output until EOF. If the target is closed, the process in the guest gets EPIPE, as with a pipe.
pub(crate) fn copy_output(from: UnixStream, to: &OutputTarget) -> Result<(), OutputError> {
    let mut buffer = Vec::with_capacity(CHUNK);
    loop {
        read(&from, &mut buffer).map_err(OutputError::Receive)?;
        if buffer.is_empty() {
            return Ok(());
        }
        let result = match to {
            OutputTarget::File(file) => write_all(file, &buffer),
            OutputTarget::Log(log, stream) => {
                log.add(*stream, &buffer);
                Ok(())
            }
        };
        if let Err(error) = result {
            let _ = from.shutdown(Shutdown::Both);
            return match error.kind() {
                io::ErrorKind::BrokenPipe => Ok(()),
                _ => Err(OutputError::Write(error)),
            };
        }
    }
}

/// Whether a file is /dev/null, which is always empty.
fn is_null_device(file: &File) -> bool {
    use rustix::fs::{FileType, fstat, makedev};
    let is_null = |stat: rustix::fs::Stat| {
        FileType::from_raw_mode(stat.st_mode).is_char_device() && stat.st_rdev == makedev(1, 3)
    };
    fstat(file).is_ok_and(is_null)
}

/// Replaces the content of a buffer by what one read returns, at most its capacity; at the end of the file it is empty.
/// Memory of the buffer that nothing is read into is not touched. Waits if the descriptor is non-blocking, which other
/// processes may have made it.
fn read(from: impl AsFd, buffer: &mut Vec<u8>) -> io::Result<()> {
    loop {
        buffer.clear();
        match rustix::io::read(&from, spare_capacity(buffer)) {
            Err(Errno::AGAIN) => wait(from.as_fd(), PollFlags::IN)?,
            Err(Errno::INTR) => {}
            result => return Ok(result.map(drop)?),
        }
    }
}

fn write_all(mut to: &File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(to.as_fd(), PollFlags::OUT)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn wait(fd: BorrowedFd<'_>, flags: PollFlags) -> io::Result<()> {
    poll(&mut [PollFd::from_borrowed_fd(fd, flags)], None)?;
    Ok(())
}
