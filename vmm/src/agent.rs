//! The host's side of a guest's agent (`guest_protocol::agent`): a process in the guest as a control connection and
//! up to three streams, over the Unix socket that leads to the guest's vsock ports.

mod outgoing;
#[cfg(test)]
mod tests;

pub use guest_protocol::agent::Role;
use guest_protocol::agent::{BadMessage, Hello, MESSAGE_HEADER_LEN, Message, PAYLOAD, PORT, TerminalSize};
use outgoing::{Order, Outgoing};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, socket_with,
};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a guest may take over what its agent does at once: taking a connection or a process's description, and
/// saying how a process has ended whose streams have.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a guest's agent cannot be talked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The socket to the guest.
    #[error("cannot connect to the guest over {}", path.display())]
    Connect {
        /// The Unix socket of the guest's vsock.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// No agent takes connections.
    #[error("the guest behind {} has no agent, or is not ready", path.display())]
    Refused {
        /// The Unix socket of the guest's vsock.
        path: PathBuf,
    },
    /// The agent does not do what it always does at once.
    #[error(
        "the guest behind {} does not answer; it hangs, or has no processor time. `kindling rm --force` ends it",
        path.display()
    )]
    Silent {
        /// The Unix socket of the guest's vsock.
        path: PathBuf,
    },
    /// The connection ended before the process did.
    #[error("the guest ended, or its agent hung up, before the process had ended")]
    Lost,
}

/// A process in a guest. To be dropped is to hang up on it.
#[derive(Debug)]
pub struct Process {
    place: Place,
    control: Arc<Outgoing>,
    /// Whether the guest has taken the control connection.
    is_connected: bool,
    /// When it is to have done so, and to know which process it is to start. A payload runs without that.
    deadline: Option<Instant>,
    /// What came over it and is not a whole message yet.
    received: Vec<u8>,
    /// What it said and nobody has taken.
    news: VecDeque<News>,
    /// Which news it has said, by [`News::number`].
    heard: [bool; 4],
}

/// Where a process's streams can be had.
#[derive(Clone, Debug)]
pub struct Place {
    socket: PathBuf,
    token: u64,
}

/// What a guest says of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// Its program is executed; for who asked ([`Process::ask_for_start`]).
    Started,
    /// It has written something to its output or error, to which nobody has connected.
    HasOutput(Role),
    /// It has ended. What it wrote may still be on its way; output that nobody was told of until now is empty.
    Exited {
        /// Its exit status, which is 128 + signal when a signal killed it.
        status: u8,
        /// Whether its program was executed; else the status says why not.
        was_executed: bool,
    },
}

impl News {
    const fn number(self) -> usize {
        match self {
            Self::Started => 0,
            Self::HasOutput(Role::Output) => 1,
            Self::HasOutput(_) => 2,
            Self::Exited { .. } => 3,
        }
    }
}

/// Says things of a process from elsewhere.
#[derive(Debug)]
pub struct Control(Arc<Outgoing>);

impl Process {
    /// The payload of a guest, which runs already.
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn payload(socket: &Path) -> Result<Self, AgentError> {
        Self::open(socket, PAYLOAD, &[])
    }

    /// Starts the payload of a guest that has none, with which the guest ends.
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn start_payload(socket: &Path, frame: &[u8]) -> Result<Self, AgentError> {
        Self::open(socket, PAYLOAD, &encoded(Message::Start(frame)))
    }

    /// Starts a process that a configuration frame describes
    /// ([`GuestConfig::to_frame`](crate::config::GuestConfig::to_frame)). `token` is any number but zero that no
    /// other process of this guest was given.
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn start(socket: &Path, token: u64, frame: &[u8]) -> Result<Self, AgentError> {
        Self::open(socket, token, &encoded(Message::Start(frame)))
    }

    /// Starts to fetch files from a guest, which come from the process's output in the form of the crate `guest-copy`.
    /// `follows` says whether what a link leads to is meant. The token is as for [`Self::start`].
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn fetch(socket: &Path, token: u64, path: &[u8], follows: bool) -> Result<Self, AgentError> {
        Self::open(socket, token, &encoded(Message::Send { follows, path }))
    }

    /// Starts to bring files into a guest: they go to the process's input. `keeps_owners` says whether they become
    /// root's otherwise.
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn bring(socket: &Path, token: u64, path: &[u8], keeps_owners: bool) -> Result<Self, AgentError> {
        Self::open(socket, token, &encoded(Message::Receive { keeps_owners, path }))
    }

    fn open(socket: &Path, token: u64, start: &[u8]) -> Result<Self, AgentError> {
        let place = Place { socket: socket.into(), token };
        // Whether the guest takes it is seen when it says something.
        let control = place.dial()?;
        let limit = (!start.is_empty()).then_some(ANSWER_TIMEOUT);
        let first = [&place.request(Role::Control)[..], start].concat();
        Ok(Self::with(place, Outgoing::new(control, first), limit))
    }

