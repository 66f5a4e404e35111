//! The payload on the console, in a guest without the agent. As PID 1, init also reaps orphans.
#![expect(unsafe_code, reason = "borrows a standard stream")]

use crate::console::print;
use crate::machine;
use crate::program::{self, Program};
use crate::syscall::{self, SignalSet};
use guest_init::GuestConfig;
use guest_protocol::BootMark;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, wait};

/// Signals that are forwarded to the payload.
const FORWARDED: [Signal; 7] =
    [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT, Signal::USR1, Signal::USR2, Signal::WINCH];

/// Runs the payload until it ends and returns its exit code: 128 + signal if a signal killed it.
pub(crate) fn run(config: &GuestConfig) -> u8 {
    let Some(program) = Program::new(config) else {
        print(format_args!("init: an argument or environment entry of the payload contains a NUL\n"));
        return program::NOT_EXECUTABLE;
    };
    own_terminal();
    let waited = SignalSet::of(FORWARDED.into_iter().chain([Signal::CHILD]));
    // SIGTTOU is blocked too, so that the child can put itself into the foreground of the terminal.
    let blocked = SignalSet::of(FORWARDED.into_iter().chain([Signal::CHILD, Signal::TTOU]));
    if let Err(error) = blocked.block() {
        crate::panic::fatal(format_args!("cannot block signals: {error}"));
    }
    machine::mark(BootMark::PayloadStarted);
    match syscall::fork() {
        Ok(None) => {
            take_terminal();
            program.execute(None)
        }
        Ok(Some(child)) => supervise(child, waited),
        Err(error) => {
            print(format_args!("init: cannot start a process: {error}\n"));
            program::NOT_EXECUTABLE
        }
    }
}

/// Reaps processes and forwards signals until the payload ends.
fn supervise(payload: Pid, waited: SignalSet) -> u8 {
    loop {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if pid == payload {
                machine::mark(BootMark::PayloadEnded);
                return program::exit_code(status);
            }
        }
        match waited.wait() {
            Ok(signal) if FORWARDED.contains(&signal) => {
                let _ = kill_process(payload, signal);
            }
            _ => {}
        }
    }
}

/// Makes init the leader of a session with the console as its controlling terminal. When a session leader ends, the
/// kernel hangs up its terminal and discards output that has not been transmitted, so that the payload must not be the
/// leader. If descriptor 0 is no terminal, the session has none.
fn own_terminal() {
    let _ = rustix::process::setsid();
    // SAFETY: init never closes descriptor 0.
    let _ = rustix::process::ioctl_tiocsctty(unsafe { rustix::stdio::stdin() });
}

/// Puts this process, which executes the payload next, into the foreground of the terminal.
fn take_terminal() {
    let _ = rustix::process::setpgid(None, None);
    // SAFETY: init never closes descriptor 0.
    let terminal = unsafe { rustix::stdio::stdin() };
    let _ = rustix::termios::tcsetpgrp(terminal, rustix::process::getpid());
}
