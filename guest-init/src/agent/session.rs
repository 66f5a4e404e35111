//! A session: a process that the host started, with its control connection and streams.

use super::copying;
use super::epoll::{Epoll, Token};
use super::pump::Pump;
use crate::console::print;
use crate::machine;
use crate::program::{self, Program};
use crate::syscall;
use alloc::vec::Vec;
use guest_init::GuestConfig;
use guest_protocol::agent::{Message, Role, TerminalSize};
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// Soft limit of descriptors of a process: the usual one of Linux.
const PROCESS_DESCRIPTORS: u64 = 1024;

/// State of a session.
#[derive(PartialEq, Eq)]
pub(super) enum State {
    Active,
    /// The process has ended and the host has closed the control connection, but a child of the process still holds its
    /// output.
    Lingering,
    /// Nothing is left to do.
    Finished,
}

pub(super) struct Session {
    pub(super) token: u64,
    /// Sequence number, by which the oldest one is found.
    pub(super) number: u64,
    pub(super) slot: usize,
    /// The process, while it runs.
    pub(super) process: Option<Pid>,
    /// The exit status of the process after its end.
    pub(super) code: Option<u8>,
    /// Whether no process could be started, or execve failed.
    has_failed: bool,
    /// Pipe that reports execve: EOF on success (FD_CLOEXEC), a byte on failure.
    execution: Option<OwnedFd>,
    /// Whether the host requested [`Message::Started`].
    reports_start: bool,
    /// Whether the guest continues after the snapshot that the host has requested. `None` without a request.
    pub(super) requests_snapshot: Option<bool>,
    control: Option<OwnedFd>,
    /// Whether the host has closed the control connection.
    is_detached: bool,
    /// The beginning of an incomplete message.
    received: Vec<u8>,
    terminal: Option<OwnedFd>,
    /// Standard input, output, error.
    streams: [Pump; 3],
    /// For which streams [`Message::HasOutput`] was sent.
    is_announced: [bool; 3],
}

/// The ends of the streams that the process gets as its standard streams.
struct Ends([OwnedFd; 3]);

impl Session {
    pub(super) fn new(token: u64, number: u64, slot: usize) -> Self {
        Self {
            token,
            number,
            slot,
            process: None,
            code: None,
            has_failed: false,
            execution: None,
            reports_start: false,
            requests_snapshot: None,
            control: None,
            is_detached: false,
            received: Vec::new(),
            terminal: None,
            streams: Default::default(),
            is_announced: [false; 3],
        }
    }

    pub(super) fn state(&self) -> State {
        let has_ended = self.process.is_none();
        match self.streams.iter().all(|stream| stream.source.is_none()) {
            true if has_ended && self.is_detached => State::Finished,
            false if has_ended && self.is_detached => State::Lingering,
            _ => State::Active,
        }
    }

    /// Whether a host waits for the end of the process.
    pub(super) fn has_waiting_host(&self) -> bool {
        self.control.is_some() && !self.is_idle()
    }

    /// Whether the session never started a process.
    pub(super) fn is_idle(&self) -> bool {
        self.process.is_none() && self.code.is_none()
    }

