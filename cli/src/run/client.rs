//! The streams of a process in a guest, connected to those of this process.

use super::outcome::StopCause;
use super::signals::Signals;
use kindling::log::{Log, Stream};
use kindling::vmm::agent::{AgentError, Control, Process, ProcessAddress, ProcessEvent, Role};
use kindling::vmm::control::{self, ControlError, Monitor};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Bytes that are read at once: what a pipe holds.
const CHUNK: usize = 64 << 10;

/// Where a process's streams lead.
#[derive(Debug)]
pub(crate) struct Streams {
    /// None for an input that has ended.
    pub(crate) input: Option<File>,
    pub(crate) output: Sink,
    pub(crate) error: Sink,
}

/// Where one stream of output leads.
#[derive(Debug)]
pub(crate) enum Sink {
    File(File),
    Log(Arc<Log>, Stream),
}

impl Streams {
    /// This process's own.
    pub(crate) fn own() -> io::Result<Self> {
        let copy = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from);
        let input = copy(rustix::stdio::stdin())?;
        Ok(Self {
            input: (!is_null_device(&input)).then_some(input),
            output: Sink::File(copy(rustix::stdio::stdout())?),
            error: Sink::File(copy(rustix::stdio::stderr())?),
        })
    }

    /// This process's standard error, and nothing to read.
    pub(crate) fn complaints() -> io::Result<Self> {
        let copy = || rustix::stdio::stderr().try_clone_to_owned().map(|copy| Sink::File(copy.into()));
        Ok(Self { input: None, output: copy()?, error: copy()? })
    }

    /// A log's, and nothing to read.
    pub(crate) fn of_log(log: Log) -> Self {
        let log = Arc::new(log);
        Self {
            input: None,
            output: Sink::Log(Arc::clone(&log), Stream::Output),
            error: Sink::Log(log, Stream::Error),
        }
    }
}

/// What a process in a guest is served with.
pub(crate) struct Service<'a> {
    pub(crate) signals: &'a mut Signals,
    /// Ends the guest, or this command.
    pub(crate) give_up: &'a mut dyn FnMut(StopCause),
    /// When the time is over.
    pub(crate) until: Option<Instant>,
    /// Until when output is delivered to those who do not read, after the guest was ended.
    grace: Option<Instant>,
}

/// How long that is.
const GRACE: Duration = Duration::from_secs(1);

/// How much longer a monitor may take to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(9);

impl<'a> Service<'a> {
    pub(crate) const fn new(signals: &'a mut Signals, give_up: &'a mut dyn FnMut(StopCause)) -> Self {
        Self { signals, give_up, until: None, grace: None }
    }

    /// Carries everything to and fro until the process has ended and all that it wrote is delivered; its exit status.
    ///
    /// A stream gets a connection and a thread when it has something to carry: both take longer than a short command.
    pub(crate) fn serve(&mut self, mut process: Process, streams: Streams) -> Result<u8, AgentError> {
        let lost = |_| AgentError::Lost;
        let mut input = streams.input;
        if input.is_none() {
            process.end_input();
        }
        let (mut output, mut error) = (Some(streams.output), Some(streams.error));
        let (mut code, mut writers) = (None, Writers::default());
        loop {
            // Before anything is waited for: some of it may have been put back, and nothing follows it.
            while code.is_none() {
                match process.poll_event() {
                    Ok(None) => break,
                    Ok(Some(ProcessEvent::Exited { status, .. })) => code = Some(Ok(status)),
                    Ok(Some(ProcessEvent::HasOutput(role))) => {
                        let sink = if role == Role::Error { error.take() } else { output.take() };
                        let address = process.address().clone();
                        if let Some(sink) = sink {
                            writers.start(move || carry_output(&address, role, &sink)).map_err(lost)?;
                        }
                    }
                    // Nobody asked, or has been told.
                    Ok(Some(ProcessEvent::Started)) => {}
                    Err(error) => code = Some(Err(error)),
                }
            }
            if code.is_some() && !writers.is_any_left() {
                break;
            }
            // What is not read yet is for whoever reads after this command.
            let wanted = input.as_ref().filter(|_| code.is_none());
            match self.wait(&process, code.is_none(), wanted, &writers).map_err(lost)? {
                // Nobody waits for input: it may come from a terminal at which nobody types any more.
                Ready::Input => {
                    let (from, control) = (input.take(), process.control());
                    let address = process.address().clone();
                    drop(thread::spawn(move || from.map(|from| carry_input(from, &address, &control))));
                }
                Ready::Writer => writers.take_note(),
                Ready::Process => {}
            }
        }
        code.unwrap_or(Err(AgentError::Lost))
    }

