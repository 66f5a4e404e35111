//! Vectored reads and writes of file descriptors, directly to and from guest memory.
#![expect(unsafe_code, reason = "system calls with addresses of guest memory")]

use super::Segment;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Maximum number of segments per system call (`UIO_MAXIOV` in linux/uio.h).
pub(super) const SEGMENTS_MAX: usize = 1024;

/// Calls readv(2) once; returns the number of bytes.
///
/// # Safety
/// The memory of each segment is mapped, and no Rust reference in this process refers to it.
pub(super) unsafe fn read(fd: BorrowedFd<'_>, segments: &[Segment]) -> io::Result<usize> {
    let count = i32::try_from(segments.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: a segment is an iovec, and the caller guarantees the memory of each segment.
    let result = unsafe { libc::readv(fd.as_raw_fd(), segments.as_ptr().cast(), count) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Calls writev(2) once; returns the number of bytes.
///
/// # Safety
/// The memory of each segment is mapped.
pub(super) unsafe fn write(fd: BorrowedFd<'_>, segments: &[Segment]) -> io::Result<usize> {
    let count = i32::try_from(segments.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: as above; the kernel only reads the memory.
    let result = unsafe { libc::writev(fd.as_raw_fd(), segments.as_ptr().cast(), count) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
