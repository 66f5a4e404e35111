//! Fuzzes the socket device with an arbitrary driver, and with a program of the host on one of its ports: no panic, no
//! access outside of guest memory, and a reset recovers the device.
//!
//! `cargo xtask fuzz vsock` runs it.
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
    // The guest can connect to port 0, the port of most of its packets, and the host connects to a port of the guest.
    let _listener = UnixListener::bind(folder.path().join("v_0")).unwrap();
    let config = devices::Vsock { guest_cid: 3, uds_path: path.clone(), vsock_id: None };
    let device = Vsock::open(&config).unwrap();
    let mut program = UnixStream::connect(&path).unwrap();
    program.write_all(b"CONNECT 0\n").unwrap();
    Driver::new(device).misbehave(bytes);
});
