//! What a child of init does that copies files: `kindling cp`'s end in the guest. Its standard streams are the host's.

use crate::syscall;
use guest_copy::{Destination, Failure, Sender, Source};
use rustix::fd::AsFd;

/// The exit status after a failure, which standard error says.
const FAILED: u8 = 1;

/// Writes what is there to standard output; the exit status.
pub(super) fn send(path: &[u8], follows: bool) -> u8 {
    let [_, output, error] = syscall::keep_standard_streams();
    // The host knows what it is called.
    match guest_copy::send(Source { path, name: b".", follows }, output) {
        Ok(None) => 0,
        Ok(Some(left_out)) => say(error, &left_out, 0),
        Err(failure) => say(error, &failure, FAILED),
    }
}

/// Makes files of standard input; the exit status.
pub(super) fn receive(path: &[u8], keeps_owners: bool) -> u8 {
    const EVERY_BIT: u16 = 0o7777;
    let [input, _, error] = syscall::keep_standard_streams();
    let sender = Sender::Trusted;
    let destination = Destination { path, sender, name: None, keeps_owners, mode_bits: EVERY_BIT };
    match guest_copy::receive(destination, input) {
        Ok(()) => 0,
        Err(failure) => say(error, &failure, FAILED),
    }
}

fn say(error: impl AsFd, failure: &Failure, code: u8) -> u8 {
    let _ = rustix::io::write(error, &failure.to_bytes());
    code
}
