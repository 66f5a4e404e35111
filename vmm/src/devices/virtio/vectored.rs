//! Reading and writing descriptors straight from and to guest memory.
#![expect(unsafe_code, reason = "system calls with addresses of guest memory")]

use super::Segment;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Segments that one call takes (`UIO_MAXIOV` in linux/uio.h).
pub(super) const SEGMENTS_MAX: usize = 1024;

/// Reads once into segments; the number of bytes.
///
/// # Safety
/// The memory of each segment is there, and nothing else in this process refers to it.
pub(super) unsafe fn read(fd: BorrowedFd<'_>, segments: &[Segment]) -> io::Result<usize> {
    let count = i32::try_from(segments.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: a segment is an iovec, and the caller vouches for what each of them names.
    let result = unsafe { libc::readv(fd.as_raw_fd(), segments.as_ptr().cast(), count) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Writes segments once; the number of bytes.
///
/// # Safety
/// The memory of each segment is there.
pub(super) unsafe fn write(fd: BorrowedFd<'_>, segments: &[Segment]) -> io::Result<usize> {
    let count = i32::try_from(segments.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: as above; the host only reads it.
    let result = unsafe { libc::writev(fd.as_raw_fd(), segments.as_ptr().cast(), count) };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
