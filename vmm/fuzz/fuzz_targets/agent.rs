//! Fuzzes the messages of a guest's agent: the front must tolerate arbitrary bytes.
#![no_main]

use guest_protocol::agent::Message;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut rest = bytes;
    while let Ok(Some((_, length))) = Message::split(rest) {
        assert!(length > 0 && length <= rest.len());
        rest = &rest[length..];
    }
});
