//! The agent: the part of init with which the host starts processes in a guest, exchanges their standard streams and
//! receives their exit statuses.
//!
//! The host opens vsock connections to [`PORT`] of the guest: for each process a control connection, and a connection
//! for each stream that carries data. A connection begins with a [`Hello`], which names the process and the stream. A
//! stream connection carries raw bytes: vsock's flow control provides back-pressure, and shutdown of a direction is
//! EOF. A reader that stops reading therefore blocks one writer and nothing else. Most commands have little output,
//! and a connection costs as much as some ten thousand instructions of theirs. The host therefore connects to an output
//! stream only after [`Message::HasOutput`], and to the input stream only when it has input.
//!
//! The control connection carries messages. A message consists of its kind (one byte), three zeroes, the length of its
//! content (four bytes, little endian) and the content:
//!
//! ```text
//! host to guest:  1 Start (a configuration frame)   2 Signal (its number: u8)   3 Resize (rows: u16, columns: u16)
//!                 4 ReportStart   5 Send (follows: u8, path)   6 Receive (keeps owners: u8, path)   7 EndInput
//!                 8 Freeze (continues: u8)
//! guest to host:  16 Exited (exit status: u8, was executed: u8)   17 Started   18 HasOutput (its role: u8)
//! ```
//! Send and Receive start a process that runs a part of init: Send writes files to its output, Receive creates files
//! from its input, in the format of the crate `guest-copy`. Their standard error is a `guest_copy::Failure` or empty.
//!
//! Freeze makes init freeze all processes, announce [`BootMark::Frozen`](crate::BootMark::Frozen), at which the VMM saves the
//! machine, and request its configuration. If that has a [`Reseed`](crate::config::Reseed), the guest is a copy: init applies
//! it and starts the payload, if there is one. Exited answers a Freeze in a guest that continues: status 0, or 1 if a process
//! could not be frozen.
//!
//! If no HasOutput precedes Exited, the process had no output. EndInput closes an input to which no stream is
//! connected.
//!
//! The process with the token [`PAYLOAD`] is the payload of the configuration frame. It runs already, and its output
//! stays in its pipes until the host connects. The guest ends when the payload has ended and its control connection is
//! closed.

use crate::frame::MAX_FRAME;
pub use crate::terminal::TerminalSize;

/// The guest's vsock port. It is below 1024, so that only root in the guest could bind it (`vsock_bind_connectible` in
/// net/vmw_vsock/af_vsock.c), and init binds it before any other program runs.
pub const PORT: u32 = 1000;

/// The token of the configuration's payload.
pub const PAYLOAD: u64 = 0;

/// Length of a message without its content in bytes.
pub const MESSAGE_HEADER_LEN: usize = 8;

/// Purpose of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// Messages.
    Control = 0,
    /// Standard input.
    Input = 1,
    /// Standard output, or all output of the terminal.
    Output = 2,
    /// Standard error.
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
    /// Identifies the process. The host chooses it.
    pub token: u64,
    /// Purpose of the connection.
    pub role: Role,
}

impl Hello {
    /// Length of an encoded hello in bytes.
    pub const LEN: usize = 12;

    /// Encodes the hello.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let [a, b, c, d, e, f, g, h] = self.token.to_le_bytes();
        [a, b, c, d, e, f, g, h, self.role as u8, 0, 0, 0]
    }

    /// Decodes a hello. Returns `None` if the bytes are invalid.
    #[must_use]
    pub fn from_bytes(bytes: [u8; Self::LEN]) -> Option<Self> {
        let [a, b, c, d, e, f, g, h, role, 0, 0, 0] = bytes else { return None };
        Some(Self { token: u64::from_le_bytes([a, b, c, d, e, f, g, h]), role: Role::from_byte(role)? })
    }
}

