//! Forwarding of signals: this process blocks the signals that it receives, and forwards them to the process in the guest.
#![expect(unsafe_code, reason = "signal sets have no safe interface")]

use crate::terminal::send_size;
use kindling::attach::{SignalSource, StopCause};
use kindling::exec::Process;
use kindling::signal::{END_GUEST, is_real_time};
use rustix::event::{PollFd, PollFlags, poll};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

const FORWARDED: [libc::c_int; 8] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGWINCH,
    libc::SIGALRM,
];
/// Further signals that a process without a terminal forwards: job control of a shell does not send them to it.
const FORWARDED_DETACHED: [libc::c_int; 1] = [libc::SIGCONT];

/// The signal that the exit status of a killed guest reports.
const REPORTED_SIGNAL: u8 = 9;

/// The number of termination signals after which the last one ends the guest instead of being forwarded.
const MAX_TERMINATIONS: u32 = 3;

/// A signalfd of the forwarded signals. They are blocked in this thread and in threads that it starts afterwards.
#[derive(Debug)]
pub(crate) struct Signals {
    descriptor: OwnedFd,
    is_detached: bool,
    /// Number of termination signals received.
    terminations: u32,
}

impl Signals {
    /// Blocks the signals. Must be called before other threads are started. A detached process forwards all termination
    /// signals, because no user repeats Ctrl-C at it, and forwards SIGWINCH as it is, because it has no terminal.
    ///
    /// # Errors
    /// When the signalfd cannot be created.
    pub(crate) fn block(is_detached: bool) -> io::Result<Self> {
        let set = block_signals(if is_detached { &FORWARDED_DETACHED } else { &[] });
        // SAFETY: the set is initialised; the descriptor is new, and has no other owner.
        let descriptor = unsafe {
            match libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
                -1 => return Err(io::Error::last_os_error()),
                descriptor => OwnedFd::from_raw_fd(descriptor),
            }
        };
        Ok(Self { descriptor, is_detached, terminations: 0 })
    }

    /// Waits for a termination signal.
    pub(crate) fn wait_for_end(&mut self) -> u8 {
        loop {
            if let Some(signal) = self.forward(None) {
                return signal;
            }
            let _ = poll(&mut [PollFd::new(&self.descriptor, PollFlags::IN)], None);
        }
    }

    /// The next pending signal.
    fn next(&self) -> Option<u8> {
        let mut bytes = [0; size_of::<libc::signalfd_siginfo>()];
        rustix::io::read(&self.descriptor, &mut bytes).ok().filter(|&count| count == bytes.len())?;
        // The structure begins with the signal's number.
        Some(bytes[0])
    }
}

/// Readable when a signal is pending.
impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl SignalSource for Signals {
    /// Forwards the pending signals. Returns a termination signal if there is no process, or if it is the
    /// [`MAX_TERMINATIONS`]th or a later one.
    fn forward(&mut self, process: Option<&Process>) -> Option<u8> {
        let limit = if self.is_detached { u32::MAX } else { MAX_TERMINATIONS };
        while let Some(number) = self.next() {
            if number == END_GUEST {
                // The guest is stopped immediately, and this process ends in order.
                return Some(REPORTED_SIGNAL);
            }
            let is_termination =
                [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT].contains(&number.into());
            self.terminations = u32::from(is_termination).saturating_add(self.terminations);
            match process {
                Some(process) if libc::c_int::from(number) == libc::SIGWINCH && !self.is_detached => {
                    send_size(process);
                }
                Some(process) if self.terminations < limit => process.signal(number),
                _ if is_termination => return Some(number),
                _ => {}
            }
        }
        None
    }
}

/// Exits with the status of a command that ends for this reason. The connection to a process in a guest is closed.
#[expect(clippy::exit, reason = "other threads may block without end")]
pub(crate) fn exit(cause: StopCause) {
    crate::terminal::restore_from_handler();
    std::process::exit(cause.status().into());
}

/// Blocks the forwarded signals. Signals that are ignored, under nohup for instance, stay ignored.
fn block_signals(more: &[libc::c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set; the other functions read and change valid memory.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        let mut set = set.assume_init();
        for &number in FORWARDED.iter().chain(more).chain(&[END_GUEST.into()]) {
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

/// Whether a signal is ignored, as nohup, or a shell for a background command, sets it.
pub(crate) fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: an all-zero sigaction is valid, and sigaction writes nothing but a valid one.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}
