//! What the kernel lets a program do where it is the one for which the machine runs: what container engines allow.

use crate::voice::say;
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Resource, Rlimit, setrlimit};

/// Descriptors that a process may ask for, and those that it has without asking: as many as select(2) bears.
const DESCRIPTORS: u64 = 524_288;
const DESCRIPTORS_AT_FIRST: u64 = 1024;

/// Whoever is alone on a machine may use its low ports, and ping.
const SETTINGS: [(&str, &[u8]); 2] = [
    ("/proc/sys/net/ipv4/ip_unprivileged_port_start", b"0"),
    ("/proc/sys/net/ipv4/ping_group_range", b"0 2147483647"),
];

/// Raises this process's limit, which has the streams of all programs, and loosens the kernel's.
pub(crate) fn raise() {
    set_descriptors(DESCRIPTORS);
    for (path, value) in SETTINGS {
        // A kernel without a network has neither.
        if let Ok(file) = open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
            let _ = rustix::io::write(&file, value);
        }
    }
}

/// Limits the descriptors of this process, which becomes a program.
pub(crate) fn limit_program() {
    set_descriptors(DESCRIPTORS_AT_FIRST);
}

fn set_descriptors(count: u64) {
    let limit = Rlimit { current: Some(count), maximum: Some(DESCRIPTORS) };
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        say(format_args!("init: cannot set the number of descriptors: {error}\n"));
    }
}
