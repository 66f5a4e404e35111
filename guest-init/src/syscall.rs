//! System calls for which rustix has no suitable safe wrapper: port permissions, signals, fork and exec. The numbers
//! are those of arch/x86/entry/syscalls.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use core::arch::asm;
use core::ffi::CStr;
use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};

const RT_SIGPROCMASK: usize = 14;
const IOCTL: usize = 16;
const FORK: usize = 57;
const EXECVE: usize = 59;
const KILL: usize = 62;
const RT_SIGTIMEDWAIT: usize = 128;
const SYSLOG: usize = 103;
const UNSHARE: usize = 272;
const SIGNALFD4: usize = 289;
const CLOSE_RANGE: usize = 436;
const IOPL: usize = 172;
const EXIT_GROUP: usize = 231;

/// Makes a system call of up to four arguments.
///
/// # Safety
/// The call may do to this process whatever the kernel documents for these arguments.
unsafe fn call(number: usize, arguments: [usize; 4]) -> Result<usize, Errno> {
    let result: isize;
    // SAFETY: the instruction clobbers only rcx and r11; the caller promises the rest.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") arguments[0],
             in("rsi") arguments[1], in("rdx") arguments[2], in("r10") arguments[3],
             lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    match result {
        0.. => Ok(result.unsigned_abs()),
        _ => Err(Errno::from_raw_os_error(i32::try_from(-result).unwrap_or(i32::MAX))),
    }
}

/// A set of signals, in the kernel's layout.
#[derive(Clone, Copy)]
pub(crate) struct SignalSet(u64);

impl SignalSet {
    const SIZE: usize = size_of::<u64>();

    /// The set of these signals.
    pub(crate) fn of(signals: impl IntoIterator<Item = Signal>) -> Self {
        Self(signals.into_iter().fold(0, |set, signal| set | 1 << (signal.as_raw() - 1)))
    }

    /// Replaces the signal mask of this process by this set.
    pub(crate) fn block(self) -> Result<(), Errno> {
        const SIG_SETMASK: usize = 2;
        // SAFETY: the kernel reads the set, and blocking signals affects no memory.
        unsafe { call(RT_SIGPROCMASK, [SIG_SETMASK, (&raw const self.0).addr(), 0, Self::SIZE]) }?;
        Ok(())
    }

    /// Waits for one of the signals, which must be blocked, and consumes it.
    pub(crate) fn wait(self) -> Result<Signal, Errno> {
        // SAFETY: the kernel reads the set; the pointers to details and a timeout are null.
        let number = unsafe { call(RT_SIGTIMEDWAIT, [(&raw const self.0).addr(), 0, 0, Self::SIZE]) }?;
        i32::try_from(number).ok().and_then(Signal::from_named_raw).ok_or(Errno::INVAL)
    }
}

/// Creates a descriptor that is readable while one of these signals is pending. The signals must be blocked.
pub(crate) fn signalfd(signals: SignalSet) -> Result<OwnedFd, Errno> {
    const NEW: usize = usize::MAX;
    const FLAGS: usize = 0o4000 | 0o2_000_000; // SFD_NONBLOCK | SFD_CLOEXEC
    // SAFETY: the kernel reads the set.
    let fd = unsafe { call(SIGNALFD4, [NEW, (&raw const signals.0).addr(), SignalSet::SIZE, FLAGS]) }?;
    // SAFETY: the descriptor is new, and this is its only owner.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).map_err(|_| Errno::BADF)?) })
}

/// Forks this process. Returns `None` in the child, and the child's process id in the parent.
pub(crate) fn fork() -> Result<Option<Pid>, Errno> {
    // SAFETY: init has one thread, so that the child's copy of its memory is consistent.
    let child = unsafe { call(FORK, [0; 4]) }?;
    Ok(i32::try_from(child).ok().and_then(Pid::from_raw))
}

