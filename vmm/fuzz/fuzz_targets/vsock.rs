//! Any driver of sockets, one of whose ports leads to a program of the host: nothing panics, nothing outside guest memory is touched, and a reset mends what was broken.
//!
//! `cargo +nightly fuzz run vsock -- -max_total_time=600`, in the folder above this one.
#![no_main]

use kindling_vmm::config::devices;
use kindling_vmm::devices::virtio::driver::Driver;
use kindling_vmm::devices::virtio::vsock::Vsock;
use libfuzzer_sys::fuzz_target;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};

fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("v");
    // The guest can reach port 0, which is what most of its packets name, and the host asks for one of the guest.
    let _listener = UnixListener::bind(folder.path().join("v_0")).unwrap();
    let config = devices::Vsock { guest_cid: 3, uds_path: path.clone(), vsock_id: None };
    let device = Vsock::open(&config).unwrap();
    let mut program = UnixStream::connect(&path).unwrap();
    program.write_all(b"CONNECT 0\n").unwrap();
    Driver::new(device).misbehave(bytes);
});
