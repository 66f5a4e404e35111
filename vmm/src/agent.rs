//! The host's side of the agent protocol (`guest_protocol::agent`): each process in a guest has a control connection
//! and up to three stream connections, over the Unix socket of the guest's vsock device.

mod sender;
#[cfg(test)]
mod tests;

pub use guest_protocol::agent::Role;
use guest_protocol::agent::{BadMessage, Hello, MESSAGE_HEADER_LEN, Message, PAYLOAD, PORT, TerminalSize};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, socket_with,
};
use sender::{HostMessage, Sender};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time limit for actions of the agent that do not depend on a program: accepting a connection, receiving the
/// description of a process, and reporting the exit of a process whose streams have ended.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// An error of the connection to a guest's agent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The host returned an error for the Unix socket of the guest.
    #[error("cannot connect to the guest over {}", path.display())]
    Connect {
        /// The Unix socket of the guest's vsock.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The host returned an error for something else that the connection takes.
    #[error("cannot {what}")]
    Host {
        /// What was to be done.
        what: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// No agent accepts connections in the guest.
    #[error("the guest behind {} has no agent, or is not ready", path.display())]
    Refused {
        /// The Unix socket of the guest's vsock.
        path: PathBuf,
    },
    /// The agent did not respond within [`ANSWER_TIMEOUT`].
    #[error(
        "the guest behind {} does not answer; it hangs, or has no processor time. `kindling rm --force` ends it",
        path.display()
    )]
    Silent {
        /// The Unix socket of the guest's vsock.
        path: PathBuf,
    },
    /// The connection closed before the process ended.
    #[error("the guest ended, or its agent closed the connection, before the process had ended")]
    Lost,
}

/// A process in a guest. Dropping it closes the control connection.
#[derive(Debug)]
pub struct Process {
    address: ProcessAddress,
    control: Arc<Sender>,
    /// Whether the guest has accepted the control connection.
    is_connected: bool,
    /// Time limit for accepting the connection and receiving the message that starts the process. `None` for a payload
    /// that runs already.
    deadline: Option<Instant>,
    /// Received bytes that are not a complete message yet.
    received: Vec<u8>,
    /// Decoded events that the caller has not taken yet.
    events: VecDeque<ProcessEvent>,
    /// Which events were received, by [`ProcessEvent::number`].
    was_received: [bool; 4],
}

/// The address of a process, for connections to its streams.
#[derive(Clone, Debug)]
pub struct ProcessAddress {
    socket: PathBuf,
    token: u64,
}

/// An event of a process, reported by the guest's agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessEvent {
    /// The program was executed (execve succeeded). Sent after [`Process::request_start_event`] only.
    Started,
    /// Standard output or standard error has data, and the host has not connected to the stream.
    HasOutput(Role),
    /// The process ended. Data of connected streams may still arrive. A stream without an earlier
    /// [`HasOutput`](Self::HasOutput) is empty.
    Exited {
        /// Exit status; 128 + signal if a signal killed the process.
        status: u8,
        /// Whether the program was executed. Otherwise the status is that of a shell: 126 or 127.
        was_executed: bool,
    },
}

impl ProcessEvent {
    const fn number(self) -> usize {
        match self {
            Self::Started => 0,
            Self::HasOutput(Role::Output) => 1,
            Self::HasOutput(_) => 2,
            Self::Exited { .. } => 3,
        }
    }
}

/// A handle to the control connection of a process, for other threads.
#[derive(Debug)]
pub struct Control(Arc<Sender>);

impl Process {
    /// Connects to the payload of a guest, which runs already.
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn payload(socket: &Path) -> Result<Self, AgentError> {
        Self::open(socket, PAYLOAD, &[])
    }

    /// Starts the payload of a guest that was started without one. The guest ends with it.
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn start_payload(socket: &Path, frame: &[u8]) -> Result<Self, AgentError> {
        Self::open(socket, PAYLOAD, &encoded(Message::Start(frame)))
    }

    /// Starts the process that a configuration frame describes
    /// ([`GuestConfig::to_frame`](crate::config::GuestConfig::to_frame)). `token` identifies the process: any number
    /// except zero that no other process of this guest has.
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn start(socket: &Path, token: u64, frame: &[u8]) -> Result<Self, AgentError> {
        Self::open(socket, token, &encoded(Message::Start(frame)))
    }

    /// Starts a process that sends the file or directory at `path` to its output, in the format of the crate
    /// `guest-copy`. With `follows`, a symbolic link at the path is followed. The token is that of [`Self::start`].
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn copy_out(socket: &Path, token: u64, path: &[u8], follows: bool) -> Result<Self, AgentError> {
        Self::open(socket, token, &encoded(Message::Send { follows, path }))
    }

