//! What happens to a thread that executes a system call that its filter refuses: the monitor ends, and its front reports
//! thread and call.
//!
//! The filter sends SIGSYS. The handler writes one line to standard error, a pipe that the front reads after an
//! unexpected end, and ends the process. It cannot return: the call was not executed, and nothing that called it expects
//! that.
#![expect(unsafe_code, reason = "a signal handler")]

use super::names::name_of;
use super::table::Thread;
use std::cell::Cell;
use std::io;

/// Exit status of a monitor that executed a refused call: that of a shell for SIGSYS.
pub(crate) const STATUS_REFUSED: u8 = 128 + 31;

/// The start of the line on standard error. The number of the thread's kind and that of the call follow.
const PREFIX: &str = "seccomp ";

thread_local! {
    /// The kind of this thread, as its index in [`Thread::ALL`].
    static KIND: Cell<u8> = const { Cell::new(0) };
}

/// The number of the call in `siginfo_t`, as the kernel lays it out for SIGSYS (include/uapi/asm-generic/siginfo.h).
#[repr(C)]
struct Info {
    /// Signal, error, code, and padding.
    head: [u32; 4],
    call_address: u64,
    call: i32,
}

/// Prepares the calling thread's report.
pub(super) fn prepare(thread: Thread) -> io::Result<()> {
    let kind = Thread::ALL.iter().position(|other| *other == thread).unwrap_or_default();
    KIND.set(u8::try_from(kind).unwrap_or_default());
    // SAFETY: all zeroes are a valid value, and the handler only calls functions that are safe in handlers.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = report as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        if libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

extern "C" fn report(_: libc::c_int, info: *const Info, _: *mut libc::c_void) {
    // SAFETY: the kernel passes the information of SIGSYS.
    let call = unsafe { (*info).call };
    let mut line = [0; 32];
    let length = line_of(KIND.get(), call, &mut line);
    // SAFETY: the line lives until the call returns. Both calls are allowed to every thread.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), length);
        libc::_exit(STATUS_REFUSED.into());
    }
}

/// Writes the line into a buffer, without formatting, which could allocate. Returns its length.
fn line_of(kind: u8, call: i32, line: &mut [u8; 32]) -> usize {
    let mut length = 0;
    let mut put = |byte| {
        line[length] = byte;
        length += 1;
    };
    PREFIX.bytes().for_each(&mut put);
    put(b'0' + kind);
    put(b' ');
    let mut divisor = 1_000_000_000;
    while divisor > 0 {
        put(b'0' + u8::try_from(call.unsigned_abs() / divisor % 10).unwrap_or_default());
        divisor /= 10;
    }
    put(b'\n');
    length
}

/// The thread and the call of a line on a monitor's standard error, as words for a message.
pub(crate) fn describe(line: &str) -> Option<String> {
    let (kind, call) = line.strip_prefix(PREFIX)?.trim_end().split_once(' ')?;
    let (kind, call) = (kind.parse::<usize>().ok()?, call.parse::<u32>().ok()?);
    let thread = Thread::ALL.get(kind)?.name();
    Some(
        name_of(call)
            .map_or_else(|| format!("call {call} of {thread}"), |name| format!("{name} of {thread}")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_described_by_names() {
        let mut line = [0; 32];
        let mut described = |kind, call| {
            let length = line_of(kind, call, &mut line);
            describe(std::str::from_utf8(&line[..length]).unwrap())
        };
        assert_eq!(described(0, 257), Some("openat of a vCPU".into()));
        assert_eq!(described(1, 0), Some("read of the event loop".into()));
        assert_eq!(described(2, 335), Some("call 335 of the file worker".into()));
        assert_eq!(described(1, i32::MAX), Some("call 2147483647 of the event loop".into()));
        assert_eq!(described(9, 1), None);
        for line in ["", "seccomp ", "seccomp 0", "seccomp x 1", "seccomp 0 -1", "panic"] {
            assert_eq!(describe(line), None, "{line}");
        }
    }
}
