//! The agent: starts processes for the host and connects their streams to it (`guest_protocol::agent`).
//!
//! One thread and one epoll. Nothing here waits for anything else, and nothing is kept of a stream but what a pipe
//! of the kernel's holds: a host that stops reading stops the process that writes.

mod copying;
mod pump;
mod session;
mod socket;
mod watch;

use crate::machine;
use crate::program;
use crate::syscall::{self, SignalSet};
use crate::voice::give_up;
use alloc::vec::Vec;
use guest_init::payload_spec::PayloadSpec;
use guest_protocol::BootMark;
use guest_protocol::agent::{self, Hello, Role};
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, Signal, WaitOptions, getrlimit, setrlimit, wait};
use session::{Session, State};
use watch::{Token, Watch};

/// Processes that the host may have at a time, with those that ended while a child of theirs holds their output. Where
/// there are as many, the one that was announced first and never started makes room.
const SESSIONS: usize = 256;
/// Connections that may be on their way to say what they are for. Where there are as many, the first makes room.
const NEWCOMERS: usize = 256;

/// Of which a session has eight, and a newcomer one.
const DESCRIPTORS: u64 = 4096;

/// A connection that has not said whole yet what it is for.
struct Newcomer {
    /// Connections that came before.
    number: u64,
    socket: OwnedFd,
    bytes: [u8; Hello::LEN],
    length: usize,
}

struct Agent {
    watch: Watch,
    listener: OwnedFd,
    signals: OwnedFd,
    newcomers: Vec<Option<Newcomer>>,
    sessions: Vec<Option<Session>>,
    /// Newcomers and sessions so far.
    count: u64,
}