/// Sends a signal to a process or to its process group.
pub(crate) fn kill(process: Pid, signal: u8, to_group: bool) -> Result<(), Errno> {
    let id = isize::try_from(process.as_raw_pid()).unwrap_or(0);
    let target = if to_group { -id } else { id };
    // SAFETY: signals of other processes affect no memory of this one.
    unsafe { call(KILL, [target.cast_unsigned(), signal.into(), 0, 0]) }.map(drop)
}

/// Closes all descriptors except the standard streams, which are returned. For a child that continues to run init's
/// program and must not hold its parent's descriptors.
pub(crate) fn keep_standard_streams() -> [BorrowedFd<'static>; 3] {
    // SAFETY: the owners of the other descriptors belong to the parent process; this copy never returns to their code.
    let _ = unsafe { call(CLOSE_RANGE, [3, u32::MAX as usize, 0, 0]) };
    standard_streams()
}

/// Standard input, output and error of this process.
pub(crate) fn standard_streams() -> [BorrowedFd<'static>; 3] {
    // SAFETY: init opens its standard streams when it starts and never closes them.
    [0, 1, 2].map(|number| unsafe { BorrowedFd::borrow_raw(number) })
}

/// Executes another program in this process; returns only on failure.
///
/// # Safety
/// Both lists are null-terminated and contain pointers to NUL-terminated strings.
pub(crate) unsafe fn execve(
    path: &CStr,
    arguments: *const *const u8,
    environment: *const *const u8,
) -> Errno {
    // SAFETY: the path is NUL-terminated, and the caller promises the rest.
    let result = unsafe { call(EXECVE, [path.as_ptr().addr(), arguments.addr(), environment.addr(), 0]) };
    result.err().unwrap_or(Errno::INVAL)
}

/// Drops the permission for port I/O of this process.
pub(crate) fn drop_port_permission() {
    // SAFETY: level 0 only removes permissions.
    let _ = unsafe { call(IOPL, [0; 4]) };
}

/// Size of the kernel's log buffer in bytes.
pub(crate) fn kernel_log_size() -> Result<usize, Errno> {
    const SIZE_BUFFER: usize = 10;
    // SAFETY: this action only returns a number.
    unsafe { call(SYSLOG, [SIZE_BUFFER, 0, 0, 0]) }
}

/// Copies the end of the kernel's log into `text`. Returns the number of bytes.
pub(crate) fn read_kernel_log(text: &mut [u8]) -> Result<usize, Errno> {
    const READ_ALL: usize = 3;
    // SAFETY: the kernel writes at most `text.len()` bytes.
    unsafe { call(SYSLOG, [READ_ALL, text.as_mut_ptr().addr(), text.len(), 0]) }
}

/// Makes the cgroup of this process the root of a cgroup namespace, for this process and its future children.
pub(crate) fn enter_cgroup_namespace() -> Result<(), Errno> {
    const CLONE_NEWCGROUP: usize = 0x0200_0000;
    // SAFETY: the namespace affects no memory of this process.
    unsafe { call(UNSHARE, [CLONE_NEWCGROUP, 0, 0, 0]) }.map(drop)
}

/// Kills all processes except this one, which must be process 1.
pub(crate) fn kill_all() {
    const ALL: usize = usize::MAX;
    // SAFETY: the call has no effect on this process. It fails if there are no others.
    let _ = unsafe { call(KILL, [ALL, Signal::KILL.as_raw().unsigned_abs() as usize, 0, 0]) };
}

/// Ends this process.
pub(crate) fn exit(code: u8) -> ! {
    loop {
        // SAFETY: the process ends.
        let _ = unsafe { call(EXIT_GROUP, [code.into(), 0, 0, 0]) };
    }
}

/// Makes the kernel forget which blocks of a block device it has read (`BLKFLSBUF` in include/uapi/linux/fs.h).
pub(crate) fn flush_buffers(device: BorrowedFd<'_>) -> Result<(), Errno> {
    const BLKFLSBUF: usize = 0x1261;
    let descriptor = usize::try_from(device.as_raw_fd()).map_err(|_| Errno::BADF)?;
    // SAFETY: the call has no argument in memory.
    unsafe { call(IOCTL, [descriptor, BLKFLSBUF, 0, 0]) }?;
    Ok(())
}
