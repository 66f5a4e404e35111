//! Fuzzes the entropy device with an arbitrary driver: no panic, no access outside of guest memory,
//! and a reset recovers the device.
//!
//! `cargo xtask fuzz entropy` runs it.
#![no_main]

use kindling_vmm::config::devices;
use kindling_vmm::devices::virtio::driver::Driver;
use kindling_vmm::devices::virtio::entropy::Entropy;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    Driver::new(Entropy::new(&devices::Entropy::default())).misbehave(bytes);
});
