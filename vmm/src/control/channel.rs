//! Frames with descriptors over a Unix stream socket: the length in four bytes, little endian, then the value. The
//! descriptors are attached to the first byte (SCM_RIGHTS, unix(7)).

use crate::poll::wait_readable;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, send, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Maximum number of descriptors of a frame: two for each of the maximum number of devices, and those of the machine.
const MAX_DESCRIPTORS: usize = 64;
/// Size in bytes of a frame's length field.
const HEADER_LEN: usize = 4;

/// Errors of the communication between a front and its monitor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The socket failed.
    #[error("the socket between kindling and kindling-vmm failed")]
    Socket(#[from] io::Error),
    /// The file of a snapshot cannot be written.
    #[error("cannot write the snapshot")]
    File(#[source] io::Error),
    /// The other end has closed the socket.
    #[error("kindling-vmm exited unexpectedly")]
    Disconnected,
    /// A signal killed the monitor.
    #[error("kindling-vmm was killed by signal {0}{hint}", hint = signal_hint(*.0))]
    Killed(i32),
    /// The monitor executed a system call that its jail refuses, and ended: a fault of this program, or of a guest that
    /// has taken the monitor over.
    #[error(
        "the jail of kindling-vmm refused {0}; `--seccomp log` runs the guest and lets the kernel log such calls"
    )]
    Refused(String),
    /// The monitor ended with this message.
    #[error("kindling-vmm failed: {0}")]
    Crashed(String),
    /// The monitor did not exit in time, and was killed.
    #[error("kindling-vmm did not stop in time and was killed")]
    StopTimeout,
    /// The monitor did not answer a request in time.
    #[error("kindling-vmm does not respond")]
    Timeout,
    /// The machine ended before it could answer the request.
    #[error("the guest has ended")]
    Ended,
    /// The monitor refuses the request, for this reason.
    #[error("{0}")]
    Declined(String),
    /// A frame is longer than the maximum, or has more descriptors.
    #[error("a message between kindling and kindling-vmm is too long ({0} bytes)")]
    TooLong(usize),
    /// A frame cannot be decoded, or comes from another version.
    #[error("kindling and kindling-vmm are of different versions; install both from one build")]
    Version,
}

/// A possible cause of a signal, to append to a message: SIGKILL is also the signal of the kernel's OOM killer.
const fn signal_hint(signal: i32) -> &'static str {
    if signal == 9 { "; the host may be out of memory" } else { "" }
}

impl From<Errno> for ControlError {
    fn from(error: Errno) -> Self {
        Self::Socket(error.into())
    }
}

impl From<postcard::Error> for ControlError {
    fn from(_: postcard::Error) -> Self {
        Self::Version
    }
}

/// One end of the socket.
#[derive(Debug)]
pub(super) struct Channel {
    socket: UnixStream,
    /// Limit of the time between the first byte of a received frame and the last.
    frame_timeout: Option<Duration>,
}

impl Channel {
    pub(super) const fn new(socket: UnixStream) -> Self {
        Self { socket, frame_timeout: None }
    }

    /// An end that does not trust the other: a received frame must be complete after this time.
    pub(super) const fn with_frame_timeout(socket: UnixStream, timeout: Duration) -> Self {
        Self { socket, frame_timeout: Some(timeout) }
    }

