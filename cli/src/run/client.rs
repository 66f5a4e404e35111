//! The command's service for a process in a guest: forwards streams and signals, and enforces time limits.

use super::outcome::StopCause;
use super::signals::Signals;
use crate::STATUS_FAILURE;
use kindling::log::{Log, Stream};
use kindling::vmm::agent::{AgentError, Control, Process, ProcessAddress, ProcessEvent, Role};
use kindling::vmm::control::{self, ControlError, Monitor};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Buffer size in bytes: the capacity of a pipe.
const CHUNK: usize = 64 << 10;

/// Source and destinations of a process's standard streams.
#[derive(Debug)]
pub(crate) struct Streams {
    /// `None` for an empty input.
    pub(crate) input: Option<File>,
    pub(crate) output: OutputTarget,
    pub(crate) error: OutputTarget,
}

/// Destination of an output stream.
#[derive(Debug)]
pub(crate) enum OutputTarget {
    File(File),
    Log(Arc<Log>, Stream),
}

impl Streams {
    /// The standard streams of this command.
    pub(crate) fn inherited() -> io::Result<Self> {
        let copy = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from);
        let input = copy(rustix::stdio::stdin())?;
        Ok(Self {
            input: (!is_null_device(&input)).then_some(input),
            output: OutputTarget::File(copy(rustix::stdio::stdout())?),
            error: OutputTarget::File(copy(rustix::stdio::stderr())?),
        })
    }

    /// Empty input; all output goes to the standard error of this command.
    pub(crate) fn stderr_only() -> io::Result<Self> {
        let copy =
            || rustix::stdio::stderr().try_clone_to_owned().map(|copy| OutputTarget::File(copy.into()));
        Ok(Self { input: None, output: copy()?, error: copy()? })
    }

    /// Empty input; output goes to a log.
    pub(crate) fn to_log(log: Log) -> Self {
        let log = Arc::new(log);
        Self {
            input: None,
            output: OutputTarget::Log(Arc::clone(&log), Stream::Output),
            error: OutputTarget::Log(log, Stream::Error),
        }
    }
}

/// A service for processes in a guest.
pub(crate) struct Service<'a> {
    pub(crate) signals: &'a mut Signals,
    /// Ends the guest, or this command.
    pub(crate) stop: &'a mut dyn FnMut(StopCause),
    /// Time at which `stop` is called, and why: the time limit (`--timeout`), or a lost connection.
    pub(crate) deadline: Option<(Instant, StopCause)>,
    /// Time after which undelivered output is discarded, once `stop` was called.
    drain_deadline: Option<Instant>,
}

/// Time to deliver output after the guest was stopped, for readers that do not read.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Further time for a monitor to stop its machine.
const STOP_TIMEOUT: Duration = Duration::from_secs(9);

/// Time for a guest to end by itself after its agent has closed the connection: it syncs its filesystems.
const END_TIMEOUT: Duration = Duration::from_secs(10);

impl<'a> Service<'a> {
    pub(crate) const fn new(signals: &'a mut Signals, stop: &'a mut dyn FnMut(StopCause)) -> Self {
        Self { signals, stop, deadline: None, drain_deadline: None }
    }

    /// Serves a process until it has ended and all its output is delivered. Returns its exit status.
    ///
    /// A stream gets a connection and a thread only when it has data, because both take longer than a short command.
    pub(crate) fn serve(&mut self, mut process: Process, streams: Streams) -> Result<u8, AgentError> {
        let mut input = streams.input;
        if input.is_none() {
            process.end_input();
        }
        let (mut output, mut error) = (Some(streams.output), Some(streams.error));
        let (mut code, mut writers) = (None, Writers::default());
        loop {
            // Events are taken before the wait: requeued ones do not make the descriptor readable.
            while code.is_none() {
                match process.poll_event() {
                    Ok(None) => break,
                    Ok(Some(ProcessEvent::Exited { status, .. })) => code = Some(Ok(status)),
                    Ok(Some(ProcessEvent::HasOutput(role))) => {
                        let target = if role == Role::Error { error.take() } else { output.take() };
                        let address = process.address().clone();
                        if let Some(target) = target {
                            writers
                                .start(move || forward_output(&address, role, &target))
                                .map_err(failed("start a thread for the output of the command"))?;
                        }
                    }
                    // Handled by `wait_for_start`.
                    Ok(Some(ProcessEvent::Started)) => {}
                    Err(error) => code = Some(Err(error)),
                }
            }
            if code.is_some() && !writers.is_any_running() {
                break;
            }
            // After the end of the process, input stays unread, for the next command of a shell for instance.
            let pending_input = input.as_ref().filter(|_| code.is_none());
            match self.wait(&process, code.is_none(), pending_input, &writers)? {
                // The input thread is not joined: its read from a terminal may never return.
                Ready::Input => {
                    let (from, control) = (input.take(), process.control());
                    let address = process.address().clone();
                    let work =
                        move || from.into_iter().for_each(|from| forward_input(from, &address, &control));
                    spawn(work).map_err(failed("start a thread for the input of the command"))?;
                }
                Ready::Writer => writers.count_finished(),
                Ready::Process => {}
            }
        }
        let status = code.unwrap_or(Err(AgentError::Lost))?;
        let is_incomplete = writers.print_failure();
        // A command whose output is incomplete has not succeeded.
        Ok(if is_incomplete && status == 0 { STATUS_FAILURE } else { status })
    }

