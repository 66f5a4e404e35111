//! The agent: the part of init through which the host starts processes in a guest, talks to them and learns how they
//! end.
//!
//! All of it is vsock connections that the host opens to [`PORT`] of the guest. A process has one for its control
//! and one for each of its streams, and each begins with a [`Hello`] that says whose it is. A stream's bytes are the
//! stream: vsock's own flow control is its back-pressure, and the end of a direction is the end of the file. So a
//! reader that stops reading stops one writer and nothing else.
//!
//! Control carries messages, each a kind (one byte), three zeroes and the length of its content (four bytes, little
//! endian), then the content:
//!
//! ```text
//! host to guest:  1 Start (a configuration frame)   2 Signal (its number: u8)   3 Resize (rows: u16, columns: u16)
//! guest to host:  16 Exited (exit status: u8)
//! ```
//! The process of token [`PAYLOAD`] is the one that the configuration frame names: it runs already, and its streams
//! wait to be fetched. When it has ended and its control connection is closed, the guest ends.

use crate::frame::MAX_FRAME;

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
        let role = match role {
            0 => Role::Control,
            1 => Role::Input,
            2 => Role::Output,
            3 => Role::Error,
            _ => return None,
        };
        Some(Self { token: u64::from_le_bytes([a, b, c, d, e, f, g, h]), role })
    }
}

/// Rows and columns of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters on each.
    pub columns: u16,
}

impl TerminalSize {
    /// The bytes.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 4] {
        let ([a, b], [c, d]) = (self.rows.to_le_bytes(), self.columns.to_le_bytes());
        [a, b, c, d]
    }

    /// What the bytes say.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let &[a, b, c, d] = bytes else { return None };
        Some(Self { rows: u16::from_le_bytes([a, b]), columns: u16::from_le_bytes([c, d]) })
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
    /// It ended with this exit status, which is 128 + signal when a signal killed it.
    Exited(u8),
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
            (16, &[status]) => Self::Exited(status),
            _ => return Err(BadMessage),
        };
        Ok(Some((message, MESSAGE_HEADER_LEN + length)))
    }

    /// Writes the message into a byte sink that grows. A frame to start from is at most [`MAX_FRAME`] bytes long.
    pub fn encode<S: Extend<u8>>(&self, sink: &mut S) {
        let mut write = |kind: u8, content: &[u8]| {
            sink.extend([kind, 0, 0, 0]);
            sink.extend(u32::try_from(content.len()).unwrap_or(u32::MAX).to_le_bytes());
            sink.extend(content.iter().copied());
        };
        match self {
            Self::Start(frame) => write(1, frame),
            Self::Signal(number) => write(2, &[*number]),
            Self::Resize(size) => write(3, &size.to_bytes()),
            Self::Exited(status) => write(16, &[*status]),
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
        for message in
            [Message::Start(b"frame"), Message::Signal(15), Message::Resize(size), Message::Exited(7)]
        {
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
        #[test]
        fn any_bytes_split_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(Some((_, length))) = Message::split(&bytes) {
                prop_assert!(length <= bytes.len());
            }
        }
    }
}
