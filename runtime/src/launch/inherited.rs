//! What a process inherits from the one that starts it: a front only takes spare monitors that have inherited the same.

use rustix::fs::{AtFlags, CWD, Mode, OFlags, open, openat, statat};
use rustix::io::read;
use rustix::process::{Resource, getegid, geteuid, getgroups, getpriority_process, getrlimit};
use rustix::thread::{
    SecureComputingMode, capabilities, no_new_privs, sched_getaffinity, secure_computing_mode,
};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::OwnedFd;

/// Namespaces, in /proc/self/ns.
const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];
/// All resources whose use can be limited.
const RESOURCES: [Resource; 16] = [
    Resource::As,
    Resource::Core,
    Resource::Cpu,
    Resource::Data,
    Resource::Fsize,
    Resource::Locks,
    Resource::Memlock,
    Resource::Msgqueue,
    Resource::Nice,
    Resource::Nofile,
    Resource::Nproc,
    Resource::Rss,
    Resource::Rtprio,
    Resource::Rttime,
    Resource::Sigpending,
    Resource::Stack,
];

/// A digest of what this process has inherited and passes on: users and capabilities, limits, scheduling, namespaces, root
/// directory, cgroup, and the label of a security module. `None` in a sandbox whose rules cannot be compared: a process with
/// `no_new_privs` may be confined by Landlock, which it cannot find out.
#[inline(never)]
pub(super) fn digest() -> Option<u64> {
    if no_new_privs().ok()? {
        return None;
    }
    let mut all = DefaultHasher::new();
    let process =
        open("/proc/self", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    (geteuid().as_raw(), getegid().as_raw()).hash(&mut all);
    getgroups().ok()?.iter().for_each(|group| group.as_raw().hash(&mut all));
    let capabilities = capabilities(None).ok()?;
    (capabilities.effective.bits(), capabilities.permitted.bits(), capabilities.inheritable.bits())
        .hash(&mut all);
    if secure_computing_mode().ok()? != SecureComputingMode::Disabled {
        // Filters are only added, so that processes of one container with as many have the same.
        let status = contents(&process, "status")?;
        let status = String::from_utf8_lossy(&status).into_owned();
        status.lines().filter(|line| line.starts_with("Seccomp")).for_each(|line| line.hash(&mut all));
    }
    for resource in RESOURCES {
        let limit = getrlimit(resource);
        (limit.current, limit.maximum).hash(&mut all);
    }
    sched_getaffinity(None).ok()?.hash(&mut all);
    (getpriority_process(None).ok()?, scheduling_policy(), personality()).hash(&mut all);
    let namespaces =
        openat(&process, "ns", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    for name in NAMESPACES {
        // Older kernels have no namespaces of time.
        let number = statat(&namespaces, name, AtFlags::empty()).map_or(0, |status| status.st_ino);
        number.hash(&mut all);
    }
    let root = statat(CWD, "/", AtFlags::empty()).ok()?;
    (root.st_dev, root.st_ino).hash(&mut all);
    contents(&process, "cgroup")?.hash(&mut all);
    contents(&process, "oom_score_adj")?.hash(&mut all);
    // Without a security module there is no label.
    contents(&process, "attr/current").hash(&mut all);
    Some(all.finish())
}

/// The contents of a short file. `None` if it cannot be read or is not short.
fn contents(folder: &OwnedFd, name: &str) -> Option<Vec<u8>> {
    const MAX: usize = 8192;
    let file = openat(folder, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut bytes = vec![0; MAX];
    let length = read(&file, &mut bytes).ok().filter(|&length| length < MAX)?;
    bytes.truncate(length);
    Some(bytes)
}

#[expect(unsafe_code, reason = "the call has no safe interface")]
fn scheduling_policy() -> i32 {
    // SAFETY: the call has no effect on memory.
    unsafe { libc::sched_getscheduler(0) }
}

/// Whether addresses are not random, for instance (personality(2)).
#[expect(unsafe_code, reason = "the call has no safe interface")]
fn personality() -> i32 {
    const QUERY: libc::c_ulong = 0xffff_ffff;
    // SAFETY: the call has no effect on memory, and with this argument none at all.
    unsafe { libc::personality(QUERY) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Rlimit, setrlimit};

    #[test]
    fn processes_with_different_limits_have_inherited_something_different() {
        let before = digest().unwrap();
        assert_eq!(digest(), Some(before), "nothing has changed");
        let limit = getrlimit(Resource::Msgqueue);
        let lower = limit.current.unwrap_or(2) - 1;
        setrlimit(Resource::Msgqueue, Rlimit { current: Some(lower), ..limit }).unwrap();
        assert_ne!(digest(), Some(before));
        setrlimit(Resource::Msgqueue, limit).unwrap();
        assert_eq!(digest(), Some(before));
    }
}
