//! Attaching to a process in a guest, as `docker attach` does: an [`Attachment`] forwards the streams and signals of the
//! calling process, and enforces time limits.

pub(crate) mod streams;
#[cfg(test)]
mod tests;

pub use streams::{OutputTarget, Streams};

use kindling_vmm::agent::{AgentError, Process, ProcessEvent, Role};
use kindling_vmm::control::{self, ControlError, Monitor};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use streams::{Writers, forward_input, forward_output, spawn};

/// Exit status of a command that the host failed, or whose output is incomplete.
pub(crate) const STATUS_FAILURE: u8 = 125;
/// Exit status of a guest that reached its time limit.
const STATUS_TIMEOUT: u8 = 124;

/// The signals that the calling process receives for a process in a guest. The descriptor is readable when a signal is
/// pending, a signalfd for instance.
pub trait SignalSource: AsFd {
    /// Forwards the pending signals to the process, with [`Process::signal`] and [`Process::resize`]. `None` while the guest
    /// starts and ends. Returns a signal that ends the guest instead.
    fn forward(&mut self, process: Option<&Process>) -> Option<u8>;
}

/// A function that receives messages for the user, each on one line: why a guest boots its kernel instead of continuing
/// from a pre-booted one, which of its devices failed, why a stream is incomplete. Guests may have chosen parts of the text,
/// control characters among them. Threads that forward streams call it too.
pub type Notify = Arc<dyn Fn(&str) + Send + Sync>;

/// Why the calling process stopped its guest, or itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// This signal was received.
    Signal(u8),
    /// The time limit was reached.
    Timeout,
    /// The connection to the command in the guest failed, and the guest did not end by itself.
    Lost,
}

impl StopCause {
    /// Returns the exit status of a command that ends for this reason: 128 + signal, 124 for the time limit, 125 for a lost
    /// connection.
    #[must_use]
    pub const fn status(self) -> u8 {
        match self {
            Self::Signal(signal) => 128_u8.saturating_add(signal),
            Self::Timeout => STATUS_TIMEOUT,
            Self::Lost => STATUS_FAILURE,
        }
    }
}

/// The connection of the calling process's streams and signals to a process in a guest.
pub struct Attachment<'a> {
    signals: &'a mut dyn SignalSource,
    stop: &'a mut dyn FnMut(StopCause),
    notify: Notify,
    /// Time at which `stop` is called, and why: the time limit (`--timeout`), or a lost connection.
    deadline: Option<(Instant, StopCause)>,
    /// Time after which undelivered output is discarded, once `stop` was called.
    drain_deadline: Option<Instant>,
}

impl fmt::Debug for Attachment<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

/// Time to deliver output after the guest was stopped, to readers that have stopped reading.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Further time for a monitor to stop its machine.
const STOP_TIMEOUT: Duration = Duration::from_secs(9);

/// Time for a guest to end by itself after its agent has closed the connection: it syncs its filesystems.
const END_TIMEOUT: Duration = Duration::from_secs(10);

impl<'a> Attachment<'a> {
    /// Constructs an attachment. `stop` is called when a signal ends the guest, or the time limit is reached: it stops the
    /// guest, or does not return.
    pub fn new(
        signals: &'a mut dyn SignalSource,
        stop: &'a mut dyn FnMut(StopCause),
        notify: Notify,
    ) -> Self {
        Self { signals, stop, notify, deadline: None, drain_deadline: None }
    }

    /// Sets the time at which `stop` is called.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline.map(|deadline| (deadline, StopCause::Timeout));
    }

    /// Serves a process until it has ended and all its output is delivered. Returns its exit status; 125 instead of 0 if
    /// output could not be received or written. Once the guest was stopped, output is delivered for one more second.
    ///
    /// A stream gets a connection and a thread only when it has data, because both take longer than a short command. The
    /// thread of the input may stay blocked in a read after the end.
    ///
    /// # Errors
    /// When the guest ends before the process, its agent does not respond, or the host cannot start a thread.
    pub fn serve(&mut self, mut process: Process, streams: Streams) -> Result<u8, AgentError> {
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
                    let notify = Arc::clone(&self.notify);
                    let work = move || {
                        from.into_iter().for_each(|from| forward_input(from, &address, &control, &notify));
                    };
                    let _input =
                        spawn(work).map_err(failed("start a thread for the input of the command"))?;
                }
                Ready::Writer => writers.count_finished(),
                Ready::Process => {}
            }
        }
        let status = code.unwrap_or(Err(AgentError::Lost))?;
        let failure = writers.failure();
        writers.join();
        failure.iter().for_each(|message| (self.notify)(message));
        // A command whose output is incomplete has not succeeded.
        Ok(if failure.is_some() && status == 0 { STATUS_FAILURE } else { status })
    }

    /// Sets a deadline for the guest to shut down if its agent has closed the connection to the command. After a failure of
    /// the host, the guest is stopped immediately.
    pub(crate) fn abandon(&mut self, error: &AgentError) {
        let limit = match error {
            AgentError::Lost | AgentError::Refused { .. } => END_TIMEOUT,
            _ => Duration::ZERO,
        };
        let until = Instant::now() + limit;
        let earlier = self.deadline.filter(|(deadline, _)| *deadline <= until);
        self.deadline = earlier.or(Some((until, StopCause::Lost)));
    }

    /// Waits until the program of a process was executed, or could not be. Returns whether it was executed. Serve the process
    /// afterwards in either case.
    ///
    /// # Errors
    /// When the guest ends before, or its agent does not respond.
    pub fn wait_for_start(&mut self, process: &mut Process) -> Result<bool, AgentError> {
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

    /// Waits until a descriptor is ready. Signals are forwarded during the wait.
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
    /// during the wait.
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
            let event = wait_for_any(watched.iter().copied(), limit, &*self.signals)?;
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
    signals: &'a dyn SignalSource,
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

/// Converts an error of the host. An expired drain deadline is reported as [`AgentError::Lost`], because the host has not
/// failed.
fn failed(what: &'static str) -> impl FnOnce(io::Error) -> AgentError {
    move |source| match source.kind() {
        io::ErrorKind::TimedOut => AgentError::Lost,
        _ => AgentError::Host { what, source },
    }
}
