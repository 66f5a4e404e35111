//! `kindling-vmm`: the monitor of one guest. Its standard input is the socket of its front
//! ([`kindling_vmm::control`]), which starts it; users do not.
#![no_main]
#![expect(unsafe_code, reason = "the C library's entry")]

use rustix::io::fcntl_dupfd_cloexec;
use std::io::Write;
use std::os::unix::net::UnixStream;

/// The exit status where the front does not speak as one does.
const STATUS_FAILURE: u8 = 125;

// SAFETY: this is the name and the type of what the C library calls, and no other symbol has the name.
#[unsafe(no_mangle)]
extern "C" fn main(_argc: libc::c_int, _argv: *const *const libc::c_char) -> libc::c_int {
    kindling_vmm::entry::prepare();
    run().into()
}

/// Serves the front; the exit status.
fn run() -> u8 {
    if trusted_path::is_set_user_id() {
        let _ =
            std::io::stderr().write_all(format!("kindling-vmm: {}\n", trusted_path::SET_USER_ID).as_bytes());
        return STATUS_FAILURE;
    }
    // What happens at the front's terminal is for the guest's program.
    let _ = rustix::process::setsid();
    // Above the standard streams, so that it is closed in no other program.
    let Ok(socket) = fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) else { return STATUS_FAILURE };
    match kindling_vmm::control::serve(UnixStream::from(socket)) {
        Ok(()) => 0,
        Err(error) => {
            // Under a front, standard error is /dev/null; a user who starts this program sees the line.
            let _ = writeln!(
                std::io::stderr(),
                "kindling-vmm: {error}; `kindling` starts this program, not its users"
            );
            STATUS_FAILURE
        }
    }
}
