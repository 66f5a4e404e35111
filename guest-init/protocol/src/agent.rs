//! The agent: the part of init through which the host starts processes in a guest, talks to them and learns how they
//! end.
//!
//! All of it is vsock connections that the host opens to [`PORT`] of the guest. A process has one for its control
//! and one for each stream that carries something, and each begins with a [`Hello`] that says whose it is. A stream's
//! bytes are the stream: vsock's own flow control is its back-pressure, and the end of a direction is the end of the
//! file. So a reader that stops reading stops one writer and nothing else. Most commands say little, and a connection
//! takes as long as some ten thousand instructions of theirs: the host comes for output when it is told that there is
//! some, and for input when it has some.
//!
//! Control carries messages, each a kind (one byte), three zeroes and the length of its content (four bytes, little
//! endian), then the content:
//!
//! ```text
//! host to guest:  1 Start (a configuration frame)   2 Signal (its number: u8)   3 Resize (rows: u16, columns: u16)
//!                 4 TellStart   5 Send (follows: u8, path)   6 Receive (keeps owners: u8, path)   7 EndInput
//! guest to host:  16 Exited (exit status: u8, was executed: u8)   17 Started   18 HasOutput (its role: u8)
//! ```
//! Send and Receive start a process that is a part of init: one writes files to its output, the other makes files of
//! its input, in the form of the crate `guest-copy`. Their standard error is a `guest_copy::Failure` or nothing.
//!
//! Whoever was not told of output until Exited has missed none. EndInput is for an input that nobody connected to.
//!
//! The process of token [`PAYLOAD`] is the one that the configuration frame names: it runs already, and its streams
//! wait to be fetched. When it has ended and its control connection is closed, the guest ends.

use crate::frame::MAX_FRAME;
pub use crate::terminal::TerminalSize;

/// The guest's vsock port. Below 1024, so that only root in the guest could take it (`vsock_bind_connectible` in
/// net/vmw_vsock/af_vsock.c), which comes too late.
pub const PORT: u32 = 1000;

/// The token of the configuration's payload.
pub const PAYLOAD: u64 = 0;

/// Bytes of a message in front of its content.
pub const MESSAGE_HEADER_LEN: usize = 8;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// Messages.
    Control = 0,
    /// What the process reads.
    Input = 1,
    /// What it writes, or all that its terminal says.
    Output = 2,
    /// What it writes to standard error.
    Error = 3,
}

impl Role {
    const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Control),
            1 => Some(Self::Input),
            2 => Some(Self::Output),
            3 => Some(Self::Error),
            _ => None,
        }
    }
}

/// The first bytes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Which process; the host chooses it.
    pub token: u64,
    /// What the connection is for.
    pub role: Role,
}

impl Hello {
    /// Bytes of a hello.
    pub const LEN: usize = 12;

    /// The bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let [a, b, c, d, e, f, g, h] = self.token.to_le_bytes();
        [a, b, c, d, e, f, g, h, self.role as u8, 0, 0, 0]
    }

    /// What the bytes say, if they are a hello.
    #[must_use]
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Option<Self> {
        let [a, b, c, d, e, f, g, h, role, 0, 0, 0] = bytes else { return None };
        Some(Self { token: u64::from_le_bytes([a, b, c, d, e, f, g, h]), role: Role::from_byte(role)? })
    }
}

/// A message of the control connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// Start the process that this configuration frame describes.
    Start(&'a [u8]),
    /// Send the process this signal.
    Signal(u8),
    /// Its terminal has another size.
    Resize(TerminalSize),
    /// Say when its program is executed.
    TellStart,
    /// Start to send this file, link or directory.
    Send {
        /// Whether it is what a link leads to rather than the link.
        follows: bool,
        /// Its path.
        path: &'a [u8],
    },
    /// Start to receive a file, link or directory.
    Receive {
        /// Whether things keep their owners, instead of becoming root's.
        keeps_owners: bool,
        /// Where it goes.
        path: &'a [u8],
    },
    /// There is no input, or no more.
    EndInput,
    /// It ended.
    Exited {
        /// Its exit status, which is 128 + signal when a signal killed it.
        status: u8,
        /// Whether its program was executed; else the status says why not.
        was_executed: bool,
    },
    /// Its program is executed.
    Started,
    /// There is something to read in this stream of output, to which nobody has connected.
    HasOutput(Role),
}

/// Bytes that are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadMessage;

