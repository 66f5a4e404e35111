//! Waits for a descriptor to become readable.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Instant;
use vmm_sys_util::eventfd::EventFd;

/// Waits until a descriptor is readable or its other end is closed, at most until `until`. Returns `false` at that
/// time.
///
/// # Errors
/// When the host has no memory for the wait.
pub fn wait_readable(fd: BorrowedFd<'_>, until: Option<Instant>) -> Result<bool, Errno> {
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        // A time that does not fit is never reached.
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], left.as_ref()) {
            Err(Errno::INTR) => {}
            result => return result.map(|count| count > 0),
        }
    }
}

/// Borrows the descriptor of an eventfd, whose type predates `AsFd`.
#[expect(unsafe_code, reason = "borrows a descriptor from a type without AsFd")]
pub(crate) fn borrow(eventfd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the eventfd, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn data_and_end_of_file_are_readable() {
        let (mut ours, its) = UnixStream::pair().unwrap();
        assert_eq!(wait_readable(its.as_fd(), Some(Instant::now())), Ok(false));
        ours.write_all(b"x").unwrap();
        assert_eq!(wait_readable(its.as_fd(), None), Ok(true));
        let (ours, its) = UnixStream::pair().unwrap();
        drop(ours);
        assert_eq!(wait_readable(its.as_fd(), None), Ok(true));
    }
}
