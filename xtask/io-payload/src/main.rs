//! The payload of `cargo xtask bench --scenario io`.

mod block;

use anyhow::{Context, Result};
use io_payload::{DONE, END, MARK_PORT, Operation};
use std::path::Path;
use std::time::Instant;

/// The first disk.
const DISK: &str = "/dev/vda";

fn main() -> Result<()> {
    let count = std::env::args().nth(1).context("how often? the first argument says it")?.parse()?;
    let mut measured = Vec::new();
    allow_mark_port()?;
    if Path::new(DISK).exists() {
        let mut disk = block::Disk::open(DISK)?;
        for operation in Operation::ALL {
            // What happens only the first time is not what an operation costs.
            disk.repeat(operation, 1)?;
            mark(operation as u8);
            let before = Instant::now();
            disk.repeat(operation, operation.repetitions(count))?;
            let time = before.elapsed();
            mark(DONE);
            measured.push((operation, time));
        }
    }
    say(&measured);
    Ok(())
}

/// The console is slow: nothing is said before the end.
#[expect(clippy::print_stdout, reason = "standard output is how this program reports")]
fn say(measured: &[(Operation, std::time::Duration)]) {
    for (operation, time) in measured {
        println!("{} {}", operation.name(), time.as_nanos());
    }
    println!("{END}");
}

#[expect(unsafe_code, reason = "asks for access to an I/O port")]
fn allow_mark_port() -> Result<()> {
    // SAFETY: the call reads no memory; the port belongs to no device of these guests.
    let result = unsafe { libc::ioperm(MARK_PORT.into(), 1, 1) };
    anyhow::ensure!(result == 0, "no access to the port of marks: {}", std::io::Error::last_os_error());
    Ok(())
}

#[expect(unsafe_code, reason = "writes an I/O port")]
fn mark(value: u8) {
    // SAFETY: `main` asked for access to the port, and no device answers there.
    unsafe { x86_64::instructions::port::Port::new(MARK_PORT).write(value) };
}
