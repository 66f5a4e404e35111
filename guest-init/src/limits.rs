//! Resource limits of a program for which the machine runs: what container engines allow. What the kernel itself limits
//! is on its command line (`SYSCTLS` in the crate guest-kernel-config).

use crate::voice::say;
use rustix::process::{Resource, Rlimit, setrlimit};

/// Descriptors that a process may ask for, and those that it has without asking: as many as select(2) bears.
const DESCRIPTORS: u64 = 524_288;
const DESCRIPTORS_AT_FIRST: u64 = 1024;

/// Raises the limits of this process, which has the streams of all programs, and of its children.
pub(crate) fn raise() {
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
