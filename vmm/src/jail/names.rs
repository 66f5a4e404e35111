//! The numbers of system calls on x86-64 (arch/x86/entry/syscalls/syscall_64.tbl), which never change. The list is
//! complete up to Linux 6.6, because a refused call is reported by its name.

/// Names, each at its number; empty where there is no call. Numbers 335 to 423 are not assigned.
#[rustfmt::skip]
const FIRST: [&str; 335] = [
    "read", "write", "open", "close", "stat", "fstat", "lstat", "poll", "lseek", "mmap", "mprotect",
    "munmap", "brk", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "ioctl", "pread64", "pwrite64",
    "readv", "writev", "access", "pipe", "select", "sched_yield", "mremap", "msync", "mincore", "madvise",
    "shmget", "shmat", "shmctl", "dup", "dup2", "pause", "nanosleep", "getitimer", "alarm", "setitimer",
    "getpid", "sendfile", "socket", "connect", "accept", "sendto", "recvfrom", "sendmsg", "recvmsg",
    "shutdown", "bind", "listen", "getsockname", "getpeername", "socketpair", "setsockopt", "getsockopt",
    "clone", "fork", "vfork", "execve", "exit", "wait4", "kill", "uname", "semget", "semop", "semctl",
    "shmdt", "msgget", "msgsnd", "msgrcv", "msgctl", "fcntl", "flock", "fsync", "fdatasync", "truncate",
    "ftruncate", "getdents", "getcwd", "chdir", "fchdir", "rename", "mkdir", "rmdir", "creat", "link",
    "unlink", "symlink", "readlink", "chmod", "fchmod", "chown", "fchown", "lchown", "umask",
    "gettimeofday", "getrlimit", "getrusage", "sysinfo", "times", "ptrace", "getuid", "syslog", "getgid",
    "setuid", "setgid", "geteuid", "getegid", "setpgid", "getppid", "getpgrp", "setsid", "setreuid",
    "setregid", "getgroups", "setgroups", "setresuid", "getresuid", "setresgid", "getresgid", "getpgid",
    "setfsuid", "setfsgid", "getsid", "capget", "capset", "rt_sigpending", "rt_sigtimedwait",
    "rt_sigqueueinfo", "rt_sigsuspend", "sigaltstack", "utime", "mknod", "uselib", "personality", "ustat",
    "statfs", "fstatfs", "sysfs", "getpriority", "setpriority", "sched_setparam", "sched_getparam",
    "sched_setscheduler", "sched_getscheduler", "sched_get_priority_max", "sched_get_priority_min",
    "sched_rr_get_interval", "mlock", "munlock", "mlockall", "munlockall", "vhangup", "modify_ldt",
    "pivot_root", "_sysctl", "prctl", "arch_prctl", "adjtimex", "setrlimit", "chroot", "sync", "acct",
    "settimeofday", "mount", "umount2", "swapon", "swapoff", "reboot", "sethostname", "setdomainname",
    "iopl", "ioperm", "create_module", "init_module", "delete_module", "get_kernel_syms", "query_module",
    "quotactl", "nfsservctl", "getpmsg", "putpmsg", "afs_syscall", "tuxcall", "security", "gettid",
    "readahead", "setxattr", "lsetxattr", "fsetxattr", "getxattr", "lgetxattr", "fgetxattr", "listxattr",
    "llistxattr", "flistxattr", "removexattr", "lremovexattr", "fremovexattr", "tkill", "time", "futex",
    "sched_setaffinity", "sched_getaffinity", "set_thread_area", "io_setup", "io_destroy", "io_getevents",
    "io_submit", "io_cancel", "get_thread_area", "lookup_dcookie", "epoll_create", "epoll_ctl_old",
    "epoll_wait_old", "remap_file_pages", "getdents64", "set_tid_address", "restart_syscall", "semtimedop",
    "fadvise64", "timer_create", "timer_settime", "timer_gettime", "timer_getoverrun", "timer_delete",
    "clock_settime", "clock_gettime", "clock_getres", "clock_nanosleep", "exit_group", "epoll_wait",
    "epoll_ctl", "tgkill", "utimes", "vserver", "mbind", "set_mempolicy", "get_mempolicy", "mq_open",
    "mq_unlink", "mq_timedsend", "mq_timedreceive", "mq_notify", "mq_getsetattr", "kexec_load", "waitid",
    "add_key", "request_key", "keyctl", "ioprio_set", "ioprio_get", "inotify_init", "inotify_add_watch",
    "inotify_rm_watch", "migrate_pages", "openat", "mkdirat", "mknodat", "fchownat", "futimesat",
    "newfstatat", "unlinkat", "renameat", "linkat", "symlinkat", "readlinkat", "fchmodat", "faccessat",
    "pselect6", "ppoll", "unshare", "set_robust_list", "get_robust_list", "splice", "tee",
    "sync_file_range", "vmsplice", "move_pages", "utimensat", "epoll_pwait", "signalfd", "timerfd_create",
    "eventfd", "fallocate", "timerfd_settime", "timerfd_gettime", "accept4", "signalfd4", "eventfd2",
    "epoll_create1", "dup3", "pipe2", "inotify_init1", "preadv", "pwritev", "rt_tgsigqueueinfo",
    "perf_event_open", "recvmmsg", "fanotify_init", "fanotify_mark", "prlimit64", "name_to_handle_at",
    "open_by_handle_at", "clock_adjtime", "syncfs", "sendmmsg", "setns", "getcpu", "process_vm_readv",
    "process_vm_writev", "kcmp", "finit_module", "sched_setattr", "sched_getattr", "renameat2", "seccomp",
    "getrandom", "memfd_create", "kexec_file_load", "bpf", "execveat", "userfaultfd", "membarrier",
    "mlock2", "copy_file_range", "preadv2", "pwritev2", "pkey_mprotect", "pkey_alloc", "pkey_free", "statx",
    "io_pgetevents", "rseq",
];

