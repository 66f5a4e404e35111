//! The sandbox, which is entered before the first request of the guest is read.
//!
//! Access is confined to the folder twice: no request of a guest can name a file outside of it (`folder.rs`), and on a
//! host with Landlock the kernel does not let this process open one. The process keeps the rights of its user on the
//! files of the folder, and nothing else: no privileges, no network, and no execution of programs.

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError,
};
use rustix::fs::Mode;
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getpid, getrlimit, set_dumpable_behavior, setrlimit, umask,
};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;

/// Why the sandbox cannot be entered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot {what}")]
    Host { what: &'static str, source: io::Error },
    #[error("cannot restrict file access to the folder")]
    Landlock(#[from] RulesetError),
    #[error("cannot install the seccomp filter")]
    Seccomp(#[from] seccompiler::Error),
    #[error("cannot install the seccomp filter")]
    Filter(#[from] BackendError),
}

/// Maximum number of descriptors, and so of files that the guest has looked up: some hundred MiB of kernel memory.
const FILES_MAX: u64 = 1 << 18;

/// Drops all rights that are not needed to serve a folder.
pub(crate) fn enter(folder: BorrowedFd<'_>, is_read_only: bool) -> Result<(), Error> {
    let host = |what| move |error: rustix::io::Errno| Error::Host { what, source: error.into() };
    // The guest applies its own umask to the modes of new files.
    umask(Mode::empty());
    // Each file that the guest has looked up is a descriptor, which takes memory of the host's kernel. A privileged
    // process may raise its limit.
    let limit = |limit: Option<u64>| Rlimit { current: limit, maximum: limit };
    let own = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, limit(Some(FILES_MAX)))
        .or_else(|_| setrlimit(Resource::Nofile, limit(own.map(|own| own.min(FILES_MAX)))))
        .map_err(host("limit the number of descriptors"))?;
    set_no_new_privs(true).map_err(host("set no_new_privs"))?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .map_err(host("drop capabilities"))?;
    // A core dump would contain what the guest reads and writes, and other processes of the user could read it.
    setrlimit(Resource::Core, limit(Some(0))).map_err(host("limit core dumps"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(host("forbid core dumps"))?;
    confine_files(folder, is_read_only)?;
    confine_calls(is_read_only)
}

/// Restricts file access to the folder with Landlock. A kernel without Landlock has no restriction. Kernels before 5.19
/// would forbid renaming a file to another directory, so a writable folder is not restricted there.
fn confine_files(folder: BorrowedFd<'_>, is_read_only: bool) -> Result<(), RulesetError> {
    let reading: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::ReadDir;
    let never = AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock;
    let all = AccessFs::from_all(ABI::V5);
    let allowed = if is_read_only { reading } else { all & !never };
    let moves =
        Ruleset::default().set_compatibility(CompatLevel::HardRequirement).handle_access(AccessFs::Refer);
    if !is_read_only && moves.is_err() {
        return Ok(());
    }
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::BestEffort).handle_access(all)?;
    ruleset.create()?.add_rule(PathBeneath::new(folder, allowed))?.restrict_self()?;
    Ok(())
}

/// The allowed system calls: those on files, and those for memory management and the end of the process.
const CALLS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_close,
    libc::SYS_ppoll,
    libc::SYS_flock,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_readlinkat,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_getxattr,
    libc::SYS_listxattr,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The further calls for a folder that the guest can write. Landlock restricts those that change contents and names to the
/// folder, and no others: a server that a guest has taken over could change mode, times and attributes of other files of
/// its user. They are refused for a read-only folder.
const WRITING_CALLS: &[libc::c_long] = &[
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_chmod,
    libc::SYS_fchmodat,
    libc::SYS_utimensat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_symlinkat,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_setxattr,
    libc::SYS_removexattr,
];

/// The allowed commands of fcntl: none that makes the kernel send signals.
const FCNTL: &[libc::c_int] =
    &[libc::F_GETFD, libc::F_GETFL, libc::F_DUPFD_CLOEXEC, libc::F_OFD_GETLK, libc::F_OFD_SETLK];

fn confine_calls(is_read_only: bool) -> Result<(), Error> {
    let rule = |index, operation, value: u64| {
        let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, operation, value)?;
        SeccompRule::new(vec![condition])
    };
    let argument = |index, value| rule(index, SeccompCmpOp::Eq, value);
    let writing = if is_read_only { &[] } else { WRITING_CALLS };
    let mut rules: BTreeMap<_, _> = CALLS.iter().chain(writing).map(|call| (*call, Vec::new())).collect();
    let executable = u64::from(libc::PROT_EXEC.unsigned_abs());
    rules.insert(libc::SYS_mmap, vec![rule(2, SeccompCmpOp::MaskedEq(executable), 0)?]);
    let commands = FCNTL.iter().map(|command| argument(1, u64::from(command.unsigned_abs())));
    rules.insert(libc::SYS_fcntl, commands.collect::<Result<_, _>>()?);
    // An abort sends a signal to the process itself.
    let own = u64::from(getpid().as_raw_pid().unsigned_abs());
    rules.insert(libc::SYS_tgkill, vec![argument(0, own)?]);
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let filter = SeccompFilter::new(rules, refused, SeccompAction::Allow, TargetArch::x86_64)?;
    let program: BpfProgram = filter.try_into()?;
    Ok(apply_filter(&program)?)
}

#[cfg(test)]
#[expect(unsafe_code, reason = "these system calls have no safe interface")]
mod tests {
    use super::*;

    /// The error of a system call in a thread with the filter, or none if it succeeds.
    fn confined(call: fn() -> libc::c_long) -> Option<i32> {
        confined_to(false, call)
    }

    fn confined_to(is_read_only: bool, call: fn() -> libc::c_long) -> Option<i32> {
        let thread = std::thread::spawn(move || {
            set_no_new_privs(true).unwrap();
            confine_calls(is_read_only).unwrap();
            (call() == -1).then(|| io::Error::last_os_error().raw_os_error().unwrap())
        });
        thread.join().unwrap()
    }

    #[test]
    fn signals_to_other_processes_are_forbidden() {
        // SAFETY: signal 0 does nothing.
        let own = || unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), 0) };
        assert_eq!(confined(own), None);
        // SAFETY: the same.
        let first = || unsafe { libc::syscall(libc::SYS_tgkill, 1, 1, 0) };
        assert_eq!(confined(first), Some(libc::EPERM));
        // SAFETY: the call only affects its descriptor.
        let owner = || unsafe { libc::c_long::from(libc::fcntl(0, libc::F_SETOWN, 1)) };
        assert_eq!(confined(owner), Some(libc::EPERM));
    }

    #[test]
    fn a_server_of_a_read_only_folder_changes_no_file() {
        const PATH: *const libc::c_char = c"/nonexistent".as_ptr();
        // SAFETY: the calls read a path, and there is no file of this name.
        let calls: [fn() -> libc::c_long; 5] = [
            || unsafe { libc::syscall(libc::SYS_chmod, PATH, 0o777) },
            || unsafe { libc::syscall(libc::SYS_utimensat, libc::AT_FDCWD, PATH, 0, 0) },
            || unsafe { libc::syscall(libc::SYS_setxattr, PATH, PATH, PATH, 1, 0) },
            || unsafe { libc::syscall(libc::SYS_removexattr, PATH, PATH) },
            || unsafe { libc::syscall(libc::SYS_unlinkat, libc::AT_FDCWD, PATH, 0) },
        ];
        for call in calls {
            assert_eq!(confined_to(true, call), Some(libc::EPERM));
            assert_eq!(confined_to(false, call), Some(libc::ENOENT));
        }
    }

    #[test]
    fn memory_cannot_be_executable() {
        // SAFETY: the kernel chooses the address.
        let readable = || unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::syscall(libc::SYS_mmap, 0, 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        // SAFETY: the same.
        let executable = || unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::syscall(libc::SYS_mmap, 0, 4096, libc::PROT_READ | libc::PROT_EXEC, flags, -1, 0)
        };
        assert_eq!(confined(readable), None);
        assert_eq!(confined(executable), Some(libc::EPERM));
    }
}