    /// Starts a program.
    pub(super) fn start(&mut self, config: &GuestConfig) {
        let Some(program) = Program::new(config) else {
            return self.finish_start(Err(("start a program with a NUL in its strings", Errno::INVAL)));
        };
        let (execution, failed) = match pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK) {
            Ok((execution, failed)) => (Some(execution), Some(failed)),
            Err(_) => (None, None),
        };
        if self.is_idle() {
            self.execution = execution;
            let process = self.fork(config.terminal, || program.execute(failed));
            self.finish_start(process);
        }
    }

    /// Starts a process that runs a function of init.
    fn start_internal(&mut self, work: impl FnOnce() -> u8) {
        if self.is_idle() {
            let process = self.fork(None, || {
                machine::drop_ports();
                syscall::exit(work())
            });
            self.finish_start(process);
        }
    }

    /// Records the process. If it could not be started, prints the error and sets the exit status.
    fn finish_start(&mut self, process: Result<Pid, (&'static str, Errno)>) {
        match process {
            Ok(process) => self.process = Some(process),
            Err((what, error)) => {
                print(format_args!("init: cannot {what}: {error}\n"));
                self.streams.iter_mut().for_each(Pump::close);
                (self.code, self.has_failed) = (Some(program::NOT_EXECUTABLE), true);
            }
        }
    }

    /// Forks a child with new standard streams.
    fn fork(
        &mut self,
        terminal: Option<TerminalSize>,
        child: impl FnOnce(),
    ) -> Result<Pid, (&'static str, Errno)> {
        let ends = match terminal {
            Some(size) => self.open_terminal(size),
            None => self.open_pipes(),
        };
        let ends = ends.map_err(|error| ("create the streams of a process", error))?;
        match syscall::fork() {
            Ok(None) => {
                super::limit_descriptors(PROCESS_DESCRIPTORS);
                ends.enter(terminal.is_some());
                child();
                syscall::exit(program::NOT_EXECUTABLE)
            }
            Ok(Some(process)) => Ok(process),
            Err(error) => Err(("start a process", error)),
        }
    }

    fn open_pipes(&mut self) -> Result<Ends, Errno> {
        let (read, input) = pipe_with(PipeFlags::CLOEXEC)?;
        let (output, write) = pipe_with(PipeFlags::CLOEXEC)?;
        let (error, write_error) = pipe_with(PipeFlags::CLOEXEC)?;
        self.streams[0].target = Some(input);
        self.streams[1].source = Some(output);
        self.streams[2].source = Some(error);
        Ok(Ends([read, write, write_error]))
    }

    fn open_terminal(&mut self, size: TerminalSize) -> Result<Ends, Errno> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        unlockpt(&master)?;
        resize(&master, size);
        let process = ioctl_tiocgptpeer(&master, flags)?;
        fcntl_setfl(&master, fcntl_getfl(&master)? | OFlags::NONBLOCK)?;
        // One descriptor per stream, because epoll registers a descriptor only once.
        let copy = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 0);
        self.streams[0].target = Some(copy(&master)?);
        self.streams[1].source = Some(copy(&master)?);
        self.streams[0].is_terminal = true;
        self.streams[1].is_terminal = true;
        self.terminal = Some(master);
        let (output, error) = (copy(&process)?, copy(&process)?);
        Ok(Ends([process, output, error]))
    }

    /// Records the end of the process.
    pub(super) fn end(&mut self, code: u8, epoll: &Epoll) {
        (self.process, self.code) = (None, Some(code));
        self.streams[0].close();
        for number in [1, 2] {
            self.streams[number].limit_to_buffered();
            self.advance(number, epoll);
        }
        self.report_end();
        self.close_unclaimed();
    }

    fn report_end(&mut self) {
        let (Some(status), true) = (self.code, self.control.is_some()) else { return };
        let ran = |execution| rustix::io::read(execution, &mut [0; 1][..]) == Ok(0);
        let was_executed = !self.has_failed && self.execution.take().is_none_or(ran);
        self.send(Message::Exited { status, was_executed });
    }

    /// Reports to the host that execve succeeded, if the host requested it.
    pub(super) fn report_start(&mut self, epoll: &Epoll) {
        if !self.reports_start {
            return;
        }
        let Some(execution) = &self.execution else {
            // Of a copy: the program was executed in the guest that was saved.
            return if self.process.is_some() {
                self.send(Message::Started)
            };
        };
        match rustix::io::read(execution, &mut [0; 1][..]) {
            Ok(0) => {
                self.execution = None;
                self.send(Message::Started);
            }
            Err(Errno::AGAIN | Errno::INTR) => {
                epoll.arm(execution, Token::Execution(self.slot), EventFlags::IN)
            }
            // The exit status will tell the reason.
            Ok(_) | Err(_) => self.has_failed = true,
        }
    }

    fn send(&self, message: Message<'_>) {
        let Some(control) = &self.control else { return };
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        // The socket buffer has space, because few and short messages are sent. A closed connection is handled by
        // `read_control`.
        let _ = rustix::io::write(control, &bytes);
    }

    pub(super) fn attach_control(&mut self, socket: OwnedFd, epoll: &Epoll) {
        self.control = Some(socket);
        (1..3).for_each(|number| self.advance(number, epoll));
        self.report_end();
        self.read_control(epoll);
    }

    /// Attaches a connection of the host to a stream.
    pub(super) fn attach(&mut self, number: usize, socket: OwnedFd, epoll: &Epoll) {
        let stream = &mut self.streams[number];
        if self.code.is_some() && stream.source.is_none() {
            // The process has ended, and there is no output left.
            return;
        }
        if number == 0 {
            stream.source = Some(socket);
        } else {
            stream.target = Some(socket);
        }
        self.advance(number, epoll);
    }

    pub(super) fn advance(&mut self, number: usize, epoll: &Epoll) {
        let Some(stream) = self.streams.get_mut(number) else { return };
        let token = Token::Stream(self.slot, number);
        stream.advance(epoll, token);
        let has_host = self.control.is_some() && !self.is_announced[number];
        if has_host && stream.has_unclaimed(epoll, token) {
            self.is_announced[number] = true;
            self.send(Message::HasOutput(if number == 1 { Role::Output } else { Role::Error }));
        }
    }

    /// Reads and handles messages of the host.
    pub(super) fn read_control(&mut self, epoll: &Epoll) {
        let mut buffer = [0; 4096];
        loop {
            let Some(control) = &self.control else { return };
            match rustix::io::read(control, &mut buffer) {
                Ok(count @ 1..) => self.received.extend_from_slice(&buffer[..count]),
                Err(Errno::AGAIN | Errno::INTR) => {
                    return epoll.arm(control, Token::Control(self.slot), EventFlags::IN);
                }
                Ok(0) | Err(_) => return self.detach(),
            }
            if self.handle_messages(epoll).is_none() {
                return self.detach();
            }
        }
    }

    /// Handles all complete messages. Returns `None` if one is invalid.
    fn handle_messages(&mut self, epoll: &Epoll) -> Option<()> {
        let mut received = core::mem::take(&mut self.received);
        let mut handled = 0;
        while let Some((message, length)) = Message::split(&received[handled..]).ok()? {
            let was_idle = self.is_idle();
            match message {
                Message::Start(frame) => self.start(&GuestConfig::from_frame(frame).ok()?.0),
                Message::Send { follows, path } => self.start_internal(|| copying::send(path, follows)),
                Message::Receive { keeps_owners, path } => {
                    self.start_internal(|| copying::receive(path, keeps_owners));
                }
                Message::ReportStart => {
                    self.reports_start = true;
                    self.report_start(epoll);
                }
                Message::EndInput => self.streams[0].close(),
                Message::Freeze { continues } => {
                    self.requests_snapshot = self.is_idle().then_some(continues);
                }
                Message::Signal(number) => self.signal(number),
                Message::Resize(size) => {
                    self.terminal.iter().for_each(|terminal| resize(terminal, size));
                }
                Message::Exited { .. } | Message::Started | Message::HasOutput(_) => return None,
            }
            if was_idle && !self.is_idle() {
                (0..3).for_each(|number| self.advance(number, epoll));
                self.report_end();
            }
            handled += length;
        }
        // An empty buffer is freed, because its capacity may be as large as a frame.
        if handled < received.len() {
            received.drain(..handled);
            self.received = received;
        }
        Some(())
    }

    /// Sends a signal. The signals of a terminal go to the process group, as they would from a terminal, others to the
    /// process only.
    fn signal(&self, number: u8) {
        let is_terminals =
            [Signal::INT, Signal::QUIT, Signal::HUP].iter().any(|signal| signal.as_raw() == number.into());
        if let Some(process) = self.process {
            let _ = syscall::kill(process, number, is_terminals);
        }
    }

    /// Handles the end of the control connection. A process on a terminal gets SIGHUP; others continue without a host.
    pub(super) fn detach(&mut self) {
        (self.control, self.terminal, self.is_detached) = (None, None, true);
        self.received = Vec::new();
        if self.streams[0].is_terminal || self.is_idle() {
            self.streams.iter_mut().for_each(Pump::close);
        }
        self.close_unclaimed();
    }

    /// Waits for another host, in a copy of the guest in which the process runs on. Its streams stay open.
    pub(super) fn await_host(&mut self) {
        (self.control, self.is_detached, self.reports_start) = (None, false, false);
        (self.received, self.is_announced) = (Vec::new(), [false; 3]);
        self.streams[0].source = None;
        self.streams[1..].iter_mut().for_each(|stream| stream.target = None);
    }

    /// Closes output streams to which the host has not connected, after it has closed the control connection.
    fn close_unclaimed(&mut self) {
        if self.is_detached {
            let unclaimed = self.streams[1..].iter_mut().filter(|stream| stream.target.is_none());
            unclaimed.for_each(Pump::close);
        }
    }
}

fn resize(terminal: &OwnedFd, size: TerminalSize) {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    let _ = tcsetwinsize(terminal, size);
}

impl Ends {
    /// Makes them the standard streams of this process, in a new session.
    fn enter(self, is_terminal: bool) {
        let Self([input, output, error]) = self;
        let _ = rustix::process::setsid();
        if is_terminal {
            let _ = rustix::process::ioctl_tiocsctty(&input);
        }
        // The descriptors are above the standard ones, which init has open, and are closed by exec.
        let _ = rustix::stdio::dup2_stdin(&input);
        let _ = rustix::stdio::dup2_stdout(&output);
        let _ = rustix::stdio::dup2_stderr(&error);
        core::mem::forget((input, output, error));
    }
}