/// The names from number 424 on.
#[rustfmt::skip]
const SECOND: [&str; 27] = [
    "pidfd_send_signal", "io_uring_setup", "io_uring_enter", "io_uring_register", "open_tree", "move_mount",
    "fsopen", "fsconfig", "fsmount", "fspick", "pidfd_open", "clone3", "close_range", "openat2",
    "pidfd_getfd", "faccessat2", "process_madvise", "epoll_pwait2", "mount_setattr", "quotactl_fd",
    "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self", "memfd_secret",
    "process_mrelease", "futex_waitv", "set_mempolicy_home_node",
];
const SECOND_START: u32 = 424;

/// The names in one text, each after a space. A program with the lists would relocate the address of each name at its start.
static FIRST_TEXT: [u8; length_of(&FIRST)] = joined(&FIRST);
static SECOND_TEXT: [u8; length_of(&SECOND)] = joined(&SECOND);

const fn length_of(names: &[&str]) -> usize {
    let (mut length, mut at) = (0, 0);
    while at < names.len() {
        length += 1 + names[at].len();
        at += 1;
    }
    length
}

const fn joined<const N: usize>(names: &[&str]) -> [u8; N] {
    let mut text = [b' '; N];
    let (mut end, mut at) = (0, 0);
    while at < names.len() {
        let name = names[at].as_bytes();
        // After the space.
        text.split_at_mut(end + 1).1.split_at_mut(name.len()).0.copy_from_slice(name);
        end += 1 + name.len();
        at += 1;
    }
    text
}

/// The name of a system call.
#[must_use]
pub fn name_of(number: u32) -> Option<&'static str> {
    let (text, at) = match number.checked_sub(SECOND_START) {
        Some(at) => (&SECOND_TEXT[..], at),
        None => (&FIRST_TEXT[..], number),
    };
    let name = text.split(|&byte| byte == b' ').skip(1).nth(usize::try_from(at).ok()?)?;
    std::str::from_utf8(name).ok().filter(|name| !name.is_empty())
}

/// The number of a system call, or [`u32::MAX`].
#[expect(clippy::cast_possible_truncation, reason = "`TryFrom` is not const; there are few hundred names")]
pub(super) const fn number_of(name: &str) -> u32 {
    let mut at = 0;
    while at < FIRST.len() + SECOND.len() {
        let (own, number) = match at.checked_sub(FIRST.len()) {
            None => (FIRST[at], at),
            Some(at) => (SECOND[at], at + SECOND_START as usize),
        };
        if is_equal(own.as_bytes(), name.as_bytes()) && !name.is_empty() {
            return number as u32;
        }
        at += 1;
    }
    u32::MAX
}

const fn is_equal(one: &[u8], other: &[u8]) -> bool {
    let mut at = 0;
    while at < one.len() && at < other.len() && one[at] == other[at] {
        at += 1;
    }
    at == one.len() && at == other.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_c_library() {
        for (name, number) in [
            ("read", libc::SYS_read),
            ("getdents64", libc::SYS_getdents64),
            ("prlimit64", libc::SYS_prlimit64),
            ("statx", libc::SYS_statx),
            ("pidfd_send_signal", libc::SYS_pidfd_send_signal),
            ("epoll_pwait2", libc::SYS_epoll_pwait2),
            ("landlock_restrict_self", libc::SYS_landlock_restrict_self),
        ] {
            assert_eq!(i64::from(number_of(name)), number, "{name}");
            assert_eq!(name_of(u32::try_from(number).unwrap()), Some(name));
        }
        assert_eq!((name_of(335), name_of(400), name_of(u32::MAX)), (None, None, None));
        let all = (0..).zip(FIRST).chain((SECOND_START..).zip(SECOND));
        assert!(all.into_iter().all(|(number, name)| name_of(number).unwrap_or_default() == name));
        assert_eq!((number_of(""), number_of("nothing")), (u32::MAX, u32::MAX));
    }
}
