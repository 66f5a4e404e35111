//! Any driver of a shared folder, and any server of it: nothing panics, nothing outside guest memory is touched, and a reset mends what was broken.
//!
//! `cargo +nightly fuzz run fs -- -max_total_time=600`, in the folder above this one.
#![no_main]

use kindling_vmm::devices::virtio::driver::Driver;
use kindling_vmm::devices::virtio::fs::{Server, SharedFolder};
use libfuzzer_sys::fuzz_target;
use std::io::Write;
use std::os::unix::net::UnixStream;

fuzz_target!(|bytes: &[u8]| {
    let (replies, requests) = bytes.split_at(bytes.len() / 4);
    let (ours, mut server) = UnixStream::pair().unwrap();
    // Replies that are there before their requests are for nobody, but those of numbers that were given out.
    server.set_nonblocking(true).unwrap();
    let _ = server.write_all(replies);
    Driver::new(SharedFolder::with("tag", Some(Server::connected(ours)))).misbehave(requests);
});