/// Runs the payload and whatever else the host asks for. Returns the payload's exit status when the host has it.
pub(crate) fn serve(spec: &PayloadSpec) -> u8 {
    let mut agent = Agent::new().unwrap_or_else(|(what, error)| {
        give_up(format_args!("the agent cannot {what}: {error}{}", advice(error)))
    });
    machine::mark(BootMark::AgentReady);
    if !spec.arguments.is_empty() {
        machine::mark(BootMark::PayloadStarted);
        if let Some(session) = agent.session(agent::PAYLOAD) {
            session.start(spec);
        }
    }
    loop {
        agent.turn();
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
        limit_descriptors(DESCRIPTORS);
        let watch = Watch::new().map_err(|error| ("make an epoll instance", error))?;
        let children = SignalSet::of([Signal::CHILD]);
        children.block().map_err(|error| ("block signals", error))?;
        let signals = syscall::signalfd(children).map_err(|error| ("watch its children", error))?;
        let listener = socket::listen(agent::PORT).map_err(|error| ("listen on its vsock port", error))?;
        watch.once(&listener, Token::Listener, EventFlags::IN);
        watch.once(&signals, Token::Signals, EventFlags::IN);
        Ok(Self { watch, listener, signals, newcomers: Vec::new(), sessions: Vec::new(), count: 0 })
    }

    /// Waits for events and serves them.
    fn turn(&mut self) {
        for token in self.watch.wait() {
            match token {
                Token::Listener => self.accept(),
                Token::Signals => self.reap(),
                Token::Newcomer(slot) => self.greet(slot),
                Token::Control(slot) => self.with_session(slot, Session::read_control),
                Token::Execution(slot) => self.with_session(slot, Session::tell_start),
                Token::Stream(slot, number) => {
                    self.with_session(slot, |session, watch| session.advance(number, watch));
                }
            }
        }
    }

    /// Does something to the session in a slot, if one is there, and forgets sessions that are over.
    fn with_session(&mut self, slot: usize, action: impl FnOnce(&mut Session, &Watch)) {
        let Some(place) = self.sessions.get_mut(slot) else { return };
        let Some(session) = place else { return };
        action(session, &self.watch);
        // The payload's is looked at by who waits for its end.
        if session.state() == State::Over && session.token != agent::PAYLOAD {
            *place = None;
        }
    }

    /// The payload's exit status, once the host has taken it.
    fn payload_code(&self) -> Option<u8> {
        let payload = self.sessions.iter().flatten().find(|session| session.token == agent::PAYLOAD)?;
        payload.code.filter(|_| payload.state() != State::Lives)
    }

    /// The session of a token, which is made where there is none.
    fn session(&mut self, token: u64) -> Option<&mut Session> {
        let found = self
            .sessions
            .iter()
            .position(|place| place.as_ref().is_some_and(|session| session.token == token));
        let slot = match found {
            Some(slot) => slot,
            None => {
                let age = |session: &Session| session.is_idle().then_some(session.number);
                free_slot(&mut self.sessions, SESSIONS, age)?
            }
        };
        self.count += 1;
        let number = self.count;
        Some(self.sessions[slot].get_or_insert_with(|| Session::new(token, number, slot)))
    }

    fn accept(&mut self) {
        while let Ok(socket) = socket::accept(&self.listener) {
            let age = |newcomer: &Newcomer| Some(newcomer.number);
            let Some(slot) = free_slot(&mut self.newcomers, NEWCOMERS, age) else { continue };
            self.count += 1;
            self.newcomers[slot] =
                Some(Newcomer { number: self.count, socket, bytes: [0; Hello::LEN], length: 0 });
            self.greet(slot);
        }
        self.watch.once(&self.listener, Token::Listener, EventFlags::IN);
    }

    /// Reads what a connection is for, and brings it there.
    fn greet(&mut self, slot: usize) {
        let Some(place) = self.newcomers.get_mut(slot) else { return };
        let Some(newcomer) = place else { return };
        match rustix::io::read(&newcomer.socket, &mut newcomer.bytes[newcomer.length..]) {
            Ok(0) => *place = None,
            Ok(count) => newcomer.length += count,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => *place = None,
        }
        let Some(newcomer) = place else { return };
        if newcomer.length < Hello::LEN {
            return self.watch.once(&newcomer.socket, Token::Newcomer(slot), EventFlags::IN);
        }
        let (hello, socket) =
            (Hello::from_bytes(newcomer.bytes), place.take().map(|newcomer| newcomer.socket));
        let (Some(hello), Some(socket)) = (hello, socket) else { return };
        let Some(session) = self.session(hello.token) else { return };
        let slot = session.slot;
        self.with_session(slot, |session, watch| match hello.role {
            Role::Control => session.attach_control(socket, watch),
            Role::Input => session.attach(0, socket, watch),
            Role::Output => session.attach(1, socket, watch),
            Role::Error => session.attach(2, socket, watch),
        });
    }

    /// Takes note of all processes that ended, orphans too, which are PID 1's.
    fn reap(&mut self) {
        // It says no more than that there were some.
        let _ = rustix::io::read(&self.signals, &mut [0; 128][..]);
        self.watch.once(&self.signals, Token::Signals, EventFlags::IN);
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let of_session =
                |place: &Option<Session>| place.as_ref().is_some_and(|session| session.process == Some(pid));
            if let Some(slot) = self.sessions.iter().position(of_session) {
                if self.sessions[slot].as_ref().is_some_and(|session| session.token == agent::PAYLOAD) {
                    machine::mark(BootMark::PayloadEnded);
                }
                let code = program::exit_code(status);
                self.with_session(slot, |session, watch| session.end(code, watch));
            }
        }
    }
}

/// Lets this process have so many descriptors.
fn limit_descriptors(current: u64) {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let current = Some(maximum.map_or(current, |maximum| maximum.min(current)));
    let _ = setrlimit(Resource::Nofile, Rlimit { current, maximum });
}

/// A place in a list: one that is free, a new one if there are not too many, or that of the oldest who has to go. Who
/// has no age stays.
fn free_slot<T>(list: &mut Vec<Option<T>>, most: usize, age: impl Fn(&T) -> Option<u64>) -> Option<usize> {
    let free = list.iter().position(Option::is_none);
    let slot = match free {
        Some(slot) => slot,
        None if list.len() < most => {
            list.push(None);
            list.len() - 1
        }
        None => {
            let ages =
                list.iter().enumerate().filter_map(|(slot, place)| Some((age(place.as_ref()?)?, slot)));
            ages.min()?.1
        }
    };
    list[slot] = None;
    Some(slot)
}