    /// Gives the guest a time to end by itself if its agent has closed the connection to the command; ends it at once if
    /// the host has failed.
    pub(crate) fn abandon(&mut self, error: &AgentError) {
        let limit = match error {
            AgentError::Lost | AgentError::Refused { .. } => END_TIMEOUT,
            _ => Duration::ZERO,
        };
        let until = Instant::now() + limit;
        let earlier = self.deadline.filter(|(deadline, _)| *deadline <= until);
        self.deadline = earlier.or(Some((until, StopCause::Lost)));
    }

    /// Waits until the program of a process was executed, or could not be. Returns whether it was executed.
    pub(crate) fn wait_for_start(&mut self, process: &mut Process) -> Result<bool, AgentError> {
        process.request_start_event();
        let mut earlier = Vec::new();
        let was_executed = loop {
            match process.poll_event()? {
                None => {
                    let _ = self.wait(process, true, None, &Writers::default())?;
                }
                Some(ProcessEvent::Started) => break true,
                Some(event) => {
                    earlier.push(event);
                    if let ProcessEvent::Exited { was_executed, .. } = event {
                        break was_executed;
                    }
                }
            }
        };
        process.requeue(earlier);
        Ok(was_executed)
    }

    /// Waits until a descriptor is ready. Signals are forwarded meanwhile.
    fn wait(
        &mut self,
        process: &Process,
        is_running: bool,
        input: Option<&File>,
        writers: &Writers,
    ) -> Result<Ready, AgentError> {
        let (flags, limit) = process.poll_interest();
        let watched = [
            is_running.then(|| (process.as_fd(), flags, Ready::Process)),
            input.map(|input| (input.as_fd(), PollFlags::IN, Ready::Input)),
            writers.done.as_ref().map(|done| (done.as_fd(), PollFlags::IN, Ready::Writer)),
        ];
        let until = limit.filter(|_| is_running).map(|limit| Instant::now() + limit);
        let ready = self
            .wait_for(&watched.into_iter().flatten().collect::<Vec<_>>(), until, Some(process))
            .map_err(failed("wait for the command"))?;
        // After the timeout, `Process::poll_event` returns the error.
        Ok(ready.unwrap_or(Ready::Process))
    }

