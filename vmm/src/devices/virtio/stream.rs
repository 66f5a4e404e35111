//! Unix sockets that read and write guest memory, and never wait.
#![expect(unsafe_code, reason = "sends and receives with addresses of guest memory")]

use super::Segment;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

/// Pieces that one call takes at most (`IOV_MAX`, which the kernel calls UIO_MAXIOV).
const PIECES_MAX: usize = 1024;

/// Sends what it can; the number of bytes.
pub(super) fn send(socket: &UnixStream, segments: &[Segment]) -> io::Result<usize> {
    transfer(segments, |message| {
        // Without MSG_NOSIGNAL a socket that its other end has closed would end a process that does not
        // ignore SIGPIPE.
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the message names segments that outlive the call and lie in guest memory, which the caller's
        // chain vouches for. The guest may change them meanwhile, with which the kernel copes.
        unsafe { libc::sendmsg(socket.as_raw_fd(), message, flags) }
    })
}

/// What a receive found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Received {
    /// Bytes; none at the end of the stream.
    pub(super) bytes: usize,
    /// Whether descriptors were sent along. They are dropped, and where they were the kernel stops reading
    /// although there may be more.
    pub(super) had_descriptors: bool,
}

/// Receives what there is.
pub(super) fn receive(socket: &UnixStream, segments: &[Segment]) -> io::Result<Received> {
    let mut had_descriptors = false;
    let bytes = transfer(segments, |message| {
        // SAFETY: as above, and the kernel writes no more than the segments hold.
        let result = unsafe { libc::recvmsg(socket.as_raw_fd(), message, libc::MSG_DONTWAIT) };
        had_descriptors = message.msg_flags & libc::MSG_CTRUNC != 0;
        result
    })?;
    Ok(Received { bytes, had_descriptors })
}

fn transfer(segments: &[Segment], mut call: impl FnMut(&mut libc::msghdr) -> isize) -> io::Result<usize> {
    let segments = &segments[..segments.len().min(PIECES_MAX)];
    // SAFETY: all zeroes are a message without name, pieces and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    // A segment is an iovec. sendmsg takes the pieces by a pointer that could write and does not.
    message.msg_iov = segments.as_ptr().cast::<libc::iovec>().cast_mut();
    message.msg_iovlen = segments.len();
    loop {
        match usize::try_from(call(&mut message)) {
            Ok(count) => return Ok(count),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}
