//! The agent: starts processes for the host and connects their streams to it (`guest_protocol::agent`).
//!
//! One thread and one epoll instance serve all connections without blocking. Init buffers no stream data except the
//! content of kernel pipes, so that a host that stops reading blocks the writing process.

mod connections;
mod copying;
mod epoll;
mod freezer;
mod pump;
mod session;
mod snapshot;
mod socket;

use crate::machine;
use crate::panic::fatal;
use crate::program;
use crate::syscall::{self, SignalSet};
use alloc::vec::Vec;
use core::time::Duration;
use epoll::{Epoll, Token};
use guest_init::GuestConfig;
use guest_protocol::BootMark;
use guest_protocol::agent::{self, Hello, Role};
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, Signal, WaitOptions, getrlimit, setrlimit, wait};
use rustix::time::{ClockId, clock_gettime};
use session::{Session, State};

/// Maximum number of sessions, including those whose process ended while a child of it still holds its output. At the
/// limit, a new session replaces the oldest one that never started a process.
const MAX_SESSIONS: usize = 256;
/// Maximum number of connections without a complete [`Hello`]. At the limit, a new connection replaces the oldest one.
const MAX_PENDING: usize = 256;

/// Limit of descriptors for init itself. A session uses eight, and a pending connection one.
const MAX_DESCRIPTORS: u64 = 4096;

/// Time for hosts to receive the exit statuses of other processes after the payload has ended.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection without a complete [`Hello`].
struct PendingConnection {
    /// Sequence number, by which the oldest one is found.
    number: u64,
    socket: OwnedFd,
    bytes: [u8; Hello::LEN],
    length: usize,
}

struct Agent {
    epoll: Epoll,
    listener: OwnedFd,
    signals: OwnedFd,
    pending: Vec<Option<PendingConnection>>,
    sessions: Vec<Option<Session>>,
    /// Slot and exit status of the payload's session, until the host is told.
    ended_payload: Option<(usize, u8)>,
    /// Number of connections and sessions so far.
    count: u64,
}

/// Runs the payload and the processes that the host starts. Returns the payload's exit status after the host has
/// received it.
pub(crate) fn serve(config: &GuestConfig) -> u8 {
    let mut agent = Agent::new().unwrap_or_else(|(what, error)| {
        fatal(format_args!("the agent cannot {what}: {error}{}", advice(error)))
    });
    agent.begin(config);
    loop {
        agent.serve_events(None);
        agent.take_snapshot();
        if let Some((slot, code)) = agent.ended_payload.take() {
            agent.end_others(slot);
            agent.with_session(slot, |session, epoll| session.end(code, epoll));
        }
        if let Some(code) = agent.payload_code() {
            return code;
        }
    }
}

const fn advice(error: Errno) -> &'static str {
    match error {
        Errno::AFNOSUPPORT => "; the guest's kernel needs the fragment vsock",
        Errno::ADDRNOTAVAIL | Errno::NODEV => "; the guest has no vsock device",
        _ => "",
    }
}

impl Agent {
    fn new() -> Result<Self, (&'static str, Errno)> {
        limit_descriptors(MAX_DESCRIPTORS);
        let epoll = Epoll::new().map_err(|error| ("create an epoll instance", error))?;
        let children = SignalSet::of([Signal::CHILD]);
        children.block().map_err(|error| ("block signals", error))?;
        let signals = syscall::signalfd(children).map_err(|error| ("watch its children", error))?;
        let listener = socket::listen(agent::PORT).map_err(|error| ("listen on its vsock port", error))?;
        epoll.arm(&listener, Token::Listener, EventFlags::IN);
        epoll.arm(&signals, Token::Signals, EventFlags::IN);
        Ok(Self {
            epoll,
            listener,
            signals,
            pending: Vec::new(),
            sessions: Vec::new(),
            ended_payload: None,
            count: 0,
        })
    }

    /// Announces that the agent accepts connections, and starts the payload, if there is one.
    fn begin(&mut self, config: &GuestConfig) {
        machine::mark(BootMark::AgentReady);
        if !config.arguments.is_empty() {
            machine::mark(BootMark::PayloadStarted);
            if let Some(session) = self.session(agent::PAYLOAD) {
                session.start(config);
            }
        }
    }

    /// Kills the processes beside the payload for which the host waits, as the kernel does in a container whose process 1
    /// ends, and waits until the host has received their exit statuses. This is done before the host learns that the payload
    /// has ended, because it then stops the guest.
    fn end_others(&mut self, payload: usize) {
        let end = now() + END_TIMEOUT;
        let is_waiting = |session: &Session| session.slot != payload && session.has_waiting_host();
        while self.sessions.iter().flatten().any(is_waiting) {
            // Repeated, because a host may start a process meanwhile.
            syscall::kill_all();
            let Some(limit) = end.checked_sub(now()) else { return };
            self.serve_events(Some(limit));
        }
    }

    /// Waits for events, for a limited time if there is a limit, and handles them.
    fn serve_events(&mut self, limit: Option<Duration>) {
        for token in self.epoll.wait(limit) {
            match token {
                Token::Listener => self.accept(),
                Token::Signals => self.reap(),
                Token::Pending(slot) => self.read_hello(slot),
                Token::Control(slot) => self.with_session(slot, Session::read_control),
                Token::Execution(slot) => self.with_session(slot, Session::report_start),
                Token::Stream(slot, number) => {
                    self.with_session(slot, |session, epoll| session.advance(number, epoll));
                }
            }
        }
    }

