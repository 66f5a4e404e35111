//! The sandbox, which the program enters before it reads the first byte of an image or of a registry.
//!
//! Archives and registries are not trusted: one may take over the parser that reads it. The process keeps
//! the right to write to the cache and to read the image, and nothing else: no other file, no program, no other process,
//! and no network unless the image is in a registry. `docs/security.md` lists the layers.

use kindling_oci::Reads;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope, path_beneath_rules,
};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getpid, getrlimit, set_dumpable_behavior, setrlimit,
};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter, sock_filter,
};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// Why the sandbox cannot be entered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot {what}")]
    Host { what: &'static str, source: io::Error },
    #[error("cannot restrict file access to the cache and the image")]
    Landlock(#[from] RulesetError),
    #[error("cannot install the seccomp filter")]
    Seccomp(#[from] seccompiler::Error),
    #[error("cannot install the seccomp filter")]
    Filter(#[from] BackendError),
}

/// Drops all rights but those to write to the cache and to read an image.
pub(crate) fn enter(cache: &Path, reads: &Reads) -> Result<(), Error> {
    let host = |what| move |error: Errno| Error::Host { what, source: error.into() };
    limit_resources().map_err(host("limit memory, time and files"))?;
    // The memory has the passwords of registries.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(host("protect the memory"))?;
    set_no_new_privs(true).map_err(host("set no_new_privs"))?;
    drop_capabilities(&reads.paths).map_err(host("drop capabilities"))?;
    confine_files(cache, reads)?;
    refuse_calls()?;
    confine_calls(reads.registry)
}

/// Resource limits, all well above the needs of the largest image that the library accepts.
const LIMITS: [(Resource, u64); 5] = [
    (Resource::Core, 0),
    // A GiB for the tree, and 0.8 GiB for a decompressor with its largest window (`MAX_WINDOW` in compression.rs) and
    // what the C library reserves for each thread; and as much again.
    (Resource::As, 4 << 30),
    // A TiB of data (`MAX_DATA` in layer.rs), and the filesystem around it.
    (Resource::Fsize, 2 << 40),
    (Resource::Nofile, 256),
    // Layers of 256 GiB (`MAX_UNPACKED` in layer.rs) at 3 MiB per second of processor time: bzip2 on a slow machine.
    (Resource::Cpu, 24 * 60 * 60),
];

fn limit_resources() -> rustix::io::Result<()> {
    LIMITS.into_iter().try_for_each(|(resource, limit)| {
        let own = getrlimit(resource);
        let lower = |own: Option<u64>| Some(own.map_or(limit, |own| own.min(limit)));
        setrlimit(resource, Rlimit { current: lower(own.current), maximum: lower(own.maximum) })
    })
}

/// Drops all capabilities, unless one of the paths needs one.
///
/// Root expects to use an image that only another user can read: `docker save` writes its archive with mode 0600, and
/// home directories are private. For such a path, root keeps the capability to read all files, which Landlock confines to
/// the image and the cache. The capability to write all files is not needed: the cache of root belongs to root.
fn drop_capabilities(paths: &[PathBuf]) -> rustix::io::Result<()> {
    let none = CapabilitySet::empty();
    let reader = capabilities(None)?.permitted & CapabilitySet::DAC_READ_SEARCH;
    set_capabilities(None, CapabilitySets { effective: none, permitted: reader, inheritable: none })?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let is_denied = |path: &PathBuf| matches!(open(path, flags, Mode::empty()), Err(Errno::ACCESS));
    let kept = if paths.iter().any(is_denied) { reader } else { none };
    set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable: none })
}

/// Restricts access to files with Landlock, and to TCP ports and to processes outside where the kernel can do so. A
/// kernel without Landlock has no restriction.
fn confine_files(cache: &Path, reads: &Reads) -> Result<(), RulesetError> {
    let reading: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::ReadDir;
    let writing = reading
        | (AccessFs::WriteFile | AccessFs::Truncate)
        | (AccessFs::MakeReg | AccessFs::MakeDir)
        | (AccessFs::RemoveFile | AccessFs::RemoveDir);
    // A registry may redirect to any port.
    let network = if reads.registry { AccessNet::BindTcp.into() } else { AccessNet::from_all(ABI::V4) };
    // Landlock has no rules for pipes, which a certificate file may be, and does not restrict them.
    let is_restricted = |path: &&PathBuf| path.is_file() || path.is_dir();
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(network)?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .add_rules(path_beneath_rules([cache], writing))?
        .add_rules(path_beneath_rules(reads.paths.iter().filter(is_restricted), reading))?
        .restrict_self()?;
    Ok(())
}

/// The system calls that are allowed for all images: those on files, memory and threads, and those that the C library
/// makes for them. Older variants are listed because some C libraries use them.
const CALLS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_flock,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_utimensat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_rmdir,
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_sysinfo,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The system calls that are allowed for images of registries, too. The C library binds the sockets by which it resolves
/// names; none can be listened on.
const NETWORK_CALLS: &[libc::c_long] = &[
    libc::SYS_socket,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_uname,
];

/// The allowed commands of fcntl: none that makes the kernel send signals.
const FCNTL: [libc::c_int; 5] =
    [libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL, libc::F_DUPFD_CLOEXEC];

/// The allowed commands of ioctl, for images of registries: how much has arrived at a socket, and whether it blocks.
const IOCTL: [libc::c_ulong; 2] = [libc::FIONREAD, libc::FIONBIO];

type Rules = BTreeMap<libc::c_long, Vec<SeccompRule>>;

/// A rule for an argument of a system call.
fn argument(index: u8, operation: SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(index, SeccompCmpArgLen::Dword, operation, value)?])
}

