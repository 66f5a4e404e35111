//! Signals that this process gets are the guest's process's: it keeps them, and passes them on.
#![expect(unsafe_code, reason = "signal sets have no safe interface")]

use super::outcome::StopCause;
use crate::signals::is_ignored;
use crate::terminal::send_size;
use kindling::signal::is_real_time;
use kindling::vmm::agent::Process;
use rustix::event::{PollFd, PollFlags, poll};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

const PASSED_ON: [libc::c_int; 8] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGWINCH,
    libc::SIGALRM,
];
/// What `kindling kill` sends: the end of the guest without a question, but with an orderly end of this process.
const POWER: libc::c_int = libc::SIGPWR;
/// What a process without a terminal passes on besides: nobody sends it but for the guest.
const PASSED_ON_DETACHED: [libc::c_int; 1] = [libc::SIGCONT];

/// The signal that a guest without power ended by, in the eyes of others.
const KILLED: u8 = 9;

/// Times that somebody asks a process to end before it is not asked any more.
const PATIENCE: u32 = 3;

/// Signals that wait to be passed on. They are blocked in this thread and in those that it starts from then on.
#[derive(Debug)]
pub(crate) struct Signals {
    descriptor: OwnedFd,
    is_detached: bool,
    /// Times that somebody has asked for the end.
    asked: u32,
}

impl Signals {
    /// Keeps signals from here on. Before any other thread is started. A detached process has nobody who becomes
    /// impatient, and no terminal whose size could change.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub(crate) fn keep(is_detached: bool) -> io::Result<Self> {
        let set = block(if is_detached { &PASSED_ON_DETACHED } else { &[] });
        // SAFETY: the set is initialised; the descriptor is new and nobody else's.
        let descriptor = unsafe {
            match libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
                -1 => return Err(io::Error::last_os_error()),
                descriptor => OwnedFd::from_raw_fd(descriptor),
            }
        };
        Ok(Self { descriptor, is_detached, asked: 0 })
    }

    /// Passes on what has come by now. A signal that asks for the end where no process gets it, or where one was asked
    /// [`PATIENCE`] times, is for the caller.
    pub(crate) fn pass_on(&mut self, process: Option<&Process>) -> Option<u8> {
        let patience = if self.is_detached { u32::MAX } else { PATIENCE };
        while let Some(number) = self.next() {
            if libc::c_int::from(number) == POWER {
                return Some(KILLED);
            }
            let asks_to_end =
                [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT].contains(&number.into());
            self.asked = u32::from(asks_to_end).saturating_add(self.asked);
            match process {
                Some(process) if libc::c_int::from(number) == libc::SIGWINCH && !self.is_detached => {
                    send_size(process);
                }
                Some(process) if self.asked < patience => process.signal(number),
                _ if asks_to_end => return Some(number),
                _ => {}
            }
        }
        None
    }

    /// Waits for one that asks for the end.
    pub(crate) fn wait_for_end(&mut self) -> u8 {
        loop {
            if let Some(signal) = self.pass_on(None) {
                return signal;
            }
            let _ = poll(&mut [PollFd::new(&self.descriptor, PollFlags::IN)], None);
        }
    }

    /// One that has come.
    fn next(&self) -> Option<u8> {
        let mut bytes = [0; size_of::<libc::signalfd_siginfo>()];
        rustix::io::read(&self.descriptor, &mut bytes).ok().filter(|&count| count == bytes.len())?;
        // It begins with the signal's number.
        Some(bytes[0])
    }
}

/// Has something to read when a signal has come.
impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Ends this command as a signal would. The agent then hangs up on a process that it served.
#[expect(clippy::exit, reason = "what this command waits for may never come")]
pub(crate) fn leave(cause: StopCause) {
    crate::terminal::restore_from_handler();
    std::process::exit(cause.status().into());
}

/// Blocks what is passed on. What somebody wanted ignored, nohup for instance, stays ignored.
fn block(more: &[libc::c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set; the other functions read and change valid memory.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        let mut set = set.assume_init();
        for &number in PASSED_ON.iter().chain(more).chain(&[POWER]) {
            if !is_ignored(number) {
                libc::sigaddset(&raw mut set, number);
            }
        }
        for number in (1..=64).filter(|&number| is_real_time(number)) {
            libc::sigaddset(&raw mut set, number.into());
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        set
    }
}
