//! A monitor that its guest has taken over says anything to its front, and whatever comes has to be survived.
//!
//! `cargo +nightly fuzz run control -- -max_total_time=600`, in the folder above this one.
#![no_main]

use kindling_vmm::control;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| control::decode(bytes));