    /// Applies an action to the session in a slot, if there is one, and removes a finished session.
    fn with_session(&mut self, slot: usize, action: impl FnOnce(&mut Session, &Epoll)) {
        let Some(entry) = self.sessions.get_mut(slot) else { return };
        let Some(session) = entry else { return };
        action(session, &self.epoll);
        // `payload_code` still reads the session of the payload.
        if session.state() == State::Finished && session.token != agent::PAYLOAD {
            *entry = None;
        }
    }

    /// The payload's exit status, after the host has received it.
    fn payload_code(&self) -> Option<u8> {
        let payload = self.sessions.iter().flatten().find(|session| session.token == agent::PAYLOAD)?;
        payload.code.filter(|_| payload.state() != State::Active)
    }

    /// Finds or creates the session of a token. Returns `None` if there are too many sessions.
    fn session(&mut self, token: u64) -> Option<&mut Session> {
        let found = self
            .sessions
            .iter()
            .position(|entry| entry.as_ref().is_some_and(|session| session.token == token));
        let slot = match found {
            Some(slot) => slot,
            None => {
                let age = |session: &Session| session.is_idle().then_some(session.number);
                free_slot(&mut self.sessions, MAX_SESSIONS, age)?
            }
        };
        self.count += 1;
        let number = self.count;
        Some(self.sessions[slot].get_or_insert_with(|| Session::new(token, number, slot)))
    }

    fn accept(&mut self) {
        while let Ok(socket) = socket::accept(&self.listener) {
            let age = |connection: &PendingConnection| Some(connection.number);
            let Some(slot) = free_slot(&mut self.pending, MAX_PENDING, age) else { continue };
            self.count += 1;
            self.pending[slot] =
                Some(PendingConnection { number: self.count, socket, bytes: [0; Hello::LEN], length: 0 });
            self.read_hello(slot);
        }
        self.epoll.arm(&self.listener, Token::Listener, EventFlags::IN);
    }

    /// Reads the [`Hello`] of a connection, and attaches the connection to its session.
    fn read_hello(&mut self, slot: usize) {
        let Some(entry) = self.pending.get_mut(slot) else { return };
        let Some(connection) = entry else { return };
        match rustix::io::read(&connection.socket, &mut connection.bytes[connection.length..]) {
            Ok(0) => *entry = None,
            Ok(count) => connection.length += count,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => *entry = None,
        }
        let Some(connection) = entry else { return };
        if connection.length < Hello::LEN {
            return self.epoll.arm(&connection.socket, Token::Pending(slot), EventFlags::IN);
        }
        let (hello, socket) =
            (Hello::from_bytes(connection.bytes), entry.take().map(|connection| connection.socket));
        let (Some(hello), Some(socket)) = (hello, socket) else { return };
        let Some(session) = self.session(hello.token) else { return };
        let slot = session.slot;
        self.with_session(slot, |session, epoll| match hello.role {
            Role::Control => session.attach_control(socket, epoll),
            Role::Input => session.attach(0, socket, epoll),
            Role::Output => session.attach(1, socket, epoll),
            Role::Error => session.attach(2, socket, epoll),
        });
    }

    /// Reaps all processes that ended, including orphans, whose parent is PID 1.
    fn reap(&mut self) {
        // One pending SIGCHLD may stand for several processes, so that the content is ignored.
        let _ = rustix::io::read(&self.signals, &mut [0; 128][..]);
        self.epoll.arm(&self.signals, Token::Signals, EventFlags::IN);
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let of_session =
                |entry: &Option<Session>| entry.as_ref().is_some_and(|session| session.process == Some(pid));
            if let Some(slot) = self.sessions.iter().position(of_session) {
                let code = program::exit_code(status);
                if self.sessions[slot].as_ref().is_some_and(|session| session.token == agent::PAYLOAD) {
                    machine::mark(BootMark::PayloadEnded);
                    self.ended_payload = Some((slot, code));
                    // The number may become another process's.
                    self.sessions[slot].iter_mut().for_each(|session| session.process = None);
                    continue;
                }
                self.with_session(slot, |session, epoll| session.end(code, epoll));
            }
        }
    }
}

/// Time since the guest's kernel started.
fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::try_from(time).unwrap_or_default()
}

/// Sets the soft limit of descriptors of this process.
fn limit_descriptors(current: u64) {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let current = Some(maximum.map_or(current, |maximum| maximum.min(current)));
    let _ = setrlimit(Resource::Nofile, Rlimit { current, maximum });
}

/// Returns a free slot of a list: an empty one, a new one below the limit, or that of the oldest entry, which is
/// removed. Entries without an age are kept.
fn free_slot<T>(list: &mut Vec<Option<T>>, max: usize, age: impl Fn(&T) -> Option<u64>) -> Option<usize> {
    let free = list.iter().position(Option::is_none);
    let slot = match free {
        Some(slot) => slot,
        None if list.len() < max => {
            list.push(None);
            list.len() - 1
        }
        None => {
            let ages =
                list.iter().enumerate().filter_map(|(slot, entry)| Some((age(entry.as_ref()?)?, slot)));
            ages.min()?.1
        }
    };
    list[slot] = None;
    Some(slot)
}
