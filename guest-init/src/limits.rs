//! What the kernel lets a program do where it is the one for which the machine runs: what container engines and their
//! hosts allow.

use crate::voice::say;
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Resource, Rlimit, setrlimit};

/// Descriptors that a process may ask for, and those that it has without asking: as many as select(2) bears.
const DESCRIPTORS: u64 = 524_288;
const DESCRIPTORS_AT_FIRST: u64 = 1024;

/// Settings below /proc/sys. On the kernel command line (`sysctl.`) the same cost a boot 21 ms (exact lab): the kernel
/// waits for RCU when it gives back the /proc that it has mounted for them.
const SETTINGS: [(&str, &[u8]); 8] = [
    // As Fedora and Ubuntu have it; Elasticsearch and OpenSearch refuse less than 262,144.
    ("/proc/sys/vm/max_map_count", b"1048576"),
    // As on every node of Kubernetes: a sparse mapping takes no memory until it is written. The kernel's own estimate
    // refuses one that is larger than the guest's memory, which a container's host has more of.
    ("/proc/sys/vm/overcommit_memory", b"1"),
    // The kernel's own limits for these grow with memory, and suit machines that are larger than a guest.
    ("/proc/sys/fs/file-max", b"1048576"),
    ("/proc/sys/fs/inotify/max_user_watches", b"524288"),
    ("/proc/sys/fs/inotify/max_user_instances", b"1024"),
    // Databases with asynchronous direct I/O; 65,536 are for one.
    ("/proc/sys/fs/aio-max-nr", b"1048576"),
    // A program that is alone on a machine may use its low ports, and ping.
    ("/proc/sys/net/ipv4/ip_unprivileged_port_start", b"0"),
    ("/proc/sys/net/ipv4/ping_group_range", b"0 2147483647"),
];

/// Raises the limits of this process, which has the streams of all programs, and of its children, and loosens the
/// kernel's.
pub(crate) fn raise() {
    for (path, value) in SETTINGS {
        // Not every kernel has each of them.
        if let Ok(file) = open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
            let _ = rustix::io::write(&file, value);
        }
    }
    set_descriptors(DESCRIPTORS);
    // The kernel's own limit for users other than root is half of the threads that the guest's memory is good for.
    set(Resource::Nproc, Rlimit { current: None, maximum: None });
}

/// Limits the descriptors of this process, which becomes a program.
pub(crate) fn limit_program() {
    set_descriptors(DESCRIPTORS_AT_FIRST);
}

fn set_descriptors(count: u64) {
    set(Resource::Nofile, Rlimit { current: Some(count), maximum: Some(DESCRIPTORS) });
}

fn set(resource: Resource, limit: Rlimit) {
    if let Err(error) = setrlimit(resource, limit) {
        say(format_args!("init: cannot set the limit {resource:?}: {error}\n"));
    }
}
