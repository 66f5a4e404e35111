//! Fuzzes the pmem device with an arbitrary driver: no panic, no access outside of guest memory,
//! and a reset recovers the device.
//!
//! `cargo xtask fuzz pmem` runs it.
#![no_main]

use kindling_vmm::config::devices;
use kindling_vmm::devices::virtio::driver::Driver;
use kindling_vmm::devices::virtio::pmem::Pmem;
use libfuzzer_sys::fuzz_target;
use vm_memory::GuestAddress;

fuzz_target!(|bytes: &[u8]| {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(2 << 20).unwrap();
    let config = devices::Pmem {
        id: "pmem".into(),
        path_on_host: file.path().into(),
        root_device: false,
        read_only: false,
        rate_limiter: None,
    };
    Driver::new(Pmem::open(&config, GuestAddress(4 << 30)).unwrap()).misbehave(bytes);
});