/// Makes optional system calls of the C library fail with ENOSYS, as on a kernel without them.
fn refuse_calls() -> Result<(), Error> {
    let family = |family: libc::c_int| {
        SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, u64::from(family.unsigned_abs()))
    };
    let executable = u64::from(libc::PROT_EXEC.unsigned_abs());
    let executable = || argument(2, SeccompCmpOp::MaskedEq(executable), executable);
    let rules = BTreeMap::from([
        // A filter cannot read the flags of clone3, and clone can do the same.
        (libc::SYS_clone3, Vec::new()),
        // Modules of the C library that resolve names by other means.
        (libc::SYS_mmap, vec![executable()?]),
        (libc::SYS_mprotect, vec![executable()?]),
        // The C library's queries to nscd, and over netlink for the host's addresses.
        (libc::SYS_socket, vec![SeccompRule::new(vec![family(libc::AF_INET)?, family(libc::AF_INET6)?])?]),
    ]);
    let refused = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    install(rules, SeccompAction::Allow, refused)
}

/// Makes all system calls but those in the lists end the process.
fn confine_calls(has_network: bool) -> Result<(), Error> {
    let network = if has_network { NETWORK_CALLS } else { &[] };
    let mut rules: Rules = CALLS.iter().chain(network).map(|call| (*call, Vec::new())).collect();
    let equal = |index, value| argument(index, SeccompCmpOp::Eq, value);
    let commands = FCNTL.iter().map(|command| equal(1, u64::from(command.unsigned_abs())));
    rules.insert(libc::SYS_fcntl, commands.collect::<Result<_, _>>()?);
    if has_network {
        rules.insert(
            libc::SYS_ioctl,
            IOCTL.iter().map(|command| equal(1, *command)).collect::<Result<_, _>>()?,
        );
    }
    // A thread, and not a process. `refuse_calls` makes clone3 fail, unless this filter ends the process for it.
    rules.insert(libc::SYS_clone3, Vec::new());
    let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
    rules.insert(libc::SYS_clone, vec![argument(0, SeccompCmpOp::MaskedEq(thread), thread)?]);
    // An abort sends a signal to the process itself.
    rules.insert(libc::SYS_tgkill, vec![equal(0, u64::from(getpid().as_raw_pid().unsigned_abs()))?]);
    install(rules, SeccompAction::KillProcess, SeccompAction::Allow)
}

fn install(rules: Rules, others: SeccompAction, these: SeccompAction) -> Result<(), Error> {
    /// X = A (include/uapi/linux/bpf_common.h), without effect here. The kernel runs a new filter for each system call
    /// that exists, to find those that are always allowed, but follows none beyond this instruction
    /// (`seccomp_is_const_allow` in kernel/seccomp.c): for a list this long that takes a millisecond, and saves little.
    const A_TO_X: u16 = 0x07;
    let mut program: BpfProgram = SeccompFilter::new(rules, others, these, TargetArch::x86_64)?.try_into()?;
    program.insert(0, sock_filter { code: A_TO_X, jt: 0, jf: 0, k: 0 });
    Ok(apply_filter(&program)?)
}

#[cfg(test)]
mod tests;
