//! Non-blocking transfers between Unix sockets and guest memory.
#![expect(unsafe_code, reason = "sends and receives with addresses of guest memory")]

use super::Segment;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

/// Maximum number of segments per system call (`IOV_MAX`, which the kernel calls `UIO_MAXIOV`).
const SEGMENTS_MAX: usize = 1024;

/// Sends as many bytes as the socket accepts; returns their number.
pub(super) fn send(socket: &UnixStream, segments: &[Segment]) -> io::Result<usize> {
    transfer(segments, |message| {
        // Without MSG_NOSIGNAL, a send to a socket whose peer is closed would kill a process that does not ignore
        // SIGPIPE.
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the message refers to segments that outlive the call and lie in guest memory, which the caller's
        // chain guarantees. The guest may change them concurrently, which the kernel tolerates.
        unsafe { libc::sendmsg(socket.as_raw_fd(), message, flags) }
    })
}

/// Whether a socket accepts no more bytes for now: it is full, or the host has no memory for them.
pub(super) fn is_full(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
        || matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::ENOMEM))
}

/// The result of a receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Received {
    /// Number of bytes; 0 at the end of the stream.
    pub(super) bytes: usize,
    /// Whether file descriptors were attached. They are dropped, and the kernel ends the receive at their position
    /// although more bytes may be available.
    pub(super) had_descriptors: bool,
}

/// Receives the available bytes.
pub(super) fn receive(socket: &UnixStream, segments: &[Segment]) -> io::Result<Received> {
    let mut had_descriptors = false;
    let bytes = transfer(segments, |message| {
        // SAFETY: as above, and the kernel writes no more than the length of the segments.
        let result = unsafe { libc::recvmsg(socket.as_raw_fd(), message, libc::MSG_DONTWAIT) };
        had_descriptors = message.msg_flags & libc::MSG_CTRUNC != 0;
        result
    })?;
    Ok(Received { bytes, had_descriptors })
}

fn transfer(segments: &[Segment], mut call: impl FnMut(&mut libc::msghdr) -> isize) -> io::Result<usize> {
    let segments = &segments[..segments.len().min(SEGMENTS_MAX)];
    // SAFETY: all zeroes are a message without a name, segments and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    // A segment is an iovec. sendmsg takes a mutable pointer and does not write through it.
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