    /// What a connection has to be told first is on its way, and to be taken within a limit.
    fn with(place: Place, control: Outgoing, limit: Option<Duration>) -> Self {
        control.flush();
        Self {
            place,
            control: Arc::new(control),
            is_connected: false,
            deadline: limit.map(|limit| Instant::now() + limit),
            received: Vec::new(),
            news: VecDeque::new(),
            heard: [false; 4],
        }
    }

    /// Where its streams can be had.
    #[must_use]
    pub const fn place(&self) -> &Place {
        &self.place
    }

    /// What speaks for it elsewhere.
    #[must_use]
    pub fn control(&self) -> Control {
        Control(Arc::clone(&self.control))
    }

    /// What its descriptor is to be polled for, and for how long, before [`Self::news`] is asked again. A guest that
    /// takes nothing lets nobody wait: what it was told waits here.
    #[must_use]
    pub fn wants(&self) -> (PollFlags, Option<Duration>) {
        let more = if self.control.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        (PollFlags::IN | more, left)
    }

    /// Sends a signal: those of a terminal's keys, and the one for its end, to the process and its foreground
    /// children, others to the process alone.
    pub fn signal(&self, number: u8) {
        self.control.say(Order::Signal(number));
    }

    /// Says how large the terminal is now.
    pub fn resize(&self, size: TerminalSize) {
        self.control.say(Order::Resize(size));
    }

    /// Says that it has no input, or no more where none has been connected.
    pub fn end_input(&self) {
        self.control.say(Order::EndInput);
    }

    /// Asks for [`News::Started`]; where the program cannot be executed, [`News::Exited`] comes instead.
    pub fn ask_for_start(&self) {
        self.control.say(Order::TellStart);
    }

    /// What came next, if something did: does not wait. Goes on telling the guest what it has not taken yet.
    ///
    /// # Errors
    /// When the guest has ended, says what it may not, or does not take the process.
    pub fn news(&mut self) -> Result<Option<News>, AgentError> {
        /// More than a guest has to say of a process.
        const ENOUGH: usize = 256;
        self.control.flush();
        loop {
            if self.is_connected && self.control.is_empty() {
                self.deadline = None;
            }
            if let Some(news) = self.news.pop_front() {
                return Ok(Some(news));
            }
            let mut bytes = [0; ENOUGH];
            match recv(self.control.stream(), &mut bytes, RecvFlags::DONTWAIT) {
                Ok((_, count @ 1..)) => self.received.extend_from_slice(&bytes[..count]),
                Err(Errno::AGAIN | Errno::INTR) => return self.in_time().map(|()| None),
                Ok(_) | Err(_) => return Err(self.lost()),
            }
            self.understand()?;
        }
    }

    fn in_time(&self) -> Result<(), AgentError> {
        match self.deadline {
            Some(deadline) if deadline <= Instant::now() => Err(self.place.silent()),
            _ => Ok(()),
        }
    }

    /// Takes what is whole of what was received.
    fn understand(&mut self) -> Result<(), AgentError> {
        let mut rest = &self.received[..];
        if !self.is_connected {
            let Some(end) = rest.iter().take(LONGEST_ANSWER).position(|&byte| byte == b'\n') else {
                return if rest.len() < LONGEST_ANSWER { Ok(()) } else { Err(self.lost()) };
            };
            if !rest.starts_with(ACCEPTED) {
                return Err(self.lost());
            }
            self.is_connected = true;
            rest = &rest[end + 1..];
        }
        while let Some((message, length)) = Message::split(rest).map_err(|BadMessage| AgentError::Lost)? {
            let news = match message {
                Message::Started => News::Started,
                Message::HasOutput(role) => News::HasOutput(role),
                Message::Exited { status, was_executed } => News::Exited { status, was_executed },
                _ => return Err(AgentError::Lost),
            };
            // A guest that repeats itself would have things done here again and again.
            if std::mem::replace(&mut self.heard[news.number()], true) {
                return Err(AgentError::Lost);
            }
            self.news.push_back(news);
            rest = &rest[length..];
        }
        // What a guest has to say is short.
        if rest.len() > LONGEST_MESSAGE {
            return Err(AgentError::Lost);
        }
        self.received = rest.to_vec();
        Ok(())
    }

    fn lost(&self) -> AgentError {
        match self.is_connected {
            true => AgentError::Lost,
            false => AgentError::Refused { path: self.place.socket.clone() },
        }
    }

