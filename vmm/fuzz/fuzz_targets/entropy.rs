//! Any driver of a source of random numbers: nothing panics, nothing outside guest memory is touched, and a reset mends what was broken.
//!
//! `cargo +nightly fuzz run entropy -- -max_total_time=600`, in the folder above this one.
#![no_main]

use kindling_vmm::config::devices;
use kindling_vmm::devices::virtio::driver::Driver;
use kindling_vmm::devices::virtio::entropy::Entropy;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    Driver::new(Entropy::new(&devices::Entropy::default())).misbehave(bytes);
});
