//! What a program does first whose entry is its own, instead of the one that Rust's standard library has.
//!
//! Before `main` the library prepares to tell a stack overflow from other faults: the C library reads and
//! parses /proc/self/maps for it, and every thread gets a stack for signals. All this is 0.1 ms of a boot,
//! and all that it gives is one more line before the process ends by the same signal: behind every stack
//! is a page that nobody may touch, with or without. What else the library does is done here.
#![expect(unsafe_code, reason = "what there is no safe interface to")]

use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, fcntl_getfd};
use std::os::fd::IntoRawFd;

/// Prepares a process that has one thread and has done nothing yet.
pub fn prepare() {
    open_standard_streams();
    // SAFETY: no other thread exists that could allocate or expect a signal.
    unsafe {
        // Who writes to a pipe that nobody reads gets an error, and the guest goes on.
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        // A vCPU's thread allocates next to nothing; an arena of its own is 128 MiB of addresses and five
        // system calls.
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Takes as many descriptors as the host allows: each connection of a vsock is one, and the usual limit of 1024 is for
/// programs that use select(2).
pub fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // With fewer, connections beyond them are refused.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// Opens those of the three standard streams that are closed, so that no file of this program gets their
/// numbers: the guest's console would go there.
fn open_standard_streams() {
    for stream in [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()] {
        if fcntl_getfd(stream) == Err(Errno::BADF)
            // The lowest number that is free is this stream's, because those before it are open.
            && let Ok(file) = open("/dev/null", OFlags::RDWR, Mode::empty())
        {
            let _ = file.into_raw_fd();
        }
    }
}
