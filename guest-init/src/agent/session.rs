//! A process of the host's: its control connection, its streams, its end.

use super::copying;
use super::pump::Pump;
use super::watch::{Token, Watch};
use crate::machine;
use crate::program::{self, Program};
use crate::syscall;
use crate::voice::say;
use alloc::vec::Vec;
use guest_init::payload_spec::PayloadSpec;
use guest_protocol::agent::{Message, Role, TerminalSize};
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// Descriptors that a process may have before it asks for more, as everywhere.
const PROCESS_DESCRIPTORS: u64 = 1024;

/// How far a session is.
#[derive(PartialEq, Eq)]
pub(super) enum State {
    Lives,
    /// The host knows how the process ended, and a child of it still holds its output.
    Known,
    /// Nothing is left to do.
    Over,
}

pub(super) struct Session {
    pub(super) token: u64,
    /// Sessions that were made before.
    pub(super) number: u64,
    pub(super) slot: usize,
    /// The process, while it lives.
    pub(super) process: Option<Pid>,
    /// Its exit status, when it has ended.
    pub(super) code: Option<u8>,
    /// No process could be started, or its program is known not to be executed.
    is_refused: bool,
    /// Ends when the program is executed, with a byte before where it cannot be.
    execution: Option<OwnedFd>,
    /// The host wants to know.
    tells_start: bool,
    control: Option<OwnedFd>,
    /// The control connection was there and is closed.
    is_left: bool,
    /// The beginning of a message.
    received: Vec<u8>,
    terminal: Option<OwnedFd>,
    /// Standard input, output, error.
    streams: [Pump; 3],
    /// Of which of these the host knows that they have something to read.
    is_offered: [bool; 3],
}

/// A process's ends of its streams.
struct Ends([OwnedFd; 3]);

impl Session {
    pub(super) fn new(token: u64, number: u64, slot: usize) -> Self {
        Self {
            token,
            number,
            slot,
            process: None,
            code: None,
            is_refused: false,
            execution: None,
            tells_start: false,
            control: None,
            is_left: false,
            received: Vec::new(),
            terminal: None,
            streams: Default::default(),
            is_offered: [false; 3],
        }
    }

    pub(super) fn state(&self) -> State {
        let has_ended = self.process.is_none();
        match self.streams.iter().all(|stream| stream.source.is_none()) {
            true if has_ended && self.is_left => State::Over,
            false if has_ended && self.is_left => State::Known,
            _ => State::Lives,
        }
    }

    /// Whether it was never more than a token: nobody has asked for a process.
    pub(super) fn is_idle(&self) -> bool {
        self.process.is_none() && self.code.is_none()
    }

