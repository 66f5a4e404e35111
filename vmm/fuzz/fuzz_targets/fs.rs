//! Fuzzes the file system device with an arbitrary driver and an arbitrary server: no panic, no access outside of guest
//! memory, and a reset recovers the device.
//!
//! `cargo xtask fuzz fs` runs it.
#![no_main]

use kindling_vmm::devices::virtio::driver::Driver;
use kindling_vmm::devices::virtio::fs::{Server, SharedFolder};
use libfuzzer_sys::fuzz_target;
use std::io::Write;
use std::os::unix::net::UnixStream;

fuzz_target!(|bytes: &[u8]| {
    let (replies, requests) = bytes.split_at(bytes.len() / 4);
    let (ours, mut server) = UnixStream::pair().unwrap();
    // Replies that arrive before their requests are dropped, except for those with numbers already in use.
    server.set_nonblocking(true).unwrap();
    let _ = server.write_all(replies);
    Driver::new(SharedFolder::with("tag", Some(Server::connected(ours)))).misbehave(requests);
});
