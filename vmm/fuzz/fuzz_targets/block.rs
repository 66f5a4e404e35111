//! Any driver of a disk: nothing panics, nothing outside guest memory is touched, and a reset mends what was broken.
//!
//! `cargo +nightly fuzz run block -- -max_total_time=600`, in the folder above this one.
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
