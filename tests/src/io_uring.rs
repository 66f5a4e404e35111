//! Denies programs io_uring with seccomp, as hardened hosts and container runtimes do.
#![expect(unsafe_code, reason = "a seccomp filter, set between fork and exec")]

use std::os::unix::process::CommandExt;
use std::process::Command;

/// Makes io_uring_setup(2) fail with EPERM in the command.
pub fn refuse(command: &mut Command) {
    // BPF: load 32 bits, compare with a constant, return a constant (linux/bpf_common.h).
    const LOAD: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let instruction = |code, jf, k| libc::sock_filter { code, jt: 0, jf, k };
    let number = u32::try_from(libc::SYS_io_uring_setup).expect("the number of a system call");
    let mut program = [
        // The number of the system call is the first field of struct seccomp_data.
        instruction(LOAD, 0, 0),
        instruction(JUMP_IF_EQUAL, 1, number),
        instruction(RETURN, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs()),
        instruction(RETURN, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let set = move || {
        let filter = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
        // SAFETY: both calls affect only this process; the filter is read during the second.
        let results = unsafe {
            [
                libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
                libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter),
            ]
        };
        if results == [0, 0] { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: the closure makes two system calls and neither allocates nor locks.
    unsafe { command.pre_exec(set) };
}
