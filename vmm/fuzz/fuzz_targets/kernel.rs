//! Fuzzes the loading of kernel and initrd: it returns an error, or an entry point within guest memory.
//!
//! `cargo xtask fuzz kernel` runs it.
#![no_main]

use kindling_vmm::boot::{self, BootFiles, Hardware};
use kindling_vmm::config::{BootSource, InterruptControllers};
use kindling_vmm::layout::SERIAL_GSI;
use kindling_vmm::memory::GuestMemory;
use libfuzzer_sys::fuzz_target;
use std::io::Write;
use vm_memory::GuestMemoryBackend;

fuzz_target!(|bytes: &[u8]| {
    let Some((&split, bytes)) = bytes.split_first() else { return };
    let (initrd, kernel) = bytes.split_at(usize::from(split).min(bytes.len()));
    let file = |bytes: &[u8]| {
        let mut file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        file.write_all(bytes).unwrap();
        file
    };
    let (kernel, initrd) = (file(kernel), file(initrd));
    let mut source = BootSource::kernel(kernel.path());
    source.initrd_path = Some(initrd.path().into());
    let memory = GuestMemory::anonymous(16 << 20).unwrap();
    let hardware =
        Hardware { vcpus: 1, lines: &[SERIAL_GSI], devices: 0, controllers: InterruptControllers::IoApic };
    if let Ok(entry) = boot::load(&memory, &source, BootFiles::open(&source).unwrap(), hardware) {
        assert!(memory.inner().address_in_range(entry.instruction));
    }
});
