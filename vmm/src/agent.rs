//! The host's side of a guest's agent (`guest_protocol::agent`): a process in the guest as a control connection and
//! up to three streams, over the Unix socket that leads to the guest's vsock ports.

pub use guest_protocol::agent::Role;
use guest_protocol::agent::{BadMessage, Hello, MESSAGE_HEADER_LEN, Message, PAYLOAD, PORT, TerminalSize};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
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

/// A process in a guest. To be dropped is to hang up on it.
#[derive(Debug)]
pub struct Process {
    place: Place,
    control: UnixStream,
    /// Whether the guest has taken the control connection.
    is_connected: bool,
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
pub struct Control(UnixStream);

impl Process {
    /// The payload of a guest, which runs already.
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn payload(socket: &Path) -> Result<Self, AgentError> {
        Self::open(socket, PAYLOAD, &[])
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
        let control = place.ask(Role::Control, start)?;
        Ok(Self::at(place, control))
    }

    const fn at(place: Place, control: UnixStream) -> Self {
        Self {
            place,
            control,
            is_connected: false,
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
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn control(&self) -> io::Result<Control> {
        self.control.try_clone().map(Control)
    }

    /// Sends a signal: those of a terminal's keys, and the one for its end, to the process and its foreground
    /// children, others to the process alone.
    pub fn signal(&self, number: u8) {
        tell(&self.control, Message::Signal(number));
    }

    /// Says how large the terminal is now.
    pub fn resize(&self, size: TerminalSize) {
        tell(&self.control, Message::Resize(size));
    }

    /// Says that it has no input, or no more where none has been connected.
    pub fn end_input(&self) {
        tell(&self.control, Message::EndInput);
    }

    /// Asks for [`News::Started`]; where the program cannot be executed, [`News::Exited`] comes instead.
    pub fn ask_for_start(&self) {
        tell(&self.control, Message::TellStart);
    }

    /// What came next, if something did: does not wait.
    ///
    /// # Errors
    /// When the guest has ended, or says what it may not.
    pub fn news(&mut self) -> Result<Option<News>, AgentError> {
        /// More than a guest has to say of a process.
        const ENOUGH: usize = 256;
        loop {
            if let Some(news) = self.news.pop_front() {
                return Ok(Some(news));
            }
            let mut bytes = [0; ENOUGH];
            match recv(&self.control, &mut bytes, RecvFlags::DONTWAIT) {
                Ok((_, count @ 1..)) => self.received.extend_from_slice(&bytes[..count]),
                Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
                Ok(_) | Err(_) => return Err(self.lost()),
            }
            self.understand()?;
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

    /// Waits for what comes next.
    ///
    /// # Errors
    /// When the guest has ended, or says what it may not.
    pub fn wait_for_news(&mut self) -> Result<News, AgentError> {
        loop {
            if let Some(news) = self.news()? {
                return Ok(news);
            }
            let mut polled = [PollFd::new(&self.control, PollFlags::IN)];
            rustix::io::retry_on_intr(|| poll(&mut polled, None)).map_err(|_| AgentError::Lost)?;
        }
    }
}

impl Place {
    /// Connects to a stream of the process, and waits until the guest has taken the connection. Shutting down the
    /// writing half of the input is its end.
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn connect(&self, role: Role) -> Result<UnixStream, AgentError> {
        let stream = self.ask(role, &[])?;
        expect_accepted(&stream).map_err(|_| AgentError::Refused { path: self.socket.clone() })?;
        Ok(stream)
    }

    /// Asks for a connection to the agent's port, in Firecracker's words, and says at once what it is for.
    fn ask(&self, role: Role, more: &[u8]) -> Result<UnixStream, AgentError> {
        let failed = |source| AgentError::Connect { path: self.socket.clone(), source };
        let mut stream = UnixStream::connect(&self.socket).map_err(failed)?;
        let hello = Hello { token: self.token, role };
        let request = [format!("CONNECT {PORT}\n").as_bytes(), &hello.to_bytes(), more].concat();
        stream.write_all(&request).map_err(failed)?;
        Ok(stream)
    }
}

fn encoded(message: Message<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    bytes
}

fn tell(mut control: &UnixStream, message: Message<'_>) {
    // A guest that is gone does not want to know.
    let _ = control.write_all(&encoded(message));
}

impl Drop for Process {
    /// Ends the connection, which others may speak over. A guest whose payload has ended then ends.
    fn drop(&mut self) {
        let _ = self.control.shutdown(Shutdown::Both);
    }
}

/// Has something to read when there may be news that [`Process::news`] has not had yet.
impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }
}

impl Control {
    /// [`Process::end_input`].
    pub fn end_input(&self) {
        tell(&self.0, Message::EndInput);
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a process says in pieces, and whether that ended in an error.
    fn news<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<News>, bool) {
        let (here, mut there) = UnixStream::pair().unwrap();
        let place = Place { socket: PathBuf::new(), token: 1 };
        let mut process = Process::at(place, here);
        let mut seen = Vec::new();
        for piece in pieces {
            there.write_all(piece).unwrap();
            loop {
                match process.news() {
                    Ok(Some(news)) => seen.push(news),
                    Ok(None) => break,
                    Err(_) => return (seen, true),
                }
            }
        }
        (seen, false)
    }

    #[test]
    fn news_come_whole_in_whatever_pieces() {
        let exited = Message::Exited { status: 7, was_executed: true };
        let messages = [Message::Started, Message::HasOutput(Role::Error), exited].map(encoded).concat();
        let bytes = [b"OK 1073741824\n", &messages[..]].concat();
        let expected =
            [News::Started, News::HasOutput(Role::Error), News::Exited { status: 7, was_executed: true }];
        for length in 1..=bytes.len() {
            assert_eq!(news(bytes.chunks(length)), (expected.to_vec(), false), "{length}");
        }
    }

    #[test]
    fn words_that_only_the_host_has_are_none_of_a_guests() {
        for message in [Message::Start(b""), Message::Signal(9), Message::TellStart, Message::EndInput] {
            assert_eq!(news([&b"OK 1\n"[..], &encoded(message)]), (Vec::new(), true), "{message:?}");
        }
        // A message that would never end.
        assert!(news([&b"OK 1\n"[..], &[1, 0, 0, 0, 0, 1, 0, 0], &[0; 64]]).1);
        assert!(news([&b"OK, no\n"[..]]).1);
        // What it has said already.
        let started = encoded(Message::Started);
        assert_eq!(news([&b"OK 1\n"[..], &started, &started]), (vec![News::Started], true));
        assert!(news([&[b'1'; LONGEST_ANSWER][..]]).1);
    }

    #[test]
    fn news_that_were_put_back_come_first() {
        let (here, mut there) = UnixStream::pair().unwrap();
        let place = Place { socket: PathBuf::new(), token: 1 };
        let mut process = Process::at(place, here);
        there.write_all(b"OK 1\n").unwrap();
        there.write_all(&encoded(Message::Started)).unwrap();
        assert_eq!(process.wait_for_news().unwrap(), News::Started);
        there.write_all(&encoded(Message::HasOutput(Role::Error))).unwrap();
        process.put_back([News::HasOutput(Role::Output), News::Started]);
        for expected in [News::HasOutput(Role::Output), News::Started, News::HasOutput(Role::Error)] {
            assert_eq!(process.wait_for_news().unwrap(), expected);
        }
        drop(there);
        assert!(process.wait_for_news().is_err());
    }

    proptest! {
        /// A guest may say anything.
        #[test]
        fn any_guest_is_heard(pieces in prop::collection::vec(prop::collection::vec(0_u8..20, 1..64), 0..4)) {
            let pieces = pieces.iter().map(Vec::as_slice);
            let bytes = pieces.clone().collect::<Vec<_>>().concat();
            let (seen, is_error) = news([&b"OK 1\n"[..]].into_iter().chain(pieces));
            prop_assert!(seen.len() * MESSAGE_HEADER_LEN <= bytes.len());
            prop_assert!(is_error || Message::split(&bytes).is_ok());
        }

        #[test]
        fn any_answer_is_read_to_its_line(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let answered = |bytes: &[u8]| {
                let (mut here, mut there) = UnixStream::pair().unwrap();
                there.write_all(bytes).unwrap();
                drop(there);
                let is_ok = expect_accepted(&here).is_ok();
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
