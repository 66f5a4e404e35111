//! The payload of `cargo xtask bench --scenario io`.

mod block;
mod net;
mod vsock;

use anyhow::{Context, Result};
use block::Disk;
use io_payload::{DONE, END, MARK_PORT, Operation};
use net::Card;
use std::path::Path;
use std::time::Instant;
use vsock::Vsock;

/// The first disk.
const DISK: &str = "/dev/vda";

fn main() -> Result<()> {
    let count = std::env::args().nth(1).context("how often? the first argument says it")?.parse()?;
    allow_mark_port()?;
    let mut devices = Devices {
        disk: Path::new(DISK).exists().then(|| Disk::open(DISK)).transpose()?,
        card: Card::open()?,
        vsock: Vsock::open(),
    };
    let mut measured = Vec::new();
    for operation in Operation::ALL {
        // What happens only the first time is not what an operation costs.
        if !devices.repeat(operation, 1)? {
            continue;
        }
        mark(operation as u8);
        let before = Instant::now();
        devices.repeat(operation, operation.repetitions(count))?;
        let time = before.elapsed();
        mark(DONE);
        measured.push((operation, time));
    }
    say(&measured);
    Ok(())
}

/// The devices that are there.
struct Devices {
    disk: Option<Disk>,
    card: Option<Card>,
    vsock: Option<Vsock>,
}

impl Devices {
    /// Does an operation so many times; `false` when its device is not there.
    fn repeat(&mut self, operation: Operation, count: u32) -> Result<bool> {
        let name = operation.name();
        let done = if name.starts_with("block") {
            self.disk.as_mut().map(|disk| disk.repeat(operation, count))
        } else if name.starts_with("vsock") {
            self.vsock.as_mut().map(|vsock| vsock.repeat(operation, count))
        } else {
            self.card.as_mut().map(|card| card.repeat(operation, count))
        };
        done.transpose().map(|done| done.is_some()).with_context(|| format!("{name} failed"))
    }
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