    /// Starts a program.
    pub(super) fn start(&mut self, spec: &PayloadSpec) {
        let Some(program) = Program::new(spec) else {
            return self.began(Err(("start a program with a NUL in its strings", Errno::INVAL)));
        };
        let (execution, failed) = match pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK) {
            Ok((execution, failed)) => (Some(execution), Some(failed)),
            Err(_) => (None, None),
        };
        if self.is_idle() {
            self.execution = execution;
            let process = self.fork(spec.terminal, || program.execute(failed));
            self.began(process);
        }
    }

    /// Starts a process that is a part of this program.
    fn start_own(&mut self, work: impl FnOnce() -> u8) {
        if self.is_idle() {
            let process = self.fork(None, || {
                machine::drop_ports();
                syscall::exit(work())
            });
            self.began(process);
        }
    }

    /// A process has begun, or what stands in the way is said on the console and becomes its exit status.
    fn began(&mut self, process: Result<Pid, (&'static str, Errno)>) {
        match process {
            Ok(process) => self.process = Some(process),
            Err((what, error)) => {
                say(format_args!("init: cannot {what}: {error}\n"));
                self.streams.iter_mut().for_each(Pump::close);
                (self.code, self.is_refused) = (Some(program::NOT_EXECUTABLE), true);
            }
        }
    }

    /// A child with streams of its own.
    fn fork(
        &mut self,
        terminal: Option<TerminalSize>,
        child: impl FnOnce(),
    ) -> Result<Pid, (&'static str, Errno)> {
        let ends = match terminal {
            Some(size) => self.open_terminal(size),
            None => self.open_pipes(),
        };
        let ends = ends.map_err(|error| ("make a process's streams", error))?;
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
        // A stream each: epoll takes a descriptor once.
        let copy = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 0);
        self.streams[0].target = Some(copy(&master)?);
        self.streams[1].source = Some(copy(&master)?);
        self.streams[0].is_terminal = true;
        self.streams[1].is_terminal = true;
        self.terminal = Some(master);
        let (output, error) = (copy(&process)?, copy(&process)?);
        Ok(Ends([process, output, error]))
    }

    /// The process's end.
    pub(super) fn end(&mut self, code: u8, watch: &Watch) {
        (self.process, self.code) = (None, Some(code));
        self.streams[0].close();
        for number in [1, 2] {
            self.streams[number].cut();
            self.advance(number, watch);
        }
        self.tell_end();
        self.forget_unclaimed();
    }

    fn tell_end(&mut self) {
        let (Some(status), true) = (self.code, self.control.is_some()) else { return };
        let ran = |execution| rustix::io::read(execution, &mut [0; 1][..]) == Ok(0);
        let was_executed = !self.is_refused && self.execution.take().is_none_or(ran);
        self.tell(Message::Exited { status, was_executed });
    }

    /// Tells the host that the program is executed, if it wants to know and as soon as that is so.
    pub(super) fn tell_start(&mut self, watch: &Watch) {
        let (true, Some(execution)) = (self.tells_start, &self.execution) else { return };
        match rustix::io::read(execution, &mut [0; 1][..]) {
            Ok(0) => {
                self.execution = None;
                self.tell(Message::Started);
            }
            Err(Errno::AGAIN | Errno::INTR) => {
                watch.once(execution, Token::Execution(self.slot), EventFlags::IN)
            }
            // Why it is not will be its exit status.
            Ok(_) | Err(_) => self.is_refused = true,
        }
    }

    fn tell(&self, message: Message<'_>) {
        let Some(control) = &self.control else { return };
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        // There is room for it: next to nothing is ever sent there. A host that is gone does not want it.
        let _ = rustix::io::write(control, &bytes);
    }

    pub(super) fn attach_control(&mut self, socket: OwnedFd, watch: &Watch) {
        self.control = Some(socket);
        (1..3).for_each(|number| self.advance(number, watch));
        self.tell_end();
        self.read_control(watch);
    }

    /// The host's end of a stream has come.
    pub(super) fn attach(&mut self, number: usize, socket: OwnedFd, watch: &Watch) {
        let stream = &mut self.streams[number];
        if self.code.is_some() && stream.source.is_none() {
            // There is nothing to read, and nobody to write to.
            return;
        }
        if number == 0 {
            stream.source = Some(socket);
        } else {
            stream.target = Some(socket);
        }
        self.advance(number, watch);
    }

    pub(super) fn advance(&mut self, number: usize, watch: &Watch) {
        let Some(stream) = self.streams.get_mut(number) else { return };
        let token = Token::Stream(self.slot, number);
        stream.advance(watch, token);
        let has_host = self.control.is_some() && !self.is_offered[number];
        if has_host && stream.has_unclaimed(watch, token) {
            self.is_offered[number] = true;
            self.tell(Message::HasOutput(if number == 1 { Role::Output } else { Role::Error }));
        }
    }

    /// Reads and obeys what the host says.
    pub(super) fn read_control(&mut self, watch: &Watch) {
        let mut buffer = [0; 4096];
        loop {
            let Some(control) = &self.control else { return };
            match rustix::io::read(control, &mut buffer) {
                Ok(count @ 1..) => self.received.extend_from_slice(&buffer[..count]),
                Err(Errno::AGAIN | Errno::INTR) => {
                    return watch.once(control, Token::Control(self.slot), EventFlags::IN);
                }
                Ok(0) | Err(_) => return self.leave(),
            }
            if self.obey(watch).is_none() {
                return self.leave();
            }
        }
    }

    /// Obeys the messages that are whole; `None` after one that is none.
    fn obey(&mut self, watch: &Watch) -> Option<()> {
        let mut received = core::mem::take(&mut self.received);
        let mut obeyed = 0;
        while let Some((message, length)) = Message::split(&received[obeyed..]).ok()? {
            let was_idle = self.is_idle();
            match message {
                Message::Start(frame) => self.start(&PayloadSpec::from_frame(frame).ok()?),
                Message::Send { follows, path } => self.start_own(|| copying::send(path, follows)),
                Message::Receive { keeps_owners, path } => {
                    self.start_own(|| copying::receive(path, keeps_owners));
                }
                Message::TellStart => {
                    self.tells_start = true;
                    self.tell_start(watch);
                }
                Message::EndInput => self.streams[0].close(),
                Message::Signal(number) => self.signal(number),
                Message::Resize(size) => {
                    self.terminal.iter().for_each(|terminal| resize(terminal, size));
                }
                Message::Exited { .. } | Message::Started | Message::HasOutput(_) => return None,
            }
            if was_idle && !self.is_idle() {
                (0..3).for_each(|number| self.advance(number, watch));
                self.tell_end();
            }
            obeyed += length;
        }
        // What a long message took is given back.
        if obeyed < received.len() {
            received.drain(..obeyed);
            self.received = received;
        }
        Some(())
    }

    /// Signals that a terminal sends go to all who would be in its foreground, others to the process alone.
    fn signal(&self, number: u8) {
        let is_terminals =
            [Signal::INT, Signal::QUIT, Signal::HUP].iter().any(|signal| signal.as_raw() == number.into());
        if let Some(process) = self.process {
            let _ = syscall::kill(process, number, is_terminals);
        }
    }

    /// The host is done with this process. One at a terminal is hung up on; another one goes on unheard.
    fn leave(&mut self) {
        (self.control, self.terminal, self.is_left) = (None, None, true);
        self.received = Vec::new();
        if self.streams[0].is_terminal || self.is_idle() {
            self.streams.iter_mut().for_each(Pump::close);
        }
        self.forget_unclaimed();
    }

    /// Output that the host has not come for will not be fetched by a host that is gone.
    fn forget_unclaimed(&mut self) {
        if self.is_left {
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
    /// Makes them the standard streams of this process, which has a session of its own.
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
