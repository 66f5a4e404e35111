//! Fuzzes configuration files: each is an error or a configuration.
#![no_main]

use kindling_vmm::config::from_json_file;
use libfuzzer_sys::fuzz_target;
use std::io::Write;

fuzz_target!(|bytes: &[u8]| {
    let mut file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.write_all(bytes).unwrap();
    if let Ok(read) = from_json_file(file.path()) {
        let _ = read.config.validate();
    }
});
