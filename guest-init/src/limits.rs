//! Resource limits and sysctls of a guest that runs a container image: those of container engines and their hosts.

use crate::console::print;
use crate::panic::fatal;
use crate::{files, setup, syscall};
use rustix::fs::{CWD, Mode, OFlags, mkdirat};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use rustix::path::DecInt;
use rustix::process::{Resource, Rlimit, setrlimit};

/// Hard limit of descriptors per process. The soft limit is the maximum that select(2) supports.
const MAX_DESCRIPTORS: u64 = 524_288;
const DEFAULT_DESCRIPTORS: u64 = 1024;

/// Sysctls. On the kernel command line (`sysctl.`) they would cost a boot 21 ms (exact lab): the kernel mounts a /proc
/// for them, and waits for RCU when it unmounts it.
const SYSCTLS: [(&str, &[u8]); 8] = [
    // The default of Fedora and Ubuntu; Elasticsearch and OpenSearch refuse less than 262,144.
    ("/proc/sys/vm/max_map_count", b"1048576"),
    // As on every Kubernetes node: a sparse mapping takes no memory until it is written. The kernel's default heuristic
    // refuses a mapping larger than the memory of the guest, which is smaller than a container host.
    ("/proc/sys/vm/overcommit_memory", b"1"),
    // The kernel's defaults for these grow with memory, and suit machines larger than a guest.
    ("/proc/sys/fs/file-max", b"1048576"),
    ("/proc/sys/fs/inotify/max_user_watches", b"524288"),
    ("/proc/sys/fs/inotify/max_user_instances", b"1024"),
    // For several databases with asynchronous direct I/O; the default of 65,536 is enough for one.
    ("/proc/sys/fs/aio-max-nr", b"1048576"),
    // The payload has the machine to itself, so that it may bind low ports and ping without privileges.
    ("/proc/sys/net/ipv4/ip_unprivileged_port_start", b"0"),
    ("/proc/sys/net/ipv4/ping_group_range", b"0 2147483647"),
];

/// Raises the limits of this process, which holds the streams of all programs, and of its children, and sets the
/// [`SYSCTLS`].
pub(crate) fn raise() {
    for (path, value) in SYSCTLS {
        // Not every kernel configuration has each of them.
        let _ = write(path, value);
    }
    set_descriptors(MAX_DESCRIPTORS);
    // The kernel's default for users other than root is half of the threads that it derives from the guest's memory.
    set(Resource::Nproc, Rlimit { current: None, maximum: None });
}

/// Limits the number of processes and threads, those of the kernel and this one excepted. They become members of a cgroup with
/// the limit, which is the root of their view: with the mount option nsdelegate they cannot write to it (`cgroup_file_write` in
/// kernel/cgroup/cgroup.c). A program that is root and sets out to lift the limit can enter the kernel's own cgroup namespace.
pub(crate) fn limit_processes(max: u64) {
    const MOUNTED: &str = "/sys/fs/cgroup";
    const INIT: u64 = 1;
    let limit = || {
        write("/sys/fs/cgroup/cgroup.subtree_control", b"+pids")?;
        mkdirat(CWD, "/sys/fs/cgroup/guest", Mode::from_raw_mode(0o755))?;
        write("/sys/fs/cgroup/guest/pids.max", DecInt::new(max.saturating_add(INIT)).as_bytes())?;
        write("/sys/fs/cgroup/guest/cgroup.procs", b"1")?;
        syscall::enter_cgroup_namespace()?;
        // A new mount has the root of the namespace.
        unmount(MOUNTED, UnmountFlags::empty())?;
        setup::mount_cgroups()
    };
    if let Err(error) = limit() {
        fatal(format_args!(
            "cannot limit processes: {error}; the guest's kernel needs the fragment container"
        ));
    }
}

fn write(path: &str, value: &[u8]) -> Result<(), Errno> {
    files::write(CWD, path.as_bytes(), OFlags::empty(), value)
}

/// Limits the descriptors of this process, which executes a program next.
pub(crate) fn limit_program() {
    set_descriptors(DEFAULT_DESCRIPTORS);
}

fn set_descriptors(count: u64) {
    set(Resource::Nofile, Rlimit { current: Some(count), maximum: Some(MAX_DESCRIPTORS) });
}

fn set(resource: Resource, limit: Rlimit) {
    if let Err(error) = setrlimit(resource, limit) {
        print(format_args!("init: cannot set the limit {resource:?}: {error}\n"));
    }
}