    /// Starts a process that creates files at `path` from its input, in the format of the crate `guest-copy`. Files keep
    /// their owners with `keeps_owners`, and belong to root without. The token is that of [`Self::start`].
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn copy_in(socket: &Path, token: u64, path: &[u8], keeps_owners: bool) -> Result<Self, AgentError> {
        Self::open(socket, token, &encoded(Message::Receive { keeps_owners, path }))
    }

    /// Requests that the agent freezes all processes for a snapshot ([`crate::control::Monitor::start_for_snapshot`]). The machine
    /// ends with the snapshot; [`ProcessEvent::Exited`] reports that a process could not be frozen. The token is that of
    /// [`Self::start`].
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn freeze(socket: &Path, token: u64, continues: bool) -> Result<Self, AgentError> {
        Self::open(socket, token, &encoded(Message::Freeze { continues }))
    }

    fn open(socket: &Path, token: u64, start: &[u8]) -> Result<Self, AgentError> {
        let address = ProcessAddress { socket: socket.into(), token };
        // The line with which the guest accepts the connection is read together with the first events.
        let control = address.dial()?;
        let limit = (!start.is_empty()).then_some(ANSWER_TIMEOUT);
        let first = [&address.request(Role::Control)[..], start].concat();
        Ok(Self::with(address, Sender::new(control, first), limit))
    }

    /// A process with this control connection. The first bytes that the sender holds must be sent within `limit`.
    fn with(address: ProcessAddress, control: Sender, limit: Option<Duration>) -> Self {
        control.flush();
        Self {
            address,
            control: Arc::new(control),
            is_connected: false,
            deadline: limit.map(|limit| Instant::now() + limit),
            received: Vec::new(),
            events: VecDeque::new(),
            was_received: [false; 4],
        }
    }

    /// Returns the address of the process, for connections to its streams.
    #[must_use]
    pub const fn address(&self) -> &ProcessAddress {
        &self.address
    }

    /// Returns a handle to the control connection, for another thread.
    #[must_use]
    pub fn control(&self) -> Control {
        Control(Arc::clone(&self.control))
    }

    /// Returns the events for which to poll the descriptor, and the time until which to wait, before the next call of
    /// [`Self::poll_event`]. Messages for a guest that does not read them are queued; no call blocks.
    #[must_use]
    pub fn poll_interest(&self) -> (PollFlags, Option<Duration>) {
        let output = if self.control.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
        let remaining = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        (PollFlags::IN | output, remaining)
    }

    /// Sends a signal. SIGINT, SIGQUIT and SIGHUP go to the process group, as from a terminal; other signals go to the
    /// process only.
    pub fn signal(&self, number: u8) {
        self.control.send(HostMessage::Signal(number));
    }

    /// Resizes the terminal of the process.
    pub fn resize(&self, size: TerminalSize) {
        self.control.send(HostMessage::Resize(size));
    }

    /// Closes the input of the process, if no stream is connected to it.
    pub fn end_input(&self) {
        self.control.send(HostMessage::EndInput);
    }

    /// Requests [`ProcessEvent::Started`]. If the program cannot be executed, [`ProcessEvent::Exited`] follows instead.
    pub fn request_start_event(&self) {
        self.control.send(HostMessage::ReportStart);
    }

    /// Returns the next event, if one has arrived, and continues to send queued messages. Does not block.
    ///
    /// # Errors
    /// When the guest has ended, sends an invalid message, or did not accept the process in time.
    pub fn poll_event(&mut self) -> Result<Option<ProcessEvent>, AgentError> {
        /// Bytes per read: more than all events of a process.
        const BUFFER_LEN: usize = 256;
        self.control.flush();
        loop {
            if self.is_connected && self.control.is_empty() {
                self.deadline = None;
            }
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            let mut bytes = [0; BUFFER_LEN];
            match recv(self.control.stream(), &mut bytes, RecvFlags::DONTWAIT) {
                Ok((_, count @ 1..)) => self.received.extend_from_slice(&bytes[..count]),
                Err(Errno::AGAIN | Errno::INTR) => return self.check_deadline().map(|()| None),
                Ok(_) | Err(_) => return Err(self.lost()),
            }
            self.decode()?;
        }
    }

    fn check_deadline(&self) -> Result<(), AgentError> {
        match self.deadline {
            Some(deadline) if deadline <= Instant::now() => Err(self.address.silent()),
            _ => Ok(()),
        }
    }

