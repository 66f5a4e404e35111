//! Messages on init's standard error, which is the console.
#![expect(unsafe_code, reason = "borrows a standard stream")]

use core::fmt::{self, Write};
use rustix::io::Errno;

/// Writes to standard error; does nothing if it is closed.
pub(crate) fn print(text: fmt::Arguments<'_>) {
    let _ = Stderr.write_fmt(text);
}

/// Waits until the serial port has transmitted what was written to the console. The kernel's driver transmits it from
/// an interrupt handler, and the end of the machine would truncate it.
pub(crate) fn drain() {
    // SAFETY: init never closes its standard streams. If this one is no terminal, the call fails without waiting.
    let _ = rustix::termios::tcdrain(unsafe { rustix::stdio::stderr() });
}

/// Describes an error number in words, for the errors that a user of a guest may cause.
pub(crate) struct ErrnoText(pub(crate) Errno);

impl fmt::Display for ErrnoText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Errno::ACCESS => "permission denied",
            Errno::IO => "input/output error",
            Errno::LOOP => "too many levels of symbolic links",
            Errno::NOENT => "no such file or directory",
            Errno::NOEXEC => "exec format error",
            Errno::NOMEM => "out of memory",
            Errno::NOSPC => "no space left on device",
            Errno::NOTDIR => "not a directory",
            Errno::PERM => "operation not permitted",
            Errno::ROFS => "read-only file system",
            Errno::TOOBIG => "argument list too long",
            error => return fmt::Display::fmt(&error, f),
        })
    }
}

struct Stderr;

impl Write for Stderr {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        write_bytes(text.as_bytes()).ok_or(fmt::Error)
    }
}

fn write_bytes(mut bytes: &[u8]) -> Option<()> {
    // SAFETY: init never closes its standard streams.
    let stderr = unsafe { rustix::stdio::stderr() };
    while !bytes.is_empty() {
        let written = rustix::io::write(stderr, bytes).ok()?;
        bytes = bytes.get(written..)?;
    }
    Some(())
}
