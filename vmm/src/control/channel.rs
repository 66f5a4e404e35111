//! Frames with descriptors over a Unix stream socket: the length in four bytes, little endian, then the value. The
//! descriptors come with the first byte (SCM_RIGHTS, unix(7)).

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
use std::time::Duration;

/// Descriptors of a frame: two for each of the most devices, and those of the machine.
const DESCRIPTORS_MAX: usize = 64;
/// Bytes of a length.
const LENGTH: usize = 4;

/// Why a front and its monitor do not understand each other.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The socket failed.
    #[error("the socket between kindling and kindling-vmm failed")]
    Socket(#[from] io::Error),
    /// The other end is gone.
    #[error("kindling-vmm ended without a word")]
    Gone,
    /// A signal ended the monitor.
    #[error("signal {0} ended kindling-vmm{hint}", hint = if *.0 == 9 { "; the host may have killed it for want of memory" } else { "" })]
    Killed(i32),
    /// The monitor did not stop when it was told to.
    #[error("kindling-vmm did not stop when it was told to, and was killed")]
    Stuck,
    /// The monitor does not answer a request.
    #[error("kindling-vmm does not answer")]
    Silent,
    /// The machine ended before the request.
    #[error("the guest has ended")]
    Ended,
    /// What came is longer than anything that could come.
    #[error("a message between kindling and kindling-vmm has {0} bytes, more than any")]
    Long(usize),
    /// What came is no message, or one of another version.
    #[error("kindling and kindling-vmm are of different versions; install both from one build")]
    Version,
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
pub(super) struct Channel(UnixStream);

impl Channel {
    pub(super) const fn new(socket: UnixStream) -> Self {
        Self(socket)
    }

    /// Another handle of the same end.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Limits how long [`Self::receive`] waits for the rest of a frame that has begun.
    pub(super) fn limit(&self, limit: Duration) -> io::Result<()> {
        self.0.set_read_timeout(Some(limit))
    }

    /// Ends both directions, for all handles.
    pub(super) fn shut_down(&self) -> io::Result<()> {
        self.0.shutdown(std::net::Shutdown::Both)
    }

    /// Sends a value, and copies of descriptors with it.
    pub(super) fn send(
        &self,
        value: &impl Serialize,
        max: usize,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ControlError> {
        let mut frame = postcard::to_extend(value, vec![0; LENGTH])?;
        let length = frame.len() - LENGTH;
        if length > max {
            return Err(ControlError::Long(length));
        }
        frame[..LENGTH].copy_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
        let mut sent = if descriptors.is_empty() { 0 } else { self.send_first(&frame, descriptors)? };
        while sent < frame.len() {
            // An end that is gone is an error here and not a signal.
            match retry_on_intr(|| send(&self.0, &frame[sent..], SendFlags::NOSIGNAL)) {
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ControlError::Gone),
                result => sent += result?,
            }
        }
        Ok(())
    }

    /// Sends as much of a frame as goes at once, with descriptors.
    fn send_first(&self, frame: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<usize, ControlError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(ControlError::Long(descriptors.len()));
        }
        let mut first = || sendmsg(&self.0, &[IoSlice::new(frame)], &mut control, SendFlags::NOSIGNAL);
        match retry_on_intr(&mut first) {
            Err(Errno::PIPE | Errno::CONNRESET) => Err(ControlError::Gone),
            result => Ok(result?),
        }
    }

    /// Waits for a value and its descriptors; none where the other end is closed.
    pub(super) fn receive<T: DeserializeOwned>(
        &self,
        max: usize,
    ) -> Result<Option<(T, Vec<OwnedFd>)>, ControlError> {
        let mut head = [0; LENGTH];
        let (count, descriptors) = self.receive_first(&mut head)?;
        if count == 0 {
            return Ok(None);
        }
        self.fill(&mut head[count..])?;
        let length = usize::try_from(u32::from_le_bytes(head)).unwrap_or(usize::MAX);
        if length > max {
            return Err(ControlError::Long(length));
        }
        let mut bytes = vec![0; length];
        self.fill(&mut bytes)?;
        // Nothing may follow the value.
        let (value, rest) = postcard::take_from_bytes(&bytes)?;
        if rest.is_empty() { Ok(Some((value, descriptors))) } else { Err(ControlError::Version) }
    }

    fn receive_first(&self, head: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), ControlError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut receive =
            || recvmsg(&self.0, &mut [IoSliceMut::new(head)], &mut control, RecvFlags::CMSG_CLOEXEC);
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

    fn fill(&self, bytes: &mut [u8]) -> Result<(), ControlError> {
        match (&self.0).read_exact(bytes) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(ControlError::Gone),
            result => Ok(result?),
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
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
    fn a_value_may_be_longer_than_the_socket_holds() {
        let (front, monitor) = pair();
        let long = "x".repeat(3 << 20);
        let receiver = std::thread::spawn(move || monitor.receive::<String>(4 << 20).unwrap().unwrap());
        front.send(&long, 4 << 20, &[tempfile::tempfile().unwrap().as_fd()]).unwrap();
        let (word, descriptors) = receiver.join().unwrap();
        assert_eq!((word == long, descriptors.len()), (true, 1));
    }

    #[test]
    fn what_is_no_message_is_refused_and_has_a_bound() {
        for (bytes, expected) in [
            (&[5, 0, 0, 0][..], "without a word"),
            (&[1, 0], "without a word"),
            (&[0, 0, 16, 0], "has 1048576 bytes, more than any"),
            (&[1, 0, 0, 0, 200], "different versions"),
            // A word of two letters where there is room for three.
            (&[4, 0, 0, 0, 2, b'a', b'b', 0], "different versions"),
        ] {
            let (front, monitor) = pair();
            (&front.0).write_all(bytes).unwrap();
            drop(front);
            let message = monitor.receive::<String>(MAX - 1).unwrap_err().to_string();
            assert!(message.contains(expected), "{message:?} should say {expected:?}");
        }
        let (front, monitor) = pair();
        assert!(matches!(front.send(&"xy", 2, &[]), Err(ControlError::Long(3))));
        drop(monitor);
        assert!(matches!(front.send(&"xy", 3, &[]), Err(ControlError::Gone)));
    }
}
