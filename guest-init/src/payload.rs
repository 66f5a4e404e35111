//! Running the payload, with init as the reaper of orphans that PID 1 has to be.
#![expect(unsafe_code, reason = "fork and exec")]

use crate::machine;
use crate::syscall::{self, SignalSet};
use crate::voice::say;
use alloc::ffi::CString;
use alloc::vec::Vec;
use core::ffi::CStr;
use guest_init::payload_spec::PayloadSpec;
use guest_protocol::BootMark;
use rustix::io::Errno;
use rustix::process::{Gid, Pid, Signal, Uid, WaitOptions, WaitStatus, kill_process, wait};

const DEFAULT_ENVIRONMENT: [&CStr; 3] =
    [c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", c"HOME=/root", c"TERM=linux"];

/// Signals that are passed on to the payload.
const PASSED_ON: [Signal; 7] =
    [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT, Signal::USR1, Signal::USR2, Signal::WINCH];

const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;
const SIGNAL_BASE: i32 = 128;

/// Runs the payload to its end and returns its exit code, 128 + signal when one killed it.
pub(crate) fn run(spec: &PayloadSpec) -> u8 {
    let Some(program) = Program::new(spec) else {
        say(format_args!("init: an argument or environment entry of the payload has a NUL in it\n"));
        return NOT_EXECUTABLE;
    };
    own_terminal();
    let waited = SignalSet::of(PASSED_ON.into_iter().chain([Signal::CHILD]));
    // SIGTTOU is blocked too, so that the child may put itself into the terminal's foreground.
    let blocked = SignalSet::of(PASSED_ON.into_iter().chain([Signal::CHILD, Signal::TTOU]));
    if let Err(error) = blocked.block() {
        crate::voice::give_up(format_args!("cannot block signals: {error}"));
    }
    machine::mark(BootMark::PayloadStarted);
    match syscall::fork() {
        Ok(None) => program.execute(spec),
        Ok(Some(child)) => supervise(child, waited),
        Err(error) => {
            say(format_args!("init: cannot start a process: {error}\n"));
            NOT_EXECUTABLE
        }
    }
}

/// Reaps whatever ends and passes signals on, until the payload has ended.
fn supervise(payload: Pid, waited: SignalSet) -> u8 {
    loop {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if pid == payload {
                machine::mark(BootMark::PayloadEnded);
                return exit_code(status);
            }
        }
        match waited.wait() {
            Ok(signal) if PASSED_ON.contains(&signal) => {
                let _ = kill_process(payload, signal);
            }
            _ => {}
        }
    }
}

fn exit_code(status: WaitStatus) -> u8 {
    let code = status
        .exit_status()
        .or_else(|| status.terminating_signal().map(|signal| SIGNAL_BASE + signal))
        .unwrap_or(255);
    code.to_le_bytes()[0]
}

/// The payload's strings in the form that execve takes, made before the fork.
struct Program {
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Program {
    fn new(spec: &PayloadSpec) -> Option<Self> {
        let strings = |list: &[Vec<u8>]| -> Option<Vec<CString>> {
            list.iter().map(|bytes| CString::new(bytes.as_slice()).ok()).collect()
        };
        let mut environment = strings(&spec.environment)?;
        for entry in DEFAULT_ENVIRONMENT {
            let name = entry.to_bytes().split_inclusive(|&byte| byte == b'=').next()?;
            if !environment.iter().any(|given| given.as_bytes().starts_with(name)) {
                environment.push(entry.into());
            }
        }
        Some(Self { arguments: strings(&spec.arguments)?, environment })
    }

    /// Becomes the payload. Runs in the child; what fails is said and becomes its exit status.
    fn execute(&self, spec: &PayloadSpec) -> ! {
        machine::drop_ports();
        if let Err((what, error)) = become_user(spec) {
            say(format_args!("init: cannot {what}: {error}\n"));
            syscall::exit(NOT_EXECUTABLE);
        }
        let error = self.try_paths();
        let name = self.arguments[0].to_string_lossy();
        let code = if matches!(error, Errno::NOENT | Errno::NOTDIR) {
            say(format_args!("init: {name}: not found\n"));
            NOT_FOUND
        } else {
            say(format_args!("init: {name}: cannot execute: {error}\n"));
            NOT_EXECUTABLE
        };
        syscall::exit(code)
    }

    /// Executes the program where it is, or in the first directory of PATH that has it. Returns
    /// only when that failed everywhere.
    fn try_paths(&self) -> Errno {
        let program = &self.arguments[0];
        if program.as_bytes().contains(&b'/') {
            return self.execve(program);
        }
        let path = self.environment.iter().find_map(|entry| entry.as_bytes().strip_prefix(b"PATH="));
        let mut result = Errno::NOENT;
        for directory in path.unwrap_or_default().split(|&byte| byte == b':') {
            let candidate = [directory, b"/", program.as_bytes()].concat();
            let Ok(candidate) = CString::new(candidate) else { continue };
            match self.execve(&candidate) {
                Errno::NOENT | Errno::NOTDIR => {}
                error => result = error,
            }
        }
        result
    }

    fn execve(&self, path: &CStr) -> Errno {
        let pointers = |list: &[CString]| -> Vec<*const u8> {
            list.iter().map(|text| text.as_ptr().cast()).chain([core::ptr::null()]).collect()
        };
        let (arguments, environment) = (pointers(&self.arguments), pointers(&self.environment));
        // SAFETY: both vectors end with a null pointer and point to strings that end with NUL and
        // live as long as `self`.
        unsafe { syscall::execve(path, arguments.as_ptr(), environment.as_ptr()) }
    }
}

/// Makes init the leader of a session that has the console as its terminal. When a leader ends, the
/// kernel hangs its terminal up and throws away what has not been sent: that must not be the
/// payload. Without a terminal on descriptor 0 there is none, which is as it should be.
fn own_terminal() {
    let _ = rustix::process::setsid();
    // SAFETY: descriptor 0 is open for the whole life of init.
    let _ = rustix::process::ioctl_tiocsctty(unsafe { rustix::stdio::stdin() });
}

/// Process group, directory, user and signal mask of the payload.
fn become_user(spec: &PayloadSpec) -> Result<(), (&'static str, Errno)> {
    let _ = rustix::process::setpgid(None, None);
    // SAFETY: descriptor 0 is open for the whole life of init.
    let terminal = unsafe { rustix::stdio::stdin() };
    let _ = rustix::termios::tcsetpgrp(terminal, rustix::process::getpid());
    if let Some(directory) = &spec.working_directory {
        rustix::process::chdir(directory.as_slice())
            .map_err(|error| ("enter the working directory", error))?;
    }
    if [spec.user_id, spec.group_id].contains(&u32::MAX) {
        return Err(("set the user", Errno::INVAL));
    }
    let (uid, gid) = (Uid::from_raw(spec.user_id), Gid::from_raw(spec.group_id));
    if !(uid.is_root() && gid.is_root()) {
        rustix::thread::set_thread_groups(&[]).map_err(|error| ("drop groups", error))?;
        rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(|error| ("set the group", error))?;
        rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(|error| ("set the user", error))?;
    }
    SignalSet::of([]).block().map_err(|error| ("unblock signals", error))?;
    Ok(())
}
