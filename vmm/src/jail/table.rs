//! The system calls that each thread may execute while the guest runs, with the reason for each.
//!
//! `cargo xtask jail` prints this table. All other calls are refused: among them those that open a path or a socket, that
//! start a process, a thread or a program, and that make memory executable.

use super::names;

/// A thread of a monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Thread {
    /// Runs a vCPU, and handles its exits.
    Vcpu,
    /// The process's first thread: waits for events, and serves the devices and the front.
    EventLoop,
    /// Executes file operations that block, one after the other, on hosts without io_uring.
    Worker,
    /// Any thread of a monitor that pre-boots a kernel: it boots one guest after the other, and so creates machines and
    /// threads while guests run.
    Preboot,
}

impl Thread {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Vcpu, Self::EventLoop, Self::Worker, Self::Preboot];

    /// The name of the thread in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vcpu => "a vCPU",
            Self::EventLoop => "the event loop",
            Self::Worker => "the file worker",
            Self::Preboot => "a pre-boot",
        }
    }

    /// Whether this thread is one of these.
    pub(super) const fn is_among(self, threads: &[Self]) -> bool {
        let mut at = 0;
        while at < threads.len() {
            if threads[at] as u8 == self as u8 {
                return true;
            }
            at += 1;
        }
        false
    }

    /// The calls that this thread may execute.
    pub fn calls(self) -> impl Iterator<Item = &'static Call> {
        TABLE.iter().filter(move |call| call.threads.contains(&self))
    }
}

/// A system call that threads may execute.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Call {
    /// The name, as in the manual.
    pub name: &'static str,
    /// The number on x86-64.
    pub number: u32,
    /// The threads that may execute it.
    pub threads: &'static [Thread],
    /// What its arguments must be.
    pub rule: Rule,
    /// What it is for.
    pub reason: &'static str,
}

/// What the arguments of a call must be. Arguments count from 0, and their low 32 bits are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rule {
    /// Anything.
    Any,
    /// This argument is one of these values.
    OneOf(u32, &'static [u32]),
    /// This argument is the ID of the monitor's own process.
    OwnProcess(u32),
    /// The call fails, as on a kernel that does not have it (ENOSYS), and its caller does without it.
    Absent,
}

/// KVM's requests for machines and vCPUs that are created, saved and restored (include/uapi/linux/kvm.h): all that
/// `crate::kvm` uses, and none that creates a device.
#[rustfmt::skip]
const KVM_OF_PREBOOT: &[u32] = &[
    0xae00, 0xae01, 0xae03, 0xae04, // KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_CHECK_EXTENSION, KVM_GET_VCPU_MMAP_SIZE
    0xc004_ae02, 0xc008_ae05, // KVM_GET_MSR_INDEX_LIST, KVM_GET_SUPPORTED_CPUID
    0xae41, 0x4020_ae46, 0xae47, 0x4008_ae48, // KVM_CREATE_VCPU, KVM_SET_USER_MEMORY_REGION, _TSS_ADDR, _IDENTITY_MAP_ADDR
    0xae60, 0x4010_ae67, 0x4008_ae6a, // KVM_CREATE_IRQCHIP, KVM_REGISTER_COALESCED_MMIO, KVM_SET_GSI_ROUTING
    0x4020_ae76, 0x4040_ae79, // KVM_IRQFD, KVM_IOEVENTFD
    0x4030_ae7b, 0x8030_ae7c, // KVM_SET_CLOCK, KVM_GET_CLOCK
    KVM_RUN, KVM_GET_REGS, 0x4090_ae82, KVM_GET_SREGS, 0x4138_ae84, // KVM_SET_REGS, KVM_SET_SREGS
    0xc018_ae85, 0xc008_ae88, 0x4008_ae89, // KVM_TRANSLATE, KVM_GET_MSRS, KVM_SET_MSRS
    0x8400_ae8e, 0x4400_ae8f, 0x4008_ae90, // KVM_GET_LAPIC, KVM_SET_LAPIC, KVM_SET_CPUID2
    0x8004_ae98, 0x4004_ae99, 0x8040_ae9f, 0x4040_aea0, // KVM_GET_MP_STATE, _SET_, KVM_GET_VCPU_EVENTS, _SET_
    0x8080_aea1, 0x4080_aea2, 0xaea2, 0xaea3, 0x4068_aea3, // KVM_GET_DEBUGREGS, _SET_, KVM_SET_TSC_KHZ, _GET_, KVM_ENABLE_CAP
    0x9000_aea4, 0x5000_aea5, 0x8188_aea6, 0x4188_aea7, // KVM_GET_XSAVE, _SET_, KVM_GET_XCRS, _SET_
    KVM_KVMCLOCK_CTRL, 0x4188_aec6, // KVM_X86_SET_MSR_FILTER
    FIONBIO,
];

