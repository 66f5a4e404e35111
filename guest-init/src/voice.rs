//! How init speaks: on its standard error, or straight to the serial port when it panics.
#![expect(unsafe_code, reason = "a panic speaks to the serial port without the kernel")]

use core::fmt::{self, Write};
use guest_protocol::ExitStatus;
use rustix::io::Errno;
use uart_16550::Uart16550;

/// The first serial port of a PC.
const COM1: u16 = 0x3f8;

/// Writes to standard error, and nowhere when that is closed.
pub(crate) fn say(text: fmt::Arguments<'_>) {
    let _ = Stderr.write_fmt(text);
}

/// Waits until the serial port has taken what was written to the console: the kernel sends it on
/// by interrupts, and the machine's end would cut it off.
pub(crate) fn drain() {
    // SAFETY: init never closes its standard streams. Where this is no terminal, nothing waits.
    let _ = rustix::termios::tcdrain(unsafe { rustix::stdio::stderr() });
}

/// What an error number means, where a user of the guest may meet it.
pub(crate) struct Words(pub(crate) Errno);

impl fmt::Display for Words {
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

/// Says why init cannot go on, and ends the virtual machine with the code for that.
pub(crate) fn give_up(reason: fmt::Arguments<'_>) -> ! {
    shout(format_args!("init: {reason}\n"));
    crate::machine::end(ExitStatus::InitPanic)
}

/// Writes to the serial port itself, which works before there is a console and without memory.
fn shout(text: fmt::Arguments<'_>) {
    if !crate::machine::has_ports() {
        return say(text);
    }
    // SAFETY: the kernel permits port I/O. The kernel's driver may use the same port, which can
    // at worst interleave characters of a message before the machine ends.
    if let Ok(uart) = unsafe { Uart16550::new_port(COM1) } {
        let _ = Serial(uart).write_fmt(text);
    }
}

struct Serial(Uart16550<uart_16550::backend::PioBackend>);

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for line in text.split_inclusive('\n') {
            match line.strip_suffix('\n') {
                Some(line) => {
                    self.0.send_bytes_exact(line.as_bytes());
                    self.0.send_bytes_exact(b"\r\n");
                }
                None => self.0.send_bytes_exact(line.as_bytes()),
            }
        }
        Ok(())
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    give_up(format_args!("{info}"))
}