    /// Waits until a process's program is executed, or cannot be: whether it was.
    pub(crate) fn wait_for_start(&mut self, process: &mut Process) -> Result<bool, AgentError> {
        process.request_start_event();
        let mut earlier = Vec::new();
        let was_executed = loop {
            match process.poll_event()? {
                None => {
                    let _ =
                        self.wait(process, true, None, &Writers::default()).map_err(|_| AgentError::Lost)?;
                }
                Some(ProcessEvent::Started) => break true,
                Some(news) => {
                    earlier.push(news);
                    if let ProcessEvent::Exited { was_executed, .. } = news {
                        break was_executed;
                    }
                }
            }
        };
        process.requeue(earlier);
        Ok(was_executed)
    }

    /// Waits for something to do, and passes on signals meanwhile.
    fn wait(
        &mut self,
        process: &Process,
        has_news: bool,
        input: Option<&File>,
        writers: &Writers,
    ) -> io::Result<Ready> {
        let (flags, limit) = process.poll_interest();
        let watched = [
            has_news.then(|| (process.as_fd(), flags, Ready::Process)),
            input.map(|input| (input.as_fd(), PollFlags::IN, Ready::Input)),
            writers.done.as_ref().map(|done| (done.as_fd(), PollFlags::IN, Ready::Writer)),
        ];
        let late = limit.filter(|_| has_news).map(|limit| Instant::now() + limit);
        let ready = self.wait_for(&watched.into_iter().flatten().collect::<Vec<_>>(), late, Some(process))?;
        // The process knows what it was too late for.
        Ok(ready.unwrap_or(Ready::Process))
    }

    /// Waits until one of these is ready, or for a time; signals and the time limit are heeded meanwhile.
    fn wait_for<T: Copy>(
        &mut self,
        watched: &[(BorrowedFd<'_>, PollFlags, T)],
        late: Option<Instant>,
        process: Option<&Process>,
    ) -> io::Result<Option<T>> {
        loop {
            let limit = [late, self.until, self.grace].into_iter().flatten().min();
            let limit = limit.map(|limit| limit.saturating_duration_since(Instant::now()));
            let event = wait_for_any(watched.iter().copied(), limit, self.signals)?;
            // Before the event itself: a descriptor that is always ready must not keep the limits from expiring.
            let now = Instant::now();
            let is_over = |time: Option<Instant>| time.is_some_and(|time| time <= now);
            if is_over(self.grace) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            if is_over(self.until) {
                self.until = None;
                self.end(StopCause::Timeout);
            }
            match event {
                Event::Ready(ready) => return Ok(Some(ready)),
                Event::Signal => {
                    if let Some(signal) = self.signals.pass_on(process) {
                        self.end(StopCause::Signal(signal));
                    }
                }
                Event::Late if is_over(late) => return Ok(None),
                Event::Late => {}
            }
        }
    }

    fn end(&mut self, cause: StopCause) {
        self.grace.get_or_insert_with(|| Instant::now() + GRACE);
        (self.give_up)(cause);
    }

    /// Waits for the next event of a monitor, for which there is more time than for output.
    pub(crate) fn event(&mut self, monitor: &Monitor) -> Result<control::Event, ControlError> {
        let watched = [(monitor.as_fd(), PollFlags::IN, ())];
        let given_up = self.grace.take();
        self.grace = given_up.map(|grace| grace + STOP_TIMEOUT);
        let result = self.wait_for(&watched, None, None);
        self.grace = self.grace.map(|grace| given_up.unwrap_or(grace));
        result.map_err(|_| ControlError::Stuck)?;
        monitor.next_event()
    }
}

/// What there is to do.
#[derive(Clone, Copy)]
enum Ready {
    Process,
    Input,
    Writer,
}

/// What ended a wait.
enum Event<T> {
    Ready(T),
    Signal,
    /// Nothing came in time.
    Late,
}

/// Waits until one of these is ready for what it is watched for, or a signal has come.
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
    // Signals first: who asks for the end does not want to wait for all the rest.
    if fds.last().is_some_and(|fd| !fd.revents().is_empty()) {
        return Ok(Event::Signal);
    }
    let first = fds.iter().position(|fd| !fd.revents().is_empty());
    Ok(first.and_then(|at| names[at]).map_or(Event::Late, Event::Ready))
}

/// Threads that deliver output.
#[derive(Default)]
struct Writers {
    running: u64,
    /// Counts those that have ended.
    done: Option<Arc<OwnedFd>>,
}

impl Writers {
    fn start(&mut self, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let done = match &self.done {
            Some(done) => Arc::clone(done),
            None => Arc::clone(self.done.insert(Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?))),
        };
        self.running += 1;
        thread::spawn(move || {
            work();
            let _ = rustix::io::write(&*done, &1_u64.to_ne_bytes());
        });
        Ok(())
    }