    /// Decodes the complete messages among the received bytes into events.
    fn decode(&mut self) -> Result<(), AgentError> {
        let mut rest = &self.received[..];
        if !self.is_connected {
            let Some(end) = rest.iter().take(MAX_ACCEPT_LINE_LEN).position(|&byte| byte == b'\n') else {
                return if rest.len() < MAX_ACCEPT_LINE_LEN { Ok(()) } else { Err(self.lost()) };
            };
            if !rest.starts_with(ACCEPTED) {
                return Err(self.lost());
            }
            self.is_connected = true;
            rest = &rest[end + 1..];
        }
        while let Some((message, length)) = Message::split(rest).map_err(|BadMessage| AgentError::Lost)? {
            let event = match message {
                Message::Started => ProcessEvent::Started,
                Message::HasOutput(role) => ProcessEvent::HasOutput(role),
                Message::Exited { status, was_executed } => ProcessEvent::Exited { status, was_executed },
                _ => return Err(AgentError::Lost),
            };
            // A guest that repeats an event could make the host repeat work without end.
            if std::mem::replace(&mut self.was_received[event.number()], true) {
                return Err(AgentError::Lost);
            }
            self.events.push_back(event);
            rest = &rest[length..];
        }
        // A longer message is not one of a guest's.
        if rest.len() > MAX_MESSAGE_LEN {
            return Err(AgentError::Lost);
        }
        self.received = rest.to_vec();
        Ok(())
    }

    fn lost(&self) -> AgentError {
        match self.is_connected {
            true => AgentError::Lost,
            false => AgentError::Refused { path: self.address.socket.clone() },
        }
    }

    /// Inserts events before all that have not been taken yet.
    pub fn requeue(&mut self, events: impl IntoIterator<Item = ProcessEvent>) {
        let later = std::mem::replace(&mut self.events, events.into_iter().collect());
        self.events.extend(later);
    }

    /// Waits for the next event, for up to [`ANSWER_TIMEOUT`]. For processes that have no reason to run for longer.
    ///
    /// # Errors
    /// When the guest has ended, sends an invalid message, or does not respond.
    pub fn wait_for_event(&mut self) -> Result<ProcessEvent, AgentError> {
        let until = Instant::now() + ANSWER_TIMEOUT;
        loop {
            if let Some(event) = self.poll_event()? {
                return Ok(event);
            }
            let remaining = until.saturating_duration_since(Instant::now());
            if !wait(self.as_fd(), self.poll_interest().0, remaining).map_err(|_| AgentError::Lost)? {
                return Err(self.address.silent());
            }
        }
    }
}

impl ProcessAddress {
    /// Connects to a stream of the process, and waits until the guest has accepted the connection. Shutting down the
    /// write half of the input's connection is EOF for the process.
    ///
    /// # Errors
    /// When the agent cannot be reached, or does not respond.
    pub fn connect(&self, role: Role) -> Result<UnixStream, AgentError> {
        self.connect_within(role, ANSWER_TIMEOUT)
    }

    fn connect_within(&self, role: Role, limit: Duration) -> Result<UnixStream, AgentError> {
        let failed = |source| AgentError::Connect { path: self.socket.clone(), source };
        let mut stream = self.dial()?;
        // The request is short and fits in the socket buffer.
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
            // Without a timeout, connect(2) blocks while the listener's backlog is full.
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

    /// The request for a connection to the agent's port (Firecracker's vsock protocol), and the hello of the agent's
    /// protocol.
    fn request(&self, role: Role) -> Vec<u8> {
        let hello = Hello { token: self.token, role };
        [format!("CONNECT {PORT}\n").as_bytes(), &hello.to_bytes()].concat()
    }

    /// Returns the error for an agent that does not respond.
    #[must_use]
    pub fn silent(&self) -> AgentError {
        AgentError::Silent { path: self.socket.clone() }
    }
}

/// Waits until a descriptor is ready. Returns `false` after the time limit.
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
    /// Shuts the connection down, for its other handles too. A guest whose payload has ended then ends.
    fn drop(&mut self) {
        let _ = self.control.stream().shutdown(Shutdown::Both);
    }
}

/// Readable when [`Process::poll_event`] may return an event.
impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.control.stream().as_fd()
    }
}

impl Control {
    /// [`Process::end_input`].
    pub fn end_input(&self) {
        self.0.send(HostMessage::EndInput);
    }
}

/// Start of the line with which the VMM reports that the guest has accepted a connection. A port number follows.
const ACCEPTED: &[u8] = b"OK ";
/// Upper bound of that line's length in bytes.
const MAX_ACCEPT_LINE_LEN: usize = 32;
/// Length of a guest's longest message in bytes.
const MAX_MESSAGE_LEN: usize = MESSAGE_HEADER_LEN + 2;

/// Reads the line with which the guest's acceptance is reported, and nothing after it.
fn expect_accepted(mut stream: &UnixStream) -> io::Result<()> {
    let mut line = [0; MAX_ACCEPT_LINE_LEN];
    // The bytes after the line are the process's data, so the length of the line is determined with MSG_PEEK. The VMM
    // writes the line with one call.
    let (_, count) = recv(stream, &mut line, RecvFlags::PEEK)?;
    let end = line[..count].iter().position(|&byte| byte == b'\n').ok_or(io::ErrorKind::InvalidData)?;
    stream.read_exact(&mut line[..=end])?;
    if line.starts_with(ACCEPTED) { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}
