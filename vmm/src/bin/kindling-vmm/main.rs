//! `kindling-vmm`: the monitor of one guest. A front starts it with a socket as standard input
//! ([`kindling_vmm::control`]); it is not meant to be started by users.
#![no_main]
#![expect(unsafe_code, reason = "defines the C library's main")]

use kindling_vmm::control::{self, STATUS_INVALID_REQUEST};
use rustix::io::fcntl_dupfd_cloexec;
use std::io::Write;
use std::os::unix::net::UnixStream;

// SAFETY: the C library calls a function of this name and type, and no other symbol has the name.
#[unsafe(no_mangle)]
extern "C" fn main(_argc: libc::c_int, _argv: *const *const libc::c_char) -> libc::c_int {
    kindling_vmm::entry::prepare();
    kindling_vmm::entry::unblock_signals();
    kindling_vmm::entry::close_inherited();
    run().into()
}

/// Serves the front, and returns the exit status.
fn run() -> u8 {
    if trusted_path::is_set_user_id() {
        let _ =
            std::io::stderr().write_all(format!("kindling-vmm: {}\n", trusted_path::SET_USER_ID).as_bytes());
        return STATUS_INVALID_REQUEST;
    }
    // In a new session, the monitor does not receive the signals of the front's terminal, which are for the
    // guest's program.
    let _ = rustix::process::setsid();
    // A descriptor above the standard streams and close-on-exec, so that no child process inherits the socket.
    let Ok(socket) = fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) else { return STATUS_INVALID_REQUEST };
    match control::serve(UnixStream::from(socket)) {
        Ok(()) => 0,
        Err(error) => {
            // A front reads the standard error of a monitor only after other failures, so that only users see this line.
            let _ = writeln!(
                std::io::stderr(),
                "kindling-vmm: {error}; this program is started by `kindling`, not by users"
            );
            STATUS_INVALID_REQUEST
        }
    }
}
