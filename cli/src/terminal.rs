//! Raw mode of the user's terminal while it is attached to a guest. The settings are restored at every end of the process
//! that it can handle.
#![expect(unsafe_code, reason = "terminal settings have to be restored in signal handlers")]

use kindling::TerminalSize;
use kindling::exec::Process;
use std::io::IsTerminal;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

static SAVED: OnceLock<libc::termios> = OnceLock::new();

/// Signals of a fatal error. A panic raises SIGABRT, and access to a truncated mapped file raises SIGBUS.
const FATAL: [libc::c_int; 5] = [libc::SIGABRT, libc::SIGBUS, libc::SIGSEGV, libc::SIGILL, libc::SIGFPE];

/// Standard input in raw mode. Dropping it restores the settings.
#[derive(Debug)]
pub(crate) struct RawTerminal(());

impl RawTerminal {
    /// Enters raw mode. Returns `None` if standard input is not a terminal, or this process is in the background.
    pub(crate) fn enter() -> Option<Self> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() || !in_foreground() {
            return None;
        }
        let mut settings = MaybeUninit::uninit();
        // SAFETY: tcgetattr fills the structure when it succeeds, and only then is it read.
        let saved = unsafe {
            (libc::tcgetattr(libc::STDIN_FILENO, settings.as_mut_ptr()) == 0).then(|| settings.assume_init())
        }?;
        let saved = SAVED.get_or_init(|| saved);
        restore_on_fatal_signals();
        let mut raw = *saved;
        // SAFETY: both functions take valid settings by pointer.
        let set = unsafe {
            libc::cfmakeraw(&raw mut raw);
            libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const raw)
        };
        (set == 0).then_some(Self(()))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore_from_handler();
    }
}

/// Whether this process is in the foreground process group. The kernel stops a background process that changes the
/// terminal's settings (SIGTTOU).
fn in_foreground() -> bool {
    // SAFETY: neither call has preconditions.
    unsafe { libc::tcgetpgrp(libc::STDIN_FILENO) == libc::getpgrp() }
}

/// Restores the settings, if they were changed. Async-signal-safe.
pub(crate) fn restore_from_handler() {
    if let Some(saved) = SAVED.get() {
        // SAFETY: tcsetattr takes valid settings by pointer and is async-signal-safe.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, saved) };
    }
}

extern "C" fn restore_and_die(signal: libc::c_int) {
    restore_from_handler();
    // SAFETY: the handler was installed with SA_RESETHAND, so this raises the default action.
    unsafe { libc::raise(signal) };
}

fn restore_on_fatal_signals() {
    for signal in FATAL {
        // SAFETY: an all-zero sigaction is valid, and the handler only does what handlers may.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = restore_and_die as extern "C" fn(libc::c_int) as libc::sighandler_t;
            action.sa_flags = libc::SA_RESETHAND;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
    }
}

/// Sends the size of the user's terminal, if there is one.
pub(crate) fn send_size(process: &Process) {
    if let Some(size) = terminal_size() {
        process.resize(size);
    }
}

/// The initial size of a guest's terminal: that of the user's, or 24 rows and 80 columns without one.
pub(crate) fn new_terminal_size() -> TerminalSize {
    terminal_size().unwrap_or(TerminalSize { rows: 24, columns: 80 })
}

/// The size of the first terminal among the standard streams.
fn terminal_size() -> Option<TerminalSize> {
    [rustix::stdio::stdout(), rustix::stdio::stdin(), rustix::stdio::stderr()].into_iter().find_map(|fd| {
        let size = rustix::termios::tcgetwinsize(fd).ok()?;
        Some(TerminalSize { rows: size.ws_row, columns: size.ws_col })
    })
}
