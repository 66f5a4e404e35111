//! Fuzzes the network device with an arbitrary driver and an arbitrary peer: no panic, no access outside of guest memory,
//! and a reset recovers the device.
//!
//! `cargo xtask fuzz net` runs it.
#![no_main]

use kindling_vmm::config::devices::NetworkInterface;
use kindling_vmm::devices::virtio::driver::Driver;
use kindling_vmm::devices::virtio::net::Net;
use libfuzzer_sys::fuzz_target;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};

fuzz_target!(|bytes: &[u8]| {
    // The type of the peer, whether its first frame has a plausible length, and how much it sends.
    let Some(([first, second], bytes)) = bytes.split_first_chunk() else { return };
    let is_passt = first & 1 == 0;
    let (said, bytes) = bytes.split_at(usize::from(*second).min(bytes.len()));
    let kind = if is_passt { SocketType::STREAM } else { SocketType::SEQPACKET };
    let (ours, its) = socketpair(AddressFamily::UNIX, kind, SocketFlags::NONBLOCK, None).unwrap();
    let mut stream = Vec::new();
    if is_passt && first & 2 == 0 {
        stream.extend([0, 0, first >> 2, 60]);
    }
    stream.extend(said);
    // First as frames that fit into a buffer, then as one that does not.
    for frame in [&stream[..], said, &[&stream[..], &[0; 5000]].concat()] {
        let _ = send(&its, frame, SendFlags::NOSIGNAL);
    }
    let interface = NetworkInterface::new("net0", "tap0");
    let device =
        if is_passt { Net::on_stream(ours, &interface) } else { Net::on_datagrams(ours, &interface) };
    Driver::new(device).misbehave(bytes);
});