impl<'a> Message<'a> {
    /// The message at the start of `bytes` and how many bytes it has, or `None` while it is not whole.
    ///
    /// # Errors
    /// When no message starts so.
    pub fn split(bytes: &'a [u8]) -> Result<Option<(Self, usize)>, BadMessage> {
        let Some((header, rest)) = bytes.split_at_checked(MESSAGE_HEADER_LEN) else { return Ok(None) };
        let &[kind, 0, 0, 0, a, b, c, d] = header else { return Err(BadMessage) };
        let length = usize::try_from(u32::from_le_bytes([a, b, c, d])).map_err(|_| BadMessage)?;
        if length > MAX_FRAME {
            return Err(BadMessage);
        }
        let Some(content) = rest.get(..length) else { return Ok(None) };
        let message = match (kind, content) {
            (1, frame) => Self::Start(frame),
            (2, &[number]) => Self::Signal(number),
            (3, size) => Self::Resize(TerminalSize::from_bytes(size).ok_or(BadMessage)?),
            (4, []) => Self::TellStart,
            (5, &[follows @ 0..=1, ref path @ ..]) => Self::Send { follows: follows == 1, path },
            (6, &[keeps_owners @ 0..=1, ref path @ ..]) => {
                Self::Receive { keeps_owners: keeps_owners == 1, path }
            }
            (7, []) => Self::EndInput,
            (16, &[status, was_executed @ 0..=1]) => Self::Exited { status, was_executed: was_executed == 1 },
            (17, []) => Self::Started,
            (18, &[role @ 2..=3]) => Self::HasOutput(Role::from_byte(role).ok_or(BadMessage)?),
            _ => return Err(BadMessage),
        };
        Ok(Some((message, MESSAGE_HEADER_LEN + length)))
    }

    /// Writes the message into a byte sink that grows. A frame to start from is at most [`MAX_FRAME`] bytes long.
    pub fn encode<S: Extend<u8>>(&self, sink: &mut S) {
        let mut write = |kind: u8, first: &[u8], rest: &[u8]| {
            sink.extend([kind, 0, 0, 0]);
            sink.extend(u32::try_from(first.len() + rest.len()).unwrap_or(u32::MAX).to_le_bytes());
            sink.extend(first.iter().chain(rest).copied());
        };
        match *self {
            Self::Start(frame) => write(1, frame, &[]),
            Self::Signal(number) => write(2, &[number], &[]),
            Self::Resize(size) => write(3, &size.to_bytes(), &[]),
            Self::TellStart => write(4, &[], &[]),
            Self::Send { follows, path } => write(5, &[follows.into()], path),
            Self::Receive { keeps_owners, path } => write(6, &[keeps_owners.into()], path),
            Self::EndInput => write(7, &[], &[]),
            Self::Exited { status, was_executed } => write(16, &[status, was_executed.into()], &[]),
            Self::Started => write(17, &[], &[]),
            Self::HasOutput(role) => write(18, &[role as u8], &[]),
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    #[test]
    fn a_hello_survives() {
        for role in [Role::Control, Role::Input, Role::Output, Role::Error] {
            let hello = Hello { token: 0x0102_0304_0506_0708, role };
            assert_eq!(Hello::from_bytes(hello.to_bytes()), Some(hello));
        }
        assert_eq!(Hello::from_bytes([0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0]), None, "no such role");
        assert_eq!(Hello::from_bytes([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]), None, "zeroes are zeroes");
    }

    #[test]
    fn messages_survive_and_come_whole_or_not_at_all() {
        let size = TerminalSize { rows: 24, columns: 80 };
        for message in [
            Message::Start(b"frame"),
            Message::Signal(15),
            Message::Resize(size),
            Message::TellStart,
            Message::Send { follows: true, path: b"/a" },
            Message::Receive { keeps_owners: false, path: b"" },
            Message::EndInput,
            Message::Exited { status: 7, was_executed: true },
            Message::Started,
            Message::HasOutput(Role::Output),
            Message::HasOutput(Role::Error),
        ] {
            let mut bytes = Vec::new();
            message.encode(&mut bytes);
            let length = bytes.len();
            for part in 0..length {
                assert_eq!(Message::split(&bytes[..part]), Ok(None), "{part} of {message:?}");
            }
            bytes.push(99);
            assert_eq!(Message::split(&bytes), Ok(Some((message, length))));
        }
    }

    #[test]
    fn a_length_is_bounded() {
        let mut bytes = [1, 0, 0, 0, 0, 0, 0, 0];
        bytes[4..].copy_from_slice(&u32::try_from(MAX_FRAME + 1).unwrap().to_le_bytes());
        assert_eq!(Message::split(&bytes), Err(BadMessage));
    }

    proptest! {
        /// Bytes that are a message are the bytes of that message.
        #[test]
        fn any_bytes_split_without_harm(
            kind in 0_u8..20, length in 0_u8..9, content in prop::collection::vec(0_u8..3, 0..16),
        ) {
            let bytes = [&[kind, 0, 0, 0, length, 0, 0, 0], &content[..]].concat();
            if let Ok(Some((message, length))) = Message::split(&bytes) {
                let mut again = Vec::new();
                message.encode(&mut again);
                prop_assert_eq!(&again[..], &bytes[..length]);
            }
        }

        #[test]
        fn any_hello_survives(bytes in any::<[u8; Hello::LEN]>()) {
            if let Some(hello) = Hello::from_bytes(bytes) {
                prop_assert_eq!(hello.to_bytes(), bytes);
            }
        }
    }
}
