//! The guest's side of `kindling cp`, which runs in a child of init. The host holds the other ends of its standard
//! streams.

use crate::syscall;
use guest_copy::{Destination, Failure, Sender, Source};
use rustix::fd::AsFd;

/// The exit status after a failure, which is written to standard error.
const FAILED: u8 = 1;

/// Writes the files at a path to standard output. Returns the exit status.
pub(super) fn send(path: &[u8], follows: bool) -> u8 {
    let [_, output, error] = syscall::keep_standard_streams();
    // The host replaces the name by the one that it requested.
    match guest_copy::send(Source { path, name: b".", follows }, output) {
        Ok(None) => 0,
        Ok(Some(left_out)) => report(error, &left_out, 0),
        Err(failure) => report(error, &failure, FAILED),
    }
}

/// Creates the files that standard input contains. Returns the exit status.
pub(super) fn receive(path: &[u8], keeps_owners: bool) -> u8 {
    const ALL_MODE_BITS: u16 = 0o7777;
    let [input, _, error] = syscall::keep_standard_streams();
    let sender = Sender::Trusted;
    let destination = Destination { path, sender, name: None, keeps_owners, mode_bits: ALL_MODE_BITS };
    match guest_copy::receive(destination, input) {
        Ok(()) => 0,
        Err(failure) => report(error, &failure, FAILED),
    }
}

fn report(error: impl AsFd, failure: &Failure, code: u8) -> u8 {
    let _ = rustix::io::write(error, &failure.to_bytes());
    code
}
