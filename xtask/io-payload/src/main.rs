//! The payload of `cargo xtask bench --scenario io`.

mod balloon;
mod block;
mod net;
mod vsock;

use anyhow::{Context, Result};
use block::Disk;
use io_payload::{DONE, END, MARK_PORT, Operation, REPORTS};
use net::Card;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Instant;
use vsock::Vsock;

/// The first disk.
const DISK: &str = "/dev/vda";

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let count = arguments.next().context("how often? the first argument says it")?.parse()?;
    let reports = arguments.next().is_some_and(|word| word == REPORTS);
    allow_mark_port()?;
    let mut devices = Devices {
        disk: Path::new(DISK).exists().then(|| Disk::open(DISK)).transpose()?,
        card: Card::open()?,
        vsock: Vsock::open(),
        random: random_numbers(),
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
    if reports {
        let operation = Operation::BalloonReport1m;
        measured.push((operation, balloon::time_of_reports(operation.repetitions(count))?));
    }
    say(&measured);
    Ok(())
}

/// The devices that are there.
struct Devices {
    disk: Option<Disk>,
    card: Option<Card>,
    vsock: Option<Vsock>,
    random: Option<File>,
}

impl Devices {
    /// Does an operation so many times; `false` when its device is not there.
    fn repeat(&mut self, operation: Operation, count: u32) -> Result<bool> {
        let name = operation.name();
        let done = if name.starts_with("block") {
            self.disk.as_mut().map(|disk| disk.repeat(operation, count))
        } else if name.starts_with("vsock") {
            self.vsock.as_mut().map(|vsock| vsock.repeat(operation, count))
        } else if name.starts_with("entropy") {
            self.random.as_mut().map(|random| read_random(random, count))
        } else if name.starts_with("balloon") {
            None
        } else {
            self.card.as_mut().map(|card| card.repeat(operation, count))
        };
        done.transpose().map(|done| done.is_some()).with_context(|| format!("{name} failed"))
    }
}

/// The host's random numbers, if there is a device for them.
fn random_numbers() -> Option<File> {
    let mut file = File::open("/dev/hwrng").ok()?;
    // The name is there without a device.
    file.read_exact(&mut [0]).is_ok().then_some(file)
}

fn read_random(file: &mut File, count: u32) -> Result<()> {
    let mut numbers = [0; 4096];
    (0..count).try_for_each(|_| Ok(file.read_exact(&mut numbers)?))
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