    /// Duplicates the handle of this end.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { socket: self.socket.try_clone()?, ..*self })
    }

    /// Shuts down both directions, for all handles.
    pub(super) fn shut_down(&self) -> io::Result<()> {
        self.socket.shutdown(std::net::Shutdown::Both)
    }

    /// Sends a value, with duplicates of descriptors.
    pub(super) fn send(
        &self,
        value: &impl Serialize,
        max: usize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ControlError> {
        self.send_with(value, max, descriptors, SendFlags::NOSIGNAL)
    }

    /// The same without waiting: an end that does not read is [`ControlError::Timeout`].
    pub(super) fn try_send(
        &self,
        value: &impl Serialize,
        max: usize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ControlError> {
        self.send_with(value, max, descriptors, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    fn send_with(
        &self,
        value: &impl Serialize,
        max: usize,
        descriptors: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> Result<(), ControlError> {
        let mut frame = postcard::to_extend(value, vec![0; HEADER_LEN])?;
        let length = frame.len() - HEADER_LEN;
        if length > max {
            return Err(ControlError::TooLong(length));
        }
        frame[..HEADER_LEN].copy_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
        let mut sent =
            if descriptors.is_empty() { 0 } else { self.send_with_descriptors(&frame, descriptors, flags)? };
        while sent < frame.len() {
            // A closed socket is an error here, not a SIGPIPE.
            match retry_on_intr(|| send(&self.socket, &frame[sent..], flags)) {
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ControlError::Disconnected),
                Err(Errno::AGAIN) => return Err(ControlError::Timeout),
                result => sent += result?,
            }
        }
        Ok(())
    }

    /// Sends descriptors with as much of a frame as the socket accepts, and returns the number of bytes sent.
    fn send_with_descriptors(
        &self,
        frame: &[u8],
        descriptors: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> Result<usize, ControlError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(ControlError::TooLong(descriptors.len()));
        }
        let mut first = || sendmsg(&self.socket, &[IoSlice::new(frame)], &mut control, flags);
        match retry_on_intr(&mut first) {
            Err(Errno::PIPE | Errno::CONNRESET) => Err(ControlError::Disconnected),
            Err(Errno::AGAIN) => Err(ControlError::Timeout),
            result => Ok(result?),
        }
    }

    /// Waits for a value and its descriptors. Returns `None` if the other end is closed.
    pub(super) fn receive<T: DeserializeOwned>(
        &self,
        max: usize,
    ) -> Result<Option<(T, Vec<OwnedFd>)>, ControlError> {
        let mut head = [0; HEADER_LEN];
        let (count, descriptors) = self.receive_with_descriptors(&mut head)?;
        if count == 0 {
            return Ok(None);
        }
        let deadline = self.frame_timeout.map(|timeout| Instant::now() + timeout);
        self.read_exact(&mut head[count..], deadline)?;
        let length = usize::try_from(u32::from_le_bytes(head)).unwrap_or(usize::MAX);
        if length > max {
            return Err(ControlError::TooLong(length));
        }
        let mut bytes = vec![0; length];
        self.read_exact(&mut bytes, deadline)?;
        // Trailing bytes mean another version.
        let (value, rest) = postcard::take_from_bytes(&bytes)?;
        if rest.is_empty() { Ok(Some((value, descriptors))) } else { Err(ControlError::Version) }
    }

    fn receive_with_descriptors(&self, head: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), ControlError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut receive =
            || recvmsg(&self.socket, &mut [IoSliceMut::new(head)], &mut control, RecvFlags::CMSG_CLOEXEC);
        let message = match retry_on_intr(&mut receive) {
            Err(Errno::CONNRESET) => return Ok((0, Vec::new())),
            result => result?,
        };
        let messages = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        });
        Ok((message.bytes, messages.flatten().collect()))
    }

    fn read_exact(&self, mut bytes: &mut [u8], deadline: Option<Instant>) -> Result<(), ControlError> {
        while !bytes.is_empty() {
            if deadline.is_some() && !wait_readable(self.socket.as_fd(), deadline)? {
                return Err(ControlError::Timeout);
            }
            match (&self.socket).read(bytes) {
                Ok(0) => return Err(ControlError::Disconnected),
                Ok(count) => bytes = &mut bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The other end was closed before it read all that was sent to it.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(ControlError::Disconnected);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    const MAX: usize = 1 << 20;

    fn pair() -> (Channel, Channel) {
        let (one, other) = UnixStream::pair().unwrap();
        (Channel::new(one), Channel::new(other))
    }

    #[test]
    fn values_and_descriptors_arrive_in_order() {
        let (front, monitor) = pair();
        let file = tempfile::tempfile().unwrap();
        front.send(&"with", MAX, &[file.as_fd(), file.as_fd()]).unwrap();
        front.send(&"without", MAX, &[]).unwrap();
        let (word, descriptors) = monitor.receive::<String>(MAX).unwrap().unwrap();
        assert_eq!((word.as_str(), descriptors.len()), ("with", 2));
        let number = |file: &File| file.metadata().unwrap().ino();
        for descriptor in descriptors {
            assert_eq!(number(&File::from(descriptor)), number(&file));
        }
        let (word, descriptors) = monitor.receive::<String>(MAX).unwrap().unwrap();
        assert_eq!((word.as_str(), descriptors.len()), ("without", 0));
        drop(front);
        assert!(monitor.receive::<String>(MAX).unwrap().is_none());
    }

    #[test]
    fn a_value_may_be_longer_than_the_socket_buffer() {
        let (front, monitor) = pair();
        let long = "x".repeat(3 << 20);
        let receiver = std::thread::spawn(move || monitor.receive::<String>(4 << 20).unwrap().unwrap());
        front.send(&long, 4 << 20, &[tempfile::tempfile().unwrap().as_fd()]).unwrap();
        let (word, descriptors) = receiver.join().unwrap();
        assert_eq!((word == long, descriptors.len()), (true, 1));
    }

    #[test]
    fn invalid_and_oversized_frames_are_rejected() {
        for (bytes, expected) in [
            (&[5, 0, 0, 0][..], "exited unexpectedly"),
            (&[1, 0], "exited unexpectedly"),
            (&[0, 0, 16, 0], "is too long (1048576 bytes)"),
            (&[1, 0, 0, 0, 200], "different versions"),
            // A string of two letters in a frame that is one byte longer.
            (&[4, 0, 0, 0, 2, b'a', b'b', 0], "different versions"),
        ] {
            let (front, monitor) = pair();
            (&front.socket).write_all(bytes).unwrap();
            drop(front);
            let message = monitor.receive::<String>(MAX - 1).unwrap_err().to_string();
            assert!(message.contains(expected), "{message:?} should say {expected:?}");
        }
        let (front, monitor) = pair();
        assert!(matches!(front.send(&"xy", 2, &[]), Err(ControlError::TooLong(3))));
        drop(monitor);
        assert!(matches!(front.send(&"xy", 3, &[]), Err(ControlError::Disconnected)));
    }

    #[test]
    fn an_end_that_is_closed_before_it_has_read_everything_is_disconnected() {
        for partial in [&[][..], &[9, 0], &[9, 0, 0, 0, 1]] {
            let (front, monitor) = pair();
            front.send(&"unread", MAX, &[]).unwrap();
            (&monitor.socket).write_all(partial).unwrap();
            drop(monitor);
            let result = front.receive::<String>(MAX);
            match partial {
                [] => assert!(matches!(result, Ok(None)), "{result:?}"),
                _ => assert!(matches!(result, Err(ControlError::Disconnected)), "{result:?}"),
            }
        }
    }

    #[test]
    fn a_frame_that_arrives_byte_by_byte_has_a_time_limit() {
        let (front, monitor) = UnixStream::pair().unwrap();
        let front = Channel::with_frame_timeout(front, Duration::from_millis(50));
        // The length of a frame without its bytes, from an end that stays open.
        (&monitor).write_all(&[200, 0, 0, 0, 1]).unwrap();
        assert!(matches!(front.receive::<String>(MAX), Err(ControlError::Timeout)));
    }

    #[test]
    fn a_request_to_an_end_that_does_not_read_times_out() {
        let (front, _monitor) = pair();
        let mut results = std::iter::repeat_with(|| front.try_send(&"request", MAX, &[])).take(1 << 20);
        assert!(matches!(results.find(Result::is_err), Some(Err(ControlError::Timeout))));
    }
}
