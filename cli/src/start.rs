//! The program's entry, instead of the one that Rust's standard library has.
//!
//! Before `main` the library prepares to tell a stack overflow from other faults: the C library reads and
//! parses /proc/self/maps for it, and every thread gets a stack for signals. All this is 0.1 ms of a boot,
//! and all that it gives is one more line before the process ends by the same signal: behind every stack
//! is a page that nobody may touch, with or without. What else the library does is done here.
#![expect(unsafe_code, reason = "the C library's entry, and what there is no safe interface to")]

use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, fcntl_getfd};
use std::io::Write;
use std::os::fd::IntoRawFd;

// SAFETY: this is the name and the type of what the C library calls, and no other symbol has the name.
#[unsafe(no_mangle)]
extern "C" fn main(_argc: libc::c_int, _argv: *const *const libc::c_char) -> libc::c_int {
    open_standard_streams();
    // SAFETY: no other thread exists that could allocate or expect a signal.
    unsafe {
        // Who writes to a pipe that nobody reads gets an error, and the guest goes on.
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        // A vCPU's thread allocates next to nothing; an arena of its own is 128 MiB of addresses and five
        // system calls.
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
    let status = crate::run();
    // Where nobody reads there is nobody to tell.
    let _ = std::io::stdout().flush();
    status.into()
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
