//! New namespaces and an empty root directory for the monitor, in the strictest jail.
//!
//! There is no mount namespace: creating one copies each mount of the host, which takes 5 us for each (exact lab), and 2.5
//! ms on a host with 500. chroot(2) takes the same time everywhere. Nothing leads out of it: the monitor has no
//! capability, no directory open unless the library has detached its guest, and cannot create a user namespace in which it
//! had one (`create_user_ns` in kernel/user_namespace.c refuses a process with another root directory, and one whose user
//! is not mapped).
#![expect(unsafe_code, reason = "unshare has no safe interface")]

use super::capabilities;
use rustix::io::Errno;
use rustix::process::{chdir, chroot, geteuid, getgroups, getpid};
use rustix::thread::{
    CapabilitySet, Gid, Uid, UnshareFlags, capabilities as thread_capabilities, set_keep_capabilities,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid, unshare_unsafe,
};

/// The user ID of the monitor with process ID 0, of those that root starts; the others follow. No two processes that run
/// in one PID namespace have the same, and no convention gives these numbers to anything else (systemd's `UIDS-GIDS`).
const FIRST_USER: u32 = 0x7000_0000;

/// The capabilities kept until the root directory is changed: for chroot(2), and for watching files of other users.
const KEPT: CapabilitySet = CapabilitySet::SYS_CHROOT.union(CapabilitySet::DAC_READ_SEARCH);

/// A directory that is never writable, and contains only the numbers of this process's descriptors.
const ROOT: &str = "/proc/self/fdinfo";

/// Moves this process, which has one thread, to new namespaces: network, IPC, UTS and cgroup. A process of root switches to
/// an unused UID; another one moves to a user namespace in which its UID has no mapping. The process keeps the capabilities
/// for [`change_root`], and in a user namespace all that it has there.
pub(super) fn enter() -> Result<(), Errno> {
    let mut namespaces =
        UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWCGROUP;
    let is_root = geteuid().is_root();
    if !is_root {
        namespaces |= UnshareFlags::NEWUSER;
    }
    // SAFETY: these namespaces do not affect memory, files or threads.
    unsafe { unshare_unsafe(namespaces) }?;
    if is_root {
        let id = FIRST_USER + getpid().as_raw_pid().unsigned_abs();
        let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
        set_keep_capabilities(true)?;
        // Each change of credentials takes about 0.01 ms.
        if !getgroups()?.is_empty() {
            set_thread_groups(&[])?;
        }
        set_thread_res_gid(group, group, group)?;
        set_thread_res_uid(user, user, user)?;
        capabilities::keep(thread_capabilities(None)?.permitted & KEPT)?;
    }
    Ok(())
}

/// Makes an empty directory the root directory, and drops all capabilities.
pub(super) fn change_root() -> Result<(), Errno> {
    chroot(ROOT)?;
    chdir("/")?;
    capabilities::keep(CapabilitySet::empty())
}
