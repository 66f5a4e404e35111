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
    /// Its exit status, where that came before somebody waited for it.
    status: Option<u8>,
}

/// What a guest says of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum News {
    Started,
    Exited { status: u8, was_executed: bool },
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
        Self::open(socket, PAYLOAD, &[], has_terminal)
    }

    /// Starts a process that a configuration frame describes
    /// ([`GuestConfig::to_frame`](crate::config::GuestConfig::to_frame)). `token` is any number but zero that no
    /// other process of this guest was given.
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn start(socket: &Path, token: u64, frame: &[u8], has_terminal: bool) -> Result<Self, AgentError> {
        Self::open(socket, token, &encoded(Message::Start(frame)), has_terminal)
    }

    /// Starts to fetch files from a guest, which come from the process's output in the form of the crate `guest-copy`.
    /// `follows` says whether what a link leads to is meant. The token is as for [`Self::start`].
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn fetch(socket: &Path, token: u64, path: &[u8], follows: bool) -> Result<Self, AgentError> {
        Self::open(socket, token, &encoded(Message::Send { follows, path }), false)
    }

    /// Starts to bring files into a guest: they go to the process's input. `keeps_owners` says whether they become
    /// root's otherwise.
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn bring(socket: &Path, token: u64, path: &[u8], keeps_owners: bool) -> Result<Self, AgentError> {
        Self::open(socket, token, &encoded(Message::Receive { keeps_owners, path }), false)
    }

    fn open(socket: &Path, token: u64, start: &[u8], has_terminal: bool) -> Result<Self, AgentError> {
        // All are asked for before the first answer is waited for.
        let control = ask(socket, Hello { token, role: Role::Control }, start)?;
        let input = ask(socket, Hello { token, role: Role::Input }, &[])?;
        let output = ask(socket, Hello { token, role: Role::Output }, &[])?;
        let error =
            (!has_terminal).then(|| ask(socket, Hello { token, role: Role::Error }, &[])).transpose()?;
        for stream in [&control, &input, &output].into_iter().chain(&error) {
            expect_ok(stream).map_err(|_| AgentError::Refused { path: socket.into() })?;
        }
        Ok(Self { input, output, error, control, status: None })
    }

    /// What sends it signals from elsewhere.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn control(&self) -> io::Result<Control> {
        self.control.try_clone().map(Control)
    }

    /// Waits until its program is executed, or cannot be: whether it was.
    ///
    /// # Errors
    /// When the guest ends first.
    pub fn wait_for_start(&mut self) -> Result<bool, AgentError> {
        self.control.write_all(&encoded(Message::TellStart)).map_err(|_| AgentError::Lost)?;
        match read_news(&self.control)? {
            News::Started => Ok(true),
            News::Exited { status, was_executed } => {
                self.status = Some(status);
                Ok(was_executed)
            }
        }
    }

    /// Its exit status, where the guest has told it before somebody waits for it.
    #[must_use]
    pub const fn status(&self) -> Option<u8> {
        self.status
    }

    /// Waits for its end; its exit status, which is 128 + signal when a signal killed it. What it wrote may still be
    /// on its way.
    ///
    /// # Errors
    /// When the guest ends first.
    pub fn wait(&mut self) -> Result<u8, AgentError> {
        match self.status {
            Some(status) => Ok(status),
            None => match read_news(&self.control)? {
                News::Exited { status, .. } => Ok(status),
                // Nobody asked, or has been told.
                News::Started => Err(AgentError::Lost),
            },
        }
    }
}

fn encoded(message: Message<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    bytes
}

/// Reads one message of a guest's, and not a byte more.
fn read_news(mut control: impl Read) -> Result<News, AgentError> {
    /// None that a guest sends has more.
    const LONGEST: usize = MESSAGE_HEADER_LEN + 2;
    let mut bytes = vec![0; MESSAGE_HEADER_LEN];
    control.read_exact(&mut bytes).map_err(|_| AgentError::Lost)?;
    loop {
        match Message::split(&bytes) {
            Ok(Some((Message::Exited { status, was_executed }, _))) => {
                return Ok(News::Exited { status, was_executed });
            }
            Ok(Some((Message::Started, _))) => return Ok(News::Started),
            Ok(None) if bytes.len() < LONGEST => {}
            Ok(_) | Err(BadMessage) => return Err(AgentError::Lost),
        }
        let mut byte = [0];
        control.read_exact(&mut byte).map_err(|_| AgentError::Lost)?;
        bytes.extend(byte);
    }
}

/// Has something to read when the process has ended, unless [`Process::status`] is known already.
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
        // A guest that is gone does not want to know.
        let _ = (&self.0).write_all(&encoded(message));
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What is left of bytes after one message was read of them.
    fn news(bytes: &[u8]) -> (Option<News>, &[u8]) {
        let mut rest = bytes;
        let news = read_news(&mut rest).ok();
        (news, rest)
    }

    #[test]
    fn news_are_read_one_by_one() {
        let exited = Message::Exited { status: 7, was_executed: true };
        let bytes = [encoded(Message::Started), encoded(exited)].concat();
        let (first, rest) = news(&bytes);
        let (second, rest) = news(rest);
        assert_eq!(
            (first, second, rest),
            (Some(News::Started), Some(News::Exited { status: 7, was_executed: true }), &[][..])
        );
        assert_eq!(news(rest).0, None);
        // Words that only the host has.
        for message in [Message::Start(b""), Message::Signal(9), Message::TellStart] {
            assert_eq!(news(&encoded(message)).0, None, "{message:?}");
        }
    }

    proptest! {
        /// A guest may say anything; nobody reads on without end.
        #[test]
        fn any_guest_is_heard_out(bytes in prop::collection::vec(0_u8..20, 0..64)) {
            let (found, rest) = news(&bytes);
            prop_assert!(bytes.len() - rest.len() <= MESSAGE_HEADER_LEN + 2);
            prop_assert!(found.is_none() || Message::split(&bytes).is_ok());
        }

        #[test]
        fn any_answer_is_read_to_its_line(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let answered = |bytes: &[u8]| {
                let (mut here, mut there) = UnixStream::pair().unwrap();
                there.write_all(bytes).unwrap();
                drop(there);
                let is_ok = expect_ok(&here).is_ok();
                let mut rest = Vec::new();
                here.read_to_end(&mut rest).unwrap();
                (is_ok, rest)
            };
            let (is_ok, rest) = answered(&bytes);
            prop_assert!(bytes.len() - rest.len() <= 32);
            prop_assert!(!is_ok || bytes.starts_with(b"OK "));
            prop_assert_eq!(answered(&[&b"OK 7\n"[..], &bytes].concat()), (true, bytes));
        }
    }
}
