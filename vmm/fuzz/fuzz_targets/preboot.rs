//! Fuzzes the files of pre-booted kernels: a file that was damaged, or that another program has written, is refused.
#![no_main]

use kindling_vmm::preboot;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| preboot::decode(bytes));
