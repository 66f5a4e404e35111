//! Fuzzes the control channel: the front-end process must tolerate arbitrary messages of a monitor that its
//! guest controls.
//!
//! `cargo xtask fuzz control` runs it.
#![no_main]

use kindling_vmm::control;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| control::decode(bytes));
