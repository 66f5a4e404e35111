//! Fuzzes the block device with an arbitrary driver: no panic, no access outside of guest memory,
//! and a reset recovers the device.
//!
//! `cargo xtask fuzz block` runs it.
#![no_main]

use kindling_vmm::config::devices::Drive;
use kindling_vmm::devices::virtio::block::Block;
use kindling_vmm::devices::virtio::driver::Driver;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(64 << 10).unwrap();
    let drive = Drive::new("disk", file.path());
    Driver::new(Block::open(&drive).unwrap()).misbehave(bytes);
});