    /// Takes back news, for who asks next.
    pub fn put_back(&mut self, news: impl IntoIterator<Item = News>) {
        let later = std::mem::replace(&mut self.news, news.into_iter().collect());
        self.news.extend(later);
    }

    /// Waits for what comes next of a process that has only to end.
    ///
    /// # Errors
    /// When the guest has ended, says what it may not, or does not answer.
    pub fn wait_for_news(&mut self) -> Result<News, AgentError> {
        let until = Instant::now() + ANSWER_TIMEOUT;
        loop {
            if let Some(news) = self.news()? {
                return Ok(news);
            }
            let left = until.saturating_duration_since(Instant::now());
            if !wait(self.as_fd(), self.wants().0, left).map_err(|_| AgentError::Lost)? {
                return Err(self.place.silent());
            }
        }
    }
}

impl Place {
    /// Connects to a stream of the process, and waits until the guest has taken the connection. Shutting down the
    /// writing half of the input is its end.
    ///
    /// # Errors
    /// When the agent cannot be reached, or does not answer.
    pub fn connect(&self, role: Role) -> Result<UnixStream, AgentError> {
        self.connect_within(role, ANSWER_TIMEOUT)
    }

    fn connect_within(&self, role: Role, limit: Duration) -> Result<UnixStream, AgentError> {
        let failed = |source| AgentError::Connect { path: self.socket.clone(), source };
        let mut stream = self.dial()?;
        // It is little, so that the socket has room for it.
        stream.write_all(&self.request(role)).map_err(failed)?;
        if !wait(stream.as_fd(), PollFlags::IN, limit).map_err(failed)? {
            return Err(self.silent());
        }
        expect_accepted(&stream).map_err(|_| AgentError::Refused { path: self.socket.clone() })?;
        Ok(stream)
    }

    fn dial(&self) -> Result<UnixStream, AgentError> {
        let failed = |source| AgentError::Connect { path: self.socket.clone(), source };
        let connected = || -> Result<UnixStream, Errno> {
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            // Without a limit, connect(2) waits for as long as the listener's backlog is full.
            set_socket_timeout(&socket, Timeout::Send, Some(ANSWER_TIMEOUT))?;
            connect(&socket, &SocketAddrUnix::new(&self.socket)?)?;
            set_socket_timeout(&socket, Timeout::Send, None)?;
            Ok(socket.into())
        };
        match connected() {
            Err(Errno::AGAIN) => Err(self.silent()),
            result => result.map_err(|error| failed(error.into())),
        }
    }

    /// Asks for a connection to the agent's port, in Firecracker's words, and says at once what it is for.
    fn request(&self, role: Role) -> Vec<u8> {
        let hello = Hello { token: self.token, role };
        [format!("CONNECT {PORT}\n").as_bytes(), &hello.to_bytes()].concat()
    }

    fn silent(&self) -> AgentError {
        AgentError::Silent { path: self.socket.clone() }
    }
}

/// Waits until a descriptor is ready; `false` where it is not in time.
fn wait(fd: BorrowedFd<'_>, flags: PollFlags, limit: Duration) -> io::Result<bool> {
    let limit = Timespec::try_from(limit).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut polled = [PollFd::from_borrowed_fd(fd, flags)];
    Ok(rustix::io::retry_on_intr(|| poll(&mut polled, Some(&limit)))? > 0)
}

fn encoded(message: Message<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    bytes
}

impl Drop for Process {
    /// Ends the connection, which others may speak over. A guest whose payload has ended then ends.
    fn drop(&mut self) {
        let _ = self.control.stream().shutdown(Shutdown::Both);
    }
}

/// Has something to read when there may be news that [`Process::news`] has not had yet.
impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.control.stream().as_fd()
    }
}

impl Control {
    /// [`Process::end_input`].
    pub fn end_input(&self) {
        self.0.say(Order::EndInput);
    }
}

/// How the VMM begins to say that the guest has taken a connection; a number and the end of the line follow.
const ACCEPTED: &[u8] = b"OK ";
/// More than its line has.
const LONGEST_ANSWER: usize = 32;
/// Of a guest's.
const LONGEST_MESSAGE: usize = MESSAGE_HEADER_LEN + 2;

/// Reads the line that says that the guest has taken the connection, and not a byte more.
fn expect_accepted(mut stream: &UnixStream) -> io::Result<()> {
    let mut seen = [0; LONGEST_ANSWER];
    // What follows the line is the process's, so it is looked at before it is taken. The VMM writes it at once.
    let (_, count) = recv(stream, &mut seen, RecvFlags::PEEK)?;
    let end = seen[..count].iter().position(|&byte| byte == b'\n').ok_or(io::ErrorKind::InvalidData)?;
    stream.read_exact(&mut seen[..=end])?;
    if seen.starts_with(ACCEPTED) { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}
