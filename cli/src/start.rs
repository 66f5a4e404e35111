//! The program's entry ([`kindling::vmm::entry`] says why it has one).
#![expect(unsafe_code, reason = "the C library's entry")]

use std::io::Write;

// SAFETY: this is the name and the type of what the C library calls, and no other symbol has the name.
#[unsafe(no_mangle)]
extern "C" fn main(_argc: libc::c_int, _argv: *const *const libc::c_char) -> libc::c_int {
    kindling::vmm::entry::prepare();
    let status = crate::run();
    // A reader that has closed its end needs no error.
    let _ = std::io::stdout().flush();
    status.into()
}
