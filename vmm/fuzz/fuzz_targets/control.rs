//! Fuzzes the control channel: the front-end process must tolerate arbitrary messages of a monitor that its
//! guest controls.
//!
//! `cargo +nightly fuzz run control -- -max_total_time=600`, in the parent folder.
#![no_main]

use kindling_vmm::control;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| control::decode(bytes));
