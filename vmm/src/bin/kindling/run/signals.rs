//! Signals that this process gets are the guest's process's: a thread waits for them and passes them on.
#![expect(unsafe_code, reason = "signal sets have no safe interface")]

use super::client::send_size;
use crate::instances::signal::is_real_time;
use crate::signals::is_ignored;
use kindling::agent::Control;
use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

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

type Place = Arc<Mutex<Option<Arc<Control>>>>;

/// Who gets the signals, once there is somebody.
#[derive(Debug)]
pub(crate) struct Receiver {
    place: Place,
}

impl Receiver {
    /// Signals go to this process in a guest from now on.
    pub(crate) fn pass_on_to(&self, control: Arc<Control>) {
        // The size may have changed since it was asked for.
        send_size(&control);
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = Some(control);
    }
}

/// Starts to take signals. Before any other thread is started, because those inherit what is blocked. `give_up` is
/// called with a signal that asks for the end where no process gets it, or where one was asked [`PATIENCE`] times. A
/// detached process has nobody who becomes impatient, and no terminal whose size could change.
pub(crate) fn receive(is_detached: bool, give_up: impl Fn(u8) + Send + 'static) -> Receiver {
    let place = Place::default();
    let signals = block(if is_detached { &PASSED_ON_DETACHED } else { &[] });
    let patience = if is_detached { u32::MAX } else { PATIENCE };
    let waiting = Arc::clone(&place);
    thread::spawn(move || {
        let mut asked = 0;
        loop {
            let mut number = 0;
            // SAFETY: the set is initialised, and the number may be written.
            if unsafe { libc::sigwait(&raw const signals, &raw mut number) } != 0 {
                return;
            }
            if number == POWER {
                give_up(KILLED);
                continue;
            }
            let asks_to_end = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT].contains(&number);
            asked = u32::from(asks_to_end).saturating_add(asked);
            let control = waiting.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let number = u8::try_from(number).unwrap_or(0);
            match control {
                Some(control) if i32::from(number) == libc::SIGWINCH && !is_detached => send_size(&control),
                Some(control) if asked < patience => control.signal(number),
                _ if asks_to_end => give_up(number),
                _ => {}
            }
        }
    });
    Receiver { place }
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
