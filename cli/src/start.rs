//! The program's entry point, in place of Rust's ([`kindling::entry`] has the reason).
#![expect(unsafe_code, reason = "the C library's entry point")]

use std::io::Write;

// SAFETY: name and type are those that the C library calls, and no other symbol has the name.
#[unsafe(no_mangle)]
extern "C" fn main(_argc: libc::c_int, _argv: *const *const libc::c_char) -> libc::c_int {
    kindling::entry::prepare();
    kindling::entry::keep_inherited_from_children();
    let status = crate::run();
    // A closed pipe is not an error.
    let _ = std::io::stdout().flush();
    status.into()
}
