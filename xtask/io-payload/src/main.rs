//! The payload of `cargo xtask bench --scenario io`.

mod balloon;
mod block;
mod net;
mod vsock;

use anyhow::{Context, Result};
use block::Disk;
use io_payload::{DONE, END, MARK_PORT, Operation, REPORTS};
use net::NetCard;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Instant;
use vsock::Vsock;

/// The first disk.
const DISK: &str = "/dev/vda";

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let count = arguments.next().context("usage: io-payload COUNT [reports]")?.parse()?;
    let reports = arguments.next().is_some_and(|word| word == REPORTS);
    request_mark_port()?;
    let mut devices = Devices {
        disk: Path::new(DISK).exists().then(|| Disk::open(DISK)).transpose()?,
        card: NetCard::open()?,
        vsock: Vsock::open(),
        random: random_numbers(),
    };
    let mut measured = Vec::new();
    for operation in Operation::ALL {
        // The first repetition is a warm-up and is not measured.
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
    print_results(&measured);
    Ok(())
}

/// The guest's devices.
struct Devices {
    disk: Option<Disk>,
    card: Option<NetCard>,
    vsock: Option<Vsock>,
    random: Option<File>,
}

impl Devices {
    /// Performs an operation `count` times; `false` if the guest has no device for it.
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

/// The host's random number generator, if the guest has a device for it.
fn random_numbers() -> Option<File> {
    let mut file = File::open("/dev/hwrng").ok()?;
    // The file exists without a device.
    file.read_exact(&mut [0]).is_ok().then_some(file)
}

fn read_random(file: &mut File, count: u32) -> Result<()> {
    let mut numbers = [0; 4096];
    (0..count).try_for_each(|_| Ok(file.read_exact(&mut numbers)?))
}

/// Prints the results. Nothing is printed before, because the console is slow.
#[expect(clippy::print_stdout, reason = "the results go to standard output")]
fn print_results(measured: &[(Operation, std::time::Duration)]) {
    for (operation, time) in measured {
        println!("{} {}", operation.name(), time.as_nanos());
    }
    println!("{END}");
}

#[expect(unsafe_code, reason = "requests access to an I/O port")]
fn request_mark_port() -> Result<()> {
    // SAFETY: the call reads no memory; no device of these guests uses the port.
    let result = unsafe { libc::ioperm(MARK_PORT.into(), 1, 1) };
    anyhow::ensure!(
        result == 0,
        "cannot access I/O port {MARK_PORT:#x}: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}

#[expect(unsafe_code, reason = "writes an I/O port")]
fn mark(value: u8) {
    // SAFETY: `main` requested access to the port, and no device of these guests uses it.
    unsafe { x86_64::instructions::port::Port::new(MARK_PORT).write(value) };
}
