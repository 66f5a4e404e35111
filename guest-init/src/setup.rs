//! The environment that every program expects: the kernel's filesystems, device nodes, standard streams, the hostname.
#![expect(unsafe_code, reason = "borrows a standard stream")]

use crate::console::print;
use rustix::fs::{CWD, Mode, OFlags, chmod, mkdirat, open, symlinkat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

struct Mount {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    options: &'static core::ffi::CStr,
}

/// Filesystems that only some kernels support (fragments sysfs, container and net), together with their mount points.
const OPTIONAL: [&str; 3] = ["sysfs", "cgroup2", "mqueue"];

const fn no_programs() -> MountFlags {
    MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC)
}

/// Mounted in this order, as some mount points are inside others.
const MOUNTS: [Mount; 9] = [
    Mount { kind: "proc", target: "/proc", flags: no_programs(), options: c"" },
    Mount { kind: "sysfs", target: "/sys", flags: no_programs(), options: c"" },
    // As systemd mounts it.
    Mount {
        kind: "cgroup2",
        target: "/sys/fs/cgroup",
        flags: no_programs(),
        options: c"nsdelegate,memory_recursiveprot",
    },
    Mount { kind: "devtmpfs", target: "/dev", flags: MountFlags::NOSUID, options: c"mode=0755" },
    Mount {
        kind: "devpts",
        target: "/dev/pts",
        // No NODEV: its files are devices, which programs open by name.
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        options: c"gid=5,mode=0620,ptmxmode=0666",
    },
    Mount { kind: "tmpfs", target: "/dev/shm", flags: no_programs(), options: c"mode=1777" },
    Mount { kind: "mqueue", target: "/dev/mqueue", flags: no_programs(), options: c"" },
    Mount { kind: "tmpfs", target: "/run", flags: MountFlags::NOSUID, options: c"mode=0755" },
    Mount { kind: "tmpfs", target: "/tmp", flags: MountFlags::NOSUID, options: c"mode=1777" },
];

/// Mounts the cgroups again, in another cgroup namespace.
pub(crate) fn mount_cgroups() -> Result<(), Errno> {
    MOUNTS
        .iter()
        .filter(|entry| entry.kind == "cgroup2")
        .try_for_each(|entry| mount(entry.kind, entry.target, entry.kind, entry.flags, entry.options))
}

/// Mounts the kernel's filesystems and tmpfs. A failure is printed and not fatal, because programs may run without the
/// filesystem.
pub(crate) fn mount_filesystems() {
    for entry in &MOUNTS {
        if let Err(error) = mkdirat(CWD, entry.target, Mode::from_raw_mode(0o755))
            && error != Errno::EXIST
            && !OPTIONAL.contains(&entry.kind)
        {
            print(format_args!("init: cannot make {}: {error}\n", entry.target));
        }
        match mount(entry.kind, entry.target, entry.kind, entry.flags, entry.options) {
            // EBUSY: the kernel or the image has mounted it already (DEVTMPFS_MOUNT).
            Ok(()) | Err(Errno::BUSY) => {}
            Err(Errno::NODEV | Errno::NOENT) if OPTIONAL.contains(&entry.kind) => {}
            Err(error) => print(format_args!(
                "init: cannot mount {} on {}: {error}; the guest's kernel needs the fragment \
                 for it\n",
                entry.kind, entry.target
            )),
        }
    }
}

/// Links to a program's own descriptors, which user space has to create. Shells and the log configuration of many
/// programs rely on them.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Devices that all users may open, with the permissions that udev sets: opening them gives a process no additional
/// rights. Not every kernel has them.
const PUBLIC_DEVICES: [&str; 2] = ["/dev/fuse", "/dev/net/tun"];

/// Completes /dev. Errors are ignored: the links may exist already, and the devices may be missing.
pub(crate) fn complete_devices() {
    for (target, link) in LINKS {
        let _ = symlinkat(target, CWD, link);
    }
    for device in PUBLIC_DEVICES {
        let _ = chmod(device, Mode::from_raw_mode(0o666));
    }
}

/// Makes sure that descriptors 0 to 2 are open. The kernel opens /dev/console for them if the initramfs contains it.
/// Without a console they are /dev/null.
pub(crate) fn open_console() {
    // SAFETY: the call only queries descriptor 2, which init never closes.
    if rustix::io::fcntl_getfd(unsafe { rustix::stdio::stderr() }).is_ok() {
        return;
    }
    let console = open("/dev/console", OFlags::RDWR, Mode::empty())
        .or_else(|_| open("/dev/null", OFlags::RDWR, Mode::empty()));
    if let Ok(console) = console {
        let _ = rustix::stdio::dup2_stdin(&console);
        let _ = rustix::stdio::dup2_stdout(&console);
        let _ = rustix::stdio::dup2_stderr(&console);
        if rustix::fd::AsRawFd::as_raw_fd(&console) <= 2 {
            core::mem::forget(console);
        }
    }
}

/// Sets the hostname, if the configuration has one.
pub(crate) fn set_hostname(name: Option<&[u8]>) {
    if let Some(name) = name
        && let Err(error) = rustix::system::sethostname(name)
    {
        print(format_args!("init: cannot set the hostname: {error}\n"));
    }
}