/// KVM's requests for a machine that runs (include/uapi/linux/kvm.h).
const KVM_RUN: u32 = 0xae80;
const KVM_GET_REGS: u32 = 0x8090_ae81;
const KVM_GET_SREGS: u32 = 0x8138_ae83;
const KVM_KVMCLOCK_CTRL: u32 = 0xaead;
const KVM_GET_CLOCK: u32 = 0x8030_ae7c;
const KVM_SET_GSI_ROUTING: u32 = 0x4008_ae6a;
/// A tap's offloads (include/uapi/linux/if_tun.h).
const TUNSETOFFLOAD: u32 = 0x4004_54d0;

/// The flags of clone for a thread (glibc's nptl/pthread_create.c): memory, files and signal handlers are shared.
const CLONE_OF_THREAD: u32 = 0x3d_0f00;
/// The C library's own signals, and its `SIGRTMIN`. Not SIGSYS: a refused call ends the process.
const SIGNALS: &[u32] = &[32, 33, 34];
/// Commands of fcntl: F_GETFD to F_SETFL, and F_DUPFD_CLOEXEC (include/uapi/linux/fcntl.h), none of which makes the kernel
/// send signals.
const FCNTL: &[u32] = &[1, 2, 3, 4, 1030];
/// A thread's name, and the process's auxiliary vector (include/uapi/linux/prctl.h).
const SET_NAME: u32 = 15;
const GET_AUXV: u32 = 0x4155_5856;
/// Non-blocking reads of a pipe (include/uapi/asm-generic/ioctls.h).
const FIONBIO: u32 = 0x5421;

const DONTNEED: u32 = libc::MADV_DONTNEED as u32;
const POPULATE: u32 = libc::MADV_POPULATE_WRITE as u32;

const VCPU: &[Thread] = &[Thread::Vcpu];
const ONLY_LOOP: &[Thread] = &[Thread::EventLoop];
const LOOP: &[Thread] = &[Thread::EventLoop, Thread::Preboot];
const THREADS: &[Thread] = &[Thread::Vcpu, Thread::Worker, Thread::Preboot];
const FILES: &[Thread] = &[Thread::EventLoop, Thread::Worker, Thread::Preboot];
const RUNNING: &[Thread] = &[Thread::Vcpu, Thread::EventLoop, Thread::Worker];
const PREBOOT: &[Thread] = &[Thread::Preboot];
const EVERY: &[Thread] = &Thread::ALL;

const fn call(name: &'static str, threads: &'static [Thread], rule: Rule, reason: &'static str) -> Call {
    Call { name, number: names::number_of(name), threads, rule, reason }
}

