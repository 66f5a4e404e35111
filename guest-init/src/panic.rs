//! Fatal errors and panics: a message on the serial port, then the end of the virtual machine.
#![expect(unsafe_code, reason = "a panic writes to the serial port without the kernel")]

use crate::console;
use crate::machine;
use core::fmt::{self, Write};
use guest_protocol::ExitStatus;
use uart_16550::Uart16550;

/// The first serial port of a PC.
const COM1: u16 = 0x3f8;

/// Prints why init cannot continue, and ends the virtual machine with [`ExitStatus::InitPanic`].
pub(crate) fn fatal(reason: fmt::Arguments<'_>) -> ! {
    print_raw(format_args!("init: {reason}\n"));
    machine::end(ExitStatus::InitPanic)
}

/// Writes to the registers of the serial port, which works without a console and without memory.
fn print_raw(text: fmt::Arguments<'_>) {
    if !machine::has_ports() {
        return console::print(text);
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
    fatal(format_args!("{info}"))
}