    const fn is_any_left(&self) -> bool {
        self.running > 0
    }

    /// Some have ended.
    fn take_note(&mut self) {
        let mut count = [0; 8];
        if let Some(done) = &self.done
            && rustix::io::read(&**done, &mut count).is_ok()
        {
            self.running = self.running.saturating_sub(u64::from_ne_bytes(count));
        }
    }
}

/// Carries input to a process, which is connected to when there is some.
fn carry_input(mut from: File, address: &ProcessAddress, control: &Control) {
    let mut buffer = vec![0; CHUNK];
    let Ok(mut count @ 1..) = read(&mut from, &mut buffer) else { return control.end_input() };
    let Ok(mut to) = address.connect(Role::Input) else { return };
    while to.write_all(&buffer[..count]).is_ok() {
        match read(&mut from, &mut buffer) {
            Ok(next @ 1..) => count = next,
            _ => break,
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// What is lost for another reason than that nobody wants it.
#[derive(Debug, thiserror::Error)]
#[error("cannot write what the program says")]
struct Undelivered(#[source] io::Error);

/// Carries output until it ends. Where nobody takes it, whoever writes it learns so, as at a pipe.
fn carry_output(address: &ProcessAddress, role: Role, to: &Sink) {
    let mut from = match address.connect(role) {
        Ok(from) => from,
        Err(error) => {
            // A guest that has ended says so elsewhere.
            if let AgentError::Silent { .. } = error {
                crate::complain(&error);
            }
            return;
        }
    };
    let mut buffer = vec![0; CHUNK];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let result = match to {
            Sink::File(file) => write_all(file, &buffer[..count]),
            Sink::Log(log, stream) => {
                log.add(*stream, &buffer[..count]);
                Ok(())
            }
        };
        if let Err(error) = result {
            if error.kind() != io::ErrorKind::BrokenPipe {
                crate::complain(&Undelivered(error));
            }
            let _ = from.shutdown(Shutdown::Both);
            return;
        }
    }
}

/// Whether it is /dev/null, which has ended before somebody reads it.
fn is_null_device(file: &File) -> bool {
    use rustix::fs::{FileType, fstat, makedev};
    let is_null = |stat: rustix::fs::Stat| {
        FileType::from_raw_mode(stat.st_mode).is_char_device() && stat.st_rdev == makedev(1, 3)
    };
    fstat(file).is_ok_and(is_null)
}

/// Reads once. A descriptor that others made non-blocking is waited for.
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
