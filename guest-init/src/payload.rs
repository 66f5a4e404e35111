//! What is run on the console: the payload, with init as the reaper of orphans that PID 1 has to be.
#![expect(unsafe_code, reason = "borrows a standard stream")]

use crate::machine;
use crate::program::{self, Program};
use crate::syscall::{self, SignalSet};
use crate::voice::say;
use guest_init::payload_spec::PayloadSpec;
use guest_protocol::BootMark;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, wait};

/// Signals that are passed on to the payload.
const PASSED_ON: [Signal; 7] =
    [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT, Signal::USR1, Signal::USR2, Signal::WINCH];

/// Runs the payload to its end and returns its exit code, 128 + signal when one killed it.
pub(crate) fn run(spec: &PayloadSpec) -> u8 {
    let Some(program) = Program::new(spec) else {
        say(format_args!("init: an argument or environment entry of the payload has a NUL in it\n"));
        return program::NOT_EXECUTABLE;
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
        Ok(None) => {
            take_terminal();
            program.execute(None)
        }
        Ok(Some(child)) => supervise(child, waited),
        Err(error) => {
            say(format_args!("init: cannot start a process: {error}\n"));
            program::NOT_EXECUTABLE
        }
    }
}

/// Reaps whatever ends and passes signals on, until the payload has ended.
fn supervise(payload: Pid, waited: SignalSet) -> u8 {
    loop {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if pid == payload {
                machine::mark(BootMark::PayloadEnded);
                return program::exit_code(status);
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

/// Makes init the leader of a session that has the console as its terminal. When a leader ends, the
/// kernel hangs its terminal up and throws away what has not been sent: that must not be the
/// payload. Without a terminal on descriptor 0 there is none, which is as it should be.
fn own_terminal() {
    let _ = rustix::process::setsid();
    // SAFETY: descriptor 0 is open for the whole life of init.
    let _ = rustix::process::ioctl_tiocsctty(unsafe { rustix::stdio::stdin() });
}

/// Puts this process, which becomes the payload, into the foreground of the terminal.
fn take_terminal() {
    let _ = rustix::process::setpgid(None, None);
    // SAFETY: descriptor 0 is open for the whole life of init.
    let terminal = unsafe { rustix::stdio::stdin() };
    let _ = rustix::termios::tcsetpgrp(terminal, rustix::process::getpid());
}
