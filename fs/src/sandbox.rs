//! What this process gives up before it hears the guest's first word.
//!
//! The folder is guarded twice: no request of a guest can name anything outside it (`folder.rs`), and where the host has
//! Landlock, the kernel would not let this process open it either. It keeps the rights of its user on the folder's
//! files, and nothing else: no privileges, no network, no other program.

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError,
};
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, getpid, getrlimit, setrlimit, umask};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;

/// Why this process cannot give something up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot give up {what}")]
    Host { what: &'static str, source: io::Error },
    #[error("cannot confine itself to its folder")]
    Landlock(#[from] RulesetError),
    #[error("cannot confine its system calls")]
    Seccomp(#[from] seccompiler::Error),
    #[error("cannot confine its system calls")]
    Filter(#[from] BackendError),
}

/// Files that a guest can know at a time: some hundred MiB of the host's kernel.
const FILES_MAX: u64 = 1 << 18;

/// Gives up everything that serving a folder does not need.
pub(crate) fn enter(folder: BorrowedFd<'_>, is_read_only: bool) -> Result<(), Error> {
    let host = |what| move |error: rustix::io::Errno| Error::Host { what, source: error.into() };
    // Modes of new files are as the guest says, which has a umask of its own.
    umask(Mode::empty());
    // Each file that the guest knows is a descriptor, and memory of the host's kernel. Root may have more than it was
    // started with.
    let limit = |limit: Option<u64>| Rlimit { current: limit, maximum: limit };
    let own = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, limit(Some(FILES_MAX)))
        .or_else(|_| setrlimit(Resource::Nofile, limit(own.map(|own| own.min(FILES_MAX)))))
        .map_err(host("its limit of descriptors"))?;
    set_no_new_privs(true).map_err(host("new privileges"))?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .map_err(host("its capabilities"))?;
    confine_files(folder, is_read_only)?;
    confine_calls()
}

/// Lets this process open nothing outside the folder. A kernel without Landlock allows all, and one before 5.19 could
/// not let a file move from one directory to another, so that a folder that is written is not confined there.
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

/// System calls that remain: those on files, and what memory and the end of the program need.
const CALLS: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
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
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
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
    libc::SYS_getxattr,
    libc::SYS_setxattr,
    libc::SYS_listxattr,
    libc::SYS_removexattr,
    libc::SYS_brk,
    libc::SYS_mmap,
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

/// What of fcntl remains: nothing that would make the kernel send signals.
const FCNTL: &[libc::c_int] =
    &[libc::F_GETFD, libc::F_GETFL, libc::F_DUPFD_CLOEXEC, libc::F_OFD_GETLK, libc::F_OFD_SETLK];

fn confine_calls() -> Result<(), Error> {
    let argument = |index, value: u64| {
        let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?;
        SeccompRule::new(vec![condition])
    };
    let mut rules: BTreeMap<_, _> = CALLS.iter().map(|call| (*call, Vec::new())).collect();
    let commands = FCNTL.iter().map(|command| argument(1, u64::from(command.unsigned_abs())));
    rules.insert(libc::SYS_fcntl, commands.collect::<Result<_, _>>()?);
    // A program that gives up does it by a signal to itself.
    let own = u64::from(getpid().as_raw_pid().unsigned_abs());
    rules.insert(libc::SYS_tgkill, vec![argument(0, own)?]);
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let filter = SeccompFilter::new(rules, refused, SeccompAction::Allow, TargetArch::x86_64)?;
    let program: BpfProgram = filter.try_into()?;
    Ok(apply_filter(&program)?)
}

#[cfg(test)]
#[expect(unsafe_code, reason = "calls that no safe function makes")]
mod tests {
    use super::*;

    /// The result of a call that a thread makes when it is confined.
    fn confined(call: fn() -> libc::c_long) -> Option<i32> {
        let thread = std::thread::spawn(move || {
            set_no_new_privs(true).unwrap();
            confine_calls().unwrap();
            (call() == -1).then(|| io::Error::last_os_error().raw_os_error().unwrap())
        });
        thread.join().unwrap()
    }

    #[test]
    fn a_signal_goes_to_nobody_else() {
        // SAFETY: signal 0 does nothing.
        let own = || unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), 0) };
        assert_eq!(confined(own), None);
        // SAFETY: the same.
        let first = || unsafe { libc::syscall(libc::SYS_tgkill, 1, 1, 0) };
        assert_eq!(confined(first), Some(libc::EPERM));
        // SAFETY: the call has no effect but on its descriptor.
        let owner = || unsafe { libc::c_long::from(libc::fcntl(0, libc::F_SETOWN, 1)) };
        assert_eq!(confined(owner), Some(libc::EPERM));
    }
}
