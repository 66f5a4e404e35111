//! Any driver of a balloon: nothing panics, nothing outside guest memory is touched, and a reset mends what was broken.
//!
//! `cargo +nightly fuzz run balloon -- -max_total_time=600`, in the folder above this one.
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
