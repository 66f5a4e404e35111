//! Startup of a program that defines `main` itself, without the runtime startup of Rust's standard library.
//!
//! That startup prepares to distinguish stack overflows from other faults: the C library reads and parses
//! /proc/self/maps for it, and every thread gets a signal stack. All this takes 0.1 ms of a boot, and its only effect
//! is one more line of output before the process ends by the same signal: every stack has a guard page in either case.
//! The other steps of that startup are done here.
#![expect(unsafe_code, reason = "signals and mallopt have no safe interface")]

use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, fcntl_getfd};
use rustix::stdio::stderr;
use std::os::fd::{AsRawFd, IntoRawFd};

/// Prepares the process. Must be called first, while the process has one thread.
pub fn prepare() {
    open_standard_streams();
    // SAFETY: no other thread exists that could allocate or expect a signal.
    unsafe {
        // Writing to a pipe without a reader returns an error instead of a signal, and the guest continues.
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        // A vCPU thread allocates almost nothing; a separate malloc arena would take 128 MiB of address space and
        // five system calls.
        libc::mallopt(libc::M_ARENA_MAX, 1);
        // All allocations come from the heap: the jail of a monitor needs no mmap, munmap and mremap then.
        libc::mallopt(libc::M_MMAP_MAX, 0);
    }
}

/// Closes all descriptors but the standard streams: those that the parent of this process's parent has left open.
pub fn close_inherited() {
    inherited(0);
}

/// Keeps all descriptors but the standard streams from the programs that this process executes: those that its parent has
/// left open are no business of a converter or a file server that has been taken over.
pub fn keep_inherited_from_children() {
    inherited(libc::CLOSE_RANGE_CLOEXEC);
}

fn inherited(flags: libc::c_uint) {
    let first = libc::c_uint::try_from(stderr().as_raw_fd()).unwrap_or_default() + 1;
    // SAFETY: no object of this program has a descriptor yet. Kernels before 5.9 do not have the call, and 5.11 has the
    // flag; no supported one is as old.
    unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, flags) };
}

/// Raises the limit of open descriptors to the hard limit: each vsock connection takes one, and the usual soft limit of
/// 1024 exists for programs that use select(2).
pub fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // If this fails, connections beyond the limit are refused.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// Unblocks all signals: the parent may have blocked some for itself.
pub fn unblock_signals() {
    let mut none = std::mem::MaybeUninit::uninit();
    // SAFETY: sigemptyset initializes the set, which the other call reads.
    unsafe {
        libc::sigemptyset(none.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
    }
}

/// Opens /dev/null for each closed standard stream, so that no file of this program gets its number: the guest's
/// console would be written to that file.
fn open_standard_streams() {
    for stream in [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()] {
        if fcntl_getfd(stream) == Err(Errno::BADF)
            // open(2) returns the lowest free number, which is this stream's, because the ones before it are open.
            && let Ok(file) = open("/dev/null", OFlags::RDWR, Mode::empty())
        {
            let _ = file.into_raw_fd();
        }
    }
}
