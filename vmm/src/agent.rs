//! The host's side of a guest's agent (`guest_protocol::agent`): a process in the guest as three streams and a
//! control connection, over the Unix socket that leads to the guest's vsock ports.

use guest_protocol::agent::{
    BadMessage, Hello, MESSAGE_HEADER_LEN, Message, PAYLOAD, PORT, Role, TerminalSize,
};
use rustix::net::{RecvFlags, recv};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

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
    /// The connection ended before the process did.
    #[error("the guest ended, or its agent hung up, before the process had ended")]
    Lost,
}

/// A process in a guest.
#[derive(Debug)]
pub struct Process {
    /// What the process reads; shutting down its writing half is the end of its input.
    pub input: UnixStream,
    /// What the process writes, or its terminal says.
    pub output: UnixStream,
    /// What the process writes to standard error; none where it has a terminal.
    pub error: Option<UnixStream>,
    control: UnixStream,
}

/// Sends a process signals and sizes of its terminal.
#[derive(Debug)]
pub struct Control(UnixStream);

impl Process {
    /// The payload of a guest, which runs already. `has_terminal` says whether it has one.
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn payload(socket: &Path, has_terminal: bool) -> Result<Self, AgentError> {
        Self::open(socket, PAYLOAD, None, has_terminal)
    }

    /// Starts a process that a configuration frame describes
    /// ([`GuestConfig::to_frame`](crate::config::GuestConfig::to_frame)). `token` is any number but zero that no
    /// other process of this guest was given.
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn start(socket: &Path, token: u64, frame: &[u8], has_terminal: bool) -> Result<Self, AgentError> {
        Self::open(socket, token, Some(frame), has_terminal)
    }

    fn open(socket: &Path, token: u64, frame: Option<&[u8]>, has_terminal: bool) -> Result<Self, AgentError> {
        let mut start = Vec::new();
        if let Some(frame) = frame {
            Message::Start(frame).encode(&mut start);
        }
        // All are asked for before the first answer is waited for.
        let control = ask(socket, Hello { token, role: Role::Control }, &start)?;
        let input = ask(socket, Hello { token, role: Role::Input }, &[])?;
        let output = ask(socket, Hello { token, role: Role::Output }, &[])?;
        let error =
            (!has_terminal).then(|| ask(socket, Hello { token, role: Role::Error }, &[])).transpose()?;
        for stream in [&control, &input, &output].into_iter().chain(&error) {
            expect_ok(stream).map_err(|_| AgentError::Refused { path: socket.into() })?;
        }
        Ok(Self { input, output, error, control })
    }

    /// What sends it signals from elsewhere.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn control(&self) -> io::Result<Control> {
        self.control.try_clone().map(Control)
    }

    /// Waits for its end; its exit status, which is 128 + signal when a signal killed it. What it wrote may still be
    /// on its way.
    ///
    /// # Errors
    /// When the guest ends first.
    pub fn wait(&mut self) -> Result<u8, AgentError> {
        let mut bytes = Vec::new();
        loop {
            match Message::split(&bytes) {
                Ok(Some((Message::Exited(code), _))) => return Ok(code),
                Ok(None) if bytes.len() <= MESSAGE_HEADER_LEN => {}
                Ok(_) | Err(BadMessage) => return Err(AgentError::Lost),
            }
            let mut byte = [0];
            self.control.read_exact(&mut byte).map_err(|_| AgentError::Lost)?;
            bytes.extend(byte);
        }
    }
}

/// Has something to read when the process has ended.
impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }
}

impl Control {
    /// Sends a signal: those of a terminal's keys, and the one for its end, to the process and its foreground
    /// children, others to the process alone.
    pub fn signal(&self, number: u8) {
        self.send(Message::Signal(number));
    }

    /// Says how large the terminal is now.
    pub fn resize(&self, size: TerminalSize) {
        self.send(Message::Resize(size));
    }

    fn send(&self, message: Message<'_>) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        // A guest that is gone does not want to know.
        let _ = (&self.0).write_all(&bytes);
    }

    /// Ends the connection. A guest whose payload has ended then ends.
    pub fn close(&self) {
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

/// Asks for a connection to the agent's port, in Firecracker's words, and says at once what it is for.
fn ask(socket: &Path, hello: Hello, more: &[u8]) -> Result<UnixStream, AgentError> {
    let failed = |source| AgentError::Connect { path: socket.into(), source };
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    let request = [format!("CONNECT {PORT}\n").as_bytes(), &hello.to_bytes(), more].concat();
    stream.write_all(&request).map_err(failed)?;
    Ok(stream)
}

/// Reads the line that says that the guest has taken the connection, and not a byte more.
fn expect_ok(mut stream: &UnixStream) -> io::Result<()> {
    const LONGEST: usize = 32;
    let mut seen = [0; LONGEST];
    // What follows the line is the process's, so it is looked at before it is taken. The VMM writes it at once.
    let (_, count) = recv(stream, &mut seen, RecvFlags::PEEK)?;
    let end = seen[..count].iter().position(|&byte| byte == b'\n').ok_or(io::ErrorKind::InvalidData)?;
    stream.read_exact(&mut seen[..=end])?;
    if seen.starts_with(b"OK ") { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}