/// A message of the control connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// Starts the process that this configuration frame describes.
    Start(&'a [u8]),
    /// Sends this signal to the process.
    Signal(u8),
    /// Resizes the terminal of the process.
    Resize(TerminalSize),
    /// Requests [`Started`](Self::Started).
    ReportStart,
    /// Starts a process that sends a file, link or directory.
    Send {
        /// Whether a symbolic link at the path is followed.
        follows: bool,
        /// Path of the file, link or directory.
        path: &'a [u8],
    },
    /// Starts a process that receives a file, link or directory.
    Receive {
        /// Whether files keep their owners. Otherwise root owns them.
        keeps_owners: bool,
        /// Path of the destination.
        path: &'a [u8],
    },
    /// Closes the input.
    EndInput,
    /// Freezes all processes, for a snapshot.
    Freeze {
        /// Whether the guest continues after it, and keeps its connections. Otherwise they are closed before.
        continues: bool,
    },
    /// The process ended.
    Exited {
        /// Exit status; 128 + signal if a signal killed the process.
        status: u8,
        /// Whether execve succeeded. Otherwise the status is that of a shell: 126 or 127.
        was_executed: bool,
    },
    /// The program of the process was executed (execve succeeded).
    Started,
    /// This output stream has data, and the host has not connected to it.
    HasOutput(Role),
}

/// Bytes that are not a valid message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadMessage;

impl<'a> Message<'a> {
    /// Decodes the message at the start of `bytes`. Returns the message and its length, or `None` if it is incomplete.
    ///
    /// # Errors
    /// When the bytes are not the start of a valid message.
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
            (3, &[a, b, c, d]) => Self::Resize(TerminalSize::from_bytes([a, b, c, d])),
            (4, []) => Self::ReportStart,
            (5, &[follows @ 0..=1, ref path @ ..]) => Self::Send { follows: follows == 1, path },
            (6, &[keeps_owners @ 0..=1, ref path @ ..]) => {
                Self::Receive { keeps_owners: keeps_owners == 1, path }
            }
            (7, []) => Self::EndInput,
            (8, [continues @ (0 | 1)]) => Self::Freeze { continues: *continues == 1 },
            (16, &[status, was_executed @ 0..=1]) => Self::Exited { status, was_executed: was_executed == 1 },
            (17, []) => Self::Started,
            (18, &[role @ 2..=3]) => Self::HasOutput(Role::from_byte(role).ok_or(BadMessage)?),
            _ => return Err(BadMessage),
        };
        Ok(Some((message, MESSAGE_HEADER_LEN + length)))
    }

    /// Appends the encoded message to a sink. The frame of [`Start`](Self::Start) must not be longer than
    /// [`MAX_FRAME`].
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
            Self::ReportStart => write(4, &[], &[]),
            Self::Send { follows, path } => write(5, &[follows.into()], path),
            Self::Receive { keeps_owners, path } => write(6, &[keeps_owners.into()], path),
            Self::EndInput => write(7, &[], &[]),
            Self::Freeze { continues } => write(8, &[u8::from(continues)], &[]),
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
        assert_eq!(Hello::from_bytes([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]), None, "padding must be zero");
    }

    #[test]
    fn messages_survive_and_are_decoded_only_when_complete() {
        let size = TerminalSize { rows: 24, columns: 80 };
        for message in [
            Message::Start(b"frame"),
            Message::Signal(15),
            Message::Resize(size),
            Message::ReportStart,
            Message::Send { follows: true, path: b"/a" },
            Message::Receive { keeps_owners: false, path: b"" },
            Message::EndInput,
            Message::Freeze { continues: false },
            Message::Freeze { continues: true },
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
        /// A decoded message encodes to the same bytes.
        #[test]
        fn any_bytes_split_without_harm(
            kind in 0_u8..20, length in 0_u8..9, content in prop::collection::vec(0_u8..3, 0..16),
        ) {
            let bytes = [&[kind, 0, 0, 0, length, 0, 0, 0], &content[..]].concat();
            if let Ok(Some((message, length))) = Message::split(&bytes) {
                let mut encoded = Vec::new();
                message.encode(&mut encoded);
                prop_assert_eq!(&encoded[..], &bytes[..length]);
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