/// The system calls that threads may execute.
#[rustfmt::skip]
pub const TABLE: &[Call] = &[
    call("ioctl", VCPU,
        Rule::OneOf(1, &[
            KVM_RUN, KVM_GET_REGS, KVM_GET_SREGS, KVM_KVMCLOCK_CTRL, KVM_SET_GSI_ROUTING,
            0xc008_ae88, 0x8400_ae8e, 0x8004_ae98, 0x8040_ae9f, // KVM_GET_MSRS, _LAPIC, _MP_STATE, _VCPU_EVENTS
            0x8080_aea1, 0xaea3, 0x9000_aea4, 0x8188_aea6, // KVM_GET_DEBUGREGS, _TSC_KHZ, _XSAVE, _XCRS
        ]),
        "runs the guest; routes interrupts as its drivers ask; reads registers for snapshots, and for the report of a failure"),
    call("ioctl", ONLY_LOOP, Rule::OneOf(1, &[TUNSETOFFLOAD, FIONBIO, KVM_GET_CLOCK]),
        "the offloads of a tap that the guest's driver accepts; the last messages of a file server that has ended; the clock of \
         a snapshot"),
    call("preadv2", VCPU, Rule::Any, "reads of disks that the host has in memory"),
    call("pwritev2", VCPU, Rule::Any, "writes of disks that the host takes into memory"),
    call("preadv2", FILES, Rule::Any, "reads of disks"),
    call("pwritev2", FILES, Rule::Any, "writes of disks"),
    call("fdatasync", FILES, Rule::Any, "flushes of disks and persistent memory"),
    call("fallocate", FILES, Rule::Any, "discards and zeroes of disks"),
    call("fstat", LOOP, Rule::Any, "whether a disk is sparse, before it is zeroed; whether a mapped file was truncated"),
    call("io_uring_enter", ONLY_LOOP, Rule::Any,
        "file operations of disks, by rings that are restricted to these operations before the guest runs"),
    call("readv", LOOP, Rule::Any, "packets of a tap or of passt"),
    call("writev", LOOP, Rule::Any, "packets to a tap or to passt"),
    call("sendmsg", VCPU, Rule::Any, "requests to file servers"),
    call("sendmsg", LOOP, Rule::Any, "data of vsock connections, packets to passt, requests to file servers"),
    call("recvmsg", LOOP, Rule::Any, "data of vsock connections, replies of file servers, requests of the front"),
    call("sendto", LOOP, Rule::Any, "data of vsock connections, events for the front"),
    call("recvfrom", LOOP, Rule::Any, "data of vsock connections, packets of passt, requests of the front"),
    call("accept4", LOOP, Rule::Any, "connections of the front to the guest's vsock"),
    call("shutdown", LOOP, Rule::Any, "the end of one direction of a vsock connection"),
    call("close", LOOP, Rule::Any, "the end of a vsock connection"),
    call("read", LOOP, Rule::Any, "counters of eventfds, changes of mapped files"),
    call("write", EVERY, Rule::Any, "interrupts to the guest and doorbells between threads, by eventfds"),
    call("pwrite64", LOOP, Rule::Any, "the exit status of a detached guest"),
    call("epoll_pwait", LOOP, Rule::Any, "waits for events"),
    call("epoll_pwait2", LOOP, Rule::Any, "waits for events until a time"),
    call("epoll_ctl", LOOP, Rule::Any, "which events are waited for"),
    call("poll", LOOP, Rule::Any, "waits for the end of vCPUs"),
    call("ppoll", LOOP, Rule::Any, "waits for the end of vCPUs until a time"),
    call("getrandom", LOOP, Rule::Any, "random numbers for the guest's entropy device"),
    call("tgkill", LOOP, Rule::OwnProcess(0), "makes vCPUs leave the guest"),
    call("getpid", LOOP, Rule::Any, "the same: the C library asks for the argument of tgkill"),
    call("madvise", RUNNING, Rule::OneOf(2, &[DONTNEED, POPULATE]),
        "memory that the guest's balloon returns, and that a pre-booted kernel is going to write; the stack of a thread \
         that ends"),
    call("futex", EVERY, Rule::Any, "locks between threads"),
    call("clock_gettime", EVERY, Rule::Any, "the time, on hosts whose clock cannot be read without a system call"),
    call("restart_syscall", EVERY, Rule::Any, "the rest of a wait that a stop of the process has interrupted"),
    call("brk", EVERY, Rule::Any, "memory of the monitor"),
    call("rt_sigreturn", EVERY, Rule::Any, "the end of a signal handler"),
    call("rt_sigprocmask", EVERY, Rule::Any, "the end of a thread, and signals to one"),
    call("exit", THREADS, Rule::Any, "the end of a thread"),
    call("exit_group", EVERY, Rule::Any, "the end of the process"),
    call("ioctl", PREBOOT, Rule::OneOf(1, KVM_OF_PREBOOT), "creates the machines of trial guests, and reads their state"),
    call("mmap", PREBOOT, Rule::OneOf(2, &[0, 1, 2, 3]), "guest memory and stacks, never executable"),
    call("mprotect", PREBOOT, Rule::OneOf(2, &[0, 1, 2, 3]), "stacks of threads"),
    call("munmap", PREBOOT, Rule::Any, "guest memory and stacks of guests that have ended"),
    call("madvise", PREBOOT, Rule::Any, "which memory is populated, and dumped"),
    call("clone3", PREBOOT, Rule::Absent, "threads; a filter cannot read the flags, and clone can do the same"),
    call("clone", PREBOOT, Rule::OneOf(0, &[CLONE_OF_THREAD]), "threads of vCPUs"),
    call("rseq", PREBOOT, Rule::Any, "the start of a thread"),
    call("set_robust_list", PREBOOT, Rule::Any, "the same"),
    call("gettid", PREBOOT, Rule::Any, "the same"),
    call("prctl", PREBOOT, Rule::OneOf(0, &[SET_NAME, GET_AUXV]), "names of threads; the size of a page"),
    call("rt_sigaction", PREBOOT, Rule::OneOf(0, SIGNALS), "the signal that makes vCPUs leave the guest, and those of the C library"),
    call("eventfd2", PREBOOT, Rule::Any, "interrupts and doorbells"),
    call("epoll_create1", PREBOOT, Rule::Any, "an event loop for each guest"),
    call("io_uring_setup", PREBOOT, Rule::Absent, "file operations of disks, for which a thread is enough here"),
    call("memfd_create", PREBOOT, Rule::Any, "memory whose pages can be compared"),
    call("inotify_init1", PREBOOT, Rule::Any, "changes of mapped files"),
    call("inotify_add_watch", PREBOOT, Rule::Any, "changes of mapped files"),
    call("fcntl", PREBOOT, Rule::OneOf(1, FCNTL), "duplicates of descriptors"),
    call("statx", PREBOOT, Rule::Any, "lengths of files"),
    call("fstatfs", PREBOOT, Rule::Any, "whether a file is in memory"),
    call("lseek", PREBOOT, Rule::Any, "which parts of a file have data"),
    call("ftruncate", PREBOOT, Rule::Any, "the length of the pre-booted kernel's file"),
    call("pread64", PREBOOT, Rule::Any, "the kernel's file, and which pages were written"),
    call("readlinkat", PREBOOT, Rule::Any, "paths of mapped files, for reports"),
    call("sched_yield", PREBOOT, Rule::Any, "waits for a vCPU"),
    call("nanosleep", PREBOOT, Rule::Any, "the same"),
    call("clock_nanosleep", PREBOOT, Rule::Any, "the same"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thread_has_a_call_once_with_a_known_number() {
        for thread in Thread::ALL {
            let mut numbers: Vec<_> = thread.calls().map(|call| call.number).collect();
            let count = numbers.len();
            assert!(!numbers.contains(&u32::MAX), "{thread:?}");
            numbers.sort_unstable();
            numbers.dedup();
            assert_eq!(numbers.len(), count, "{thread:?}");
        }
    }

    /// Calls that would undo the jail, or give the guest the host's kernel to play with.
    #[rustfmt::skip]
    const FORBIDDEN: &[&str] = &[
            "open",
            "openat",
            "openat2",
            "open_by_handle_at",
            "creat",
            "socket",
            "socketpair",
            "connect",
            "bind",
            "listen",
            "clone",
            "clone3",
            "fork",
            "vfork",
            "execve",
            "execveat",
            "mprotect",
            "pkey_mprotect",
            "ptrace",
            "process_vm_readv",
            "process_vm_writev",
            "prctl",
            "seccomp",
            "rt_sigaction",
            "bpf",
            "perf_event_open",
            "userfaultfd",
            "io_uring_setup",
            "io_uring_register",
            "keyctl",
            "add_key",
            "mount",
            "umount2",
            "pivot_root",
            "chroot",
            "setns",
            "unshare",
            "kill",
            "pidfd_open",
            "pidfd_getfd",
            "pidfd_send_signal",
            "memfd_create",
            "setuid",
            "setgid",
            "capset",
            "setrlimit",
            "prlimit64",
            "readlink",
            "readlinkat",
            "unlink",
            "rename",
            "init_module",
            "kexec_load",
            "reboot",
            "personality",
            "modify_ldt",
            "arch_prctl",
            "iopl",
            "ioperm",
            "fchmod",
            "fchown",
            "ftruncate",
            "sendmmsg",
            "splice",
            "vmsplice",
            "tee",
            "timer_create",
            "shmget",
    ];

    /// Those of them that a monitor needs to start one trial guest after the other.
    #[rustfmt::skip]
    const CREATES_GUESTS: &[&str] = &[
        "clone", "mprotect", "prctl", "rt_sigaction", "memfd_create", "ftruncate", "readlinkat",
    ];

    #[test]
    fn no_thread_opens_connects_starts_or_executes_anything() {
        for &name in FORBIDDEN {
            assert!(names::number_of(name) != u32::MAX, "{name} is no system call");
            let allowed: &[_] = if CREATES_GUESTS.contains(&name) { PREBOOT } else { &[] };
            let mut calls = TABLE.iter().filter(|call| call.name == name && call.rule != Rule::Absent);
            assert!(calls.all(|call| call.threads == allowed), "{name}");
        }
    }
}
