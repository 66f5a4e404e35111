//! Fuzzes the balloon device with an arbitrary driver: no panic, no access outside of guest memory,
//! and a reset recovers the device.
//!
//! `cargo xtask fuzz balloon` runs it.
#![no_main]

use kindling_vmm::config::devices;
use kindling_vmm::devices::virtio::balloon::Balloon;
use kindling_vmm::devices::virtio::driver::Driver;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let config = devices::Balloon {
        amount_mib: 1,
        deflate_on_oom: true,
        free_page_reporting: true,
        ..devices::Balloon::default()
    };
    Driver::new(Balloon::new(&config).unwrap()).misbehave(bytes);
});