    /// Waits until one of the descriptors is ready, or until a time. Signals are forwarded and the deadlines enforced
    /// meanwhile.
    fn wait_for<T: Copy>(
        &mut self,
        watched: &[(BorrowedFd<'_>, PollFlags, T)],
        until: Option<Instant>,
        process: Option<&Process>,
    ) -> io::Result<Option<T>> {
        loop {
            let deadline = self.deadline.map(|(deadline, _)| deadline);
            let limit = [until, deadline, self.drain_deadline].into_iter().flatten().min();
            let limit = limit.map(|limit| limit.saturating_duration_since(Instant::now()));
            let event = wait_for_any(watched.iter().copied(), limit, self.signals)?;
            // Checked before the event, so that a descriptor that is always ready cannot suspend the deadlines.
            let now = Instant::now();
            let is_over = |time: Option<Instant>| time.is_some_and(|time| time <= now);
            if is_over(self.drain_deadline) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            if let Some((_, cause)) = self.deadline.take_if(|(deadline, _)| *deadline <= now) {
                self.end(cause);
            }
            match event {
                Event::Ready(ready) => return Ok(Some(ready)),
                Event::Signal => {
                    if let Some(signal) = self.signals.forward(process) {
                        self.end(StopCause::Signal(signal));
                    }
                }
                Event::TimedOut if is_over(until) => return Ok(None),
                Event::TimedOut => {}
            }
        }
    }

    fn end(&mut self, cause: StopCause) {
        self.drain_deadline.get_or_insert_with(|| Instant::now() + DRAIN_TIMEOUT);
        (self.stop)(cause);
    }

    /// Waits for the next event of a monitor, for which the time after `stop` is longer than for output.
    pub(crate) fn event(&mut self, monitor: &Monitor) -> Result<control::Event, ControlError> {
        let watched = [(monitor.as_fd(), PollFlags::IN, ())];
        let earlier = self.drain_deadline.take();
        self.drain_deadline = earlier.map(|deadline| deadline + STOP_TIMEOUT);
        let result = self.wait_for(&watched, None, None);
        self.drain_deadline = self.drain_deadline.map(|deadline| earlier.unwrap_or(deadline));
        result.map_err(|_| ControlError::StopTimeout)?;
        monitor.next_event()
    }
}

/// What is ready.
#[derive(Clone, Copy)]
enum Ready {
    Process,
    Input,
    Writer,
}

/// The result of a wait.
enum Event<T> {
    Ready(T),
    Signal,
    TimedOut,
}

/// Waits until one of the descriptors is ready for its events, or a signal has arrived.
fn wait_for_any<'a, T: Copy>(
    watched: impl Iterator<Item = (BorrowedFd<'a>, PollFlags, T)>,
    limit: Option<Duration>,
    signals: &'a Signals,
) -> io::Result<Event<T>> {
    let (mut fds, names): (Vec<_>, Vec<_>) = watched
        .map(|(fd, flags, name)| (PollFd::from_borrowed_fd(fd, flags), Some(name)))
        .chain([(PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN), None)])
        .unzip();
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    rustix::io::retry_on_intr(|| poll(&mut fds, limit.as_ref()))?;
    // Signals have priority, so that an interrupt is not delayed by streams that are always ready.
    if fds.last().is_some_and(|fd| !fd.revents().is_empty()) {
        return Ok(Event::Signal);
    }
    let first = fds.iter().position(|fd| !fd.revents().is_empty());
    Ok(first.and_then(|at| names[at]).map_or(Event::TimedOut, Event::Ready))
}

/// Threads that forward output.
#[derive(Default)]
struct Writers {
    running: u64,
    /// An eventfd that counts the threads that have ended.
    done: Option<Arc<OwnedFd>>,
    /// What they could not receive or write.
    failure: Arc<Mutex<Option<OutputError>>>,
}

impl Writers {
    /// Starts a thread.
    fn start(&mut self, work: impl FnOnce() -> Result<(), OutputError> + Send + 'static) -> io::Result<()> {
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
        })?;
        self.running += 1;
        Ok(())
    }

    /// Prints why output is incomplete; returns whether it is.
    fn print_failure(&self) -> bool {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.iter().for_each(|error| crate::print_error(error));
        failure.is_some()
    }

    const fn is_any_running(&self) -> bool {
        self.running > 0
    }

    /// Subtracts the threads that have ended.
    fn count_finished(&mut self) {
        let mut count = [0; 8];
        if let Some(done) = &self.done
            && rustix::io::read(&**done, &mut count).is_ok()
        {
            self.running = self.running.saturating_sub(u64::from_ne_bytes(count));
        }
    }
}

/// Starts a thread that is not joined.
fn spawn(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().spawn(work).map(drop)
}

/// The error of a host that could not do something for a process. The end of the time for its output is no error of it.
fn failed(what: &'static str) -> impl FnOnce(io::Error) -> AgentError {
    move |source| match source.kind() {
        io::ErrorKind::TimedOut => AgentError::Lost,
        _ => AgentError::Host { what, source },
    }
}

/// Forwards input to a process. The connection is made when there is input.
fn forward_input(mut from: File, address: &ProcessAddress, control: &Control) {
    let mut buffer = vec![0; CHUNK];
    let mut read = |buffer: &mut [u8]| {
        read(&mut from, buffer).unwrap_or_else(|source| {
            crate::print_error(&AgentError::Host { what: "read the input of the command", source });
            0
        })
    };
    let mut count = read(&mut buffer);
    if count == 0 {
        return control.end_input();
    }
    let mut to = match address.connect(Role::Input) {
        Ok(to) => to,
        Err(error) => {
            // A process that has ended takes no input, which is no error.
            if let AgentError::Connect { .. } = error {
                crate::print_error(&error);
            }
            return control.end_input();
        }
    };
    while count > 0 && to.write_all(&buffer[..count]).is_ok() {
        count = read(&mut buffer);
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// Why output is incomplete.
#[derive(Debug, thiserror::Error)]
enum OutputError {
    #[error("cannot receive the output of the command")]
    Receive(#[source] io::Error),
    #[error("cannot receive the output of the command")]
    Connect(#[source] AgentError),
    #[error("cannot write the output of the command")]
    Write(#[source] io::Error),
}

/// Forwards output until EOF. If the target is closed, the process in the guest gets EPIPE, as with a pipe.
fn forward_output(address: &ProcessAddress, role: Role, to: &OutputTarget) -> Result<(), OutputError> {
    let mut from = address.connect(role).map_err(OutputError::Connect)?;
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(OutputError::Receive(error)),
        };
        let result = match to {
            OutputTarget::File(file) => write_all(file, &buffer[..count]),
            OutputTarget::Log(log, stream) => {
                log.add(*stream, &buffer[..count]);
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

/// Reads once. Waits if the descriptor is non-blocking, which other processes may have made it.
fn read(from: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match from.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait(from.as_fd(), PollFlags::IN)?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
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
