//! SIGTERM, SIGINT, SIGHUP and SIGQUIT stop the machine, so that it is taken down in order. SIGBUS ends it at once,
//! where a file that is guest memory has become shorter.
#![expect(unsafe_code, reason = "signal handlers")]

use crate::{STATUS_FAILURE, terminal};
use kindling::vmm::BackingFile;
use kindling::vmm::StopHandle;
use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};

static STOP: OnceLock<StopHandle> = OnceLock::new();
static RECEIVED: AtomicI32 = AtomicI32::new(0);

extern "C" fn stop(signal: libc::c_int) {
    if RECEIVED.swap(signal, Ordering::AcqRel) != 0 {
        // The second signal: whoever sends it does not want to wait any more.
        terminal::restore_from_handler();
        // SAFETY: _exit may be called in a signal handler.
        unsafe { libc::_exit(128 + signal) }
    }
    if let Some(handle) = STOP.get() {
        // Writing to an eventfd is allowed in a signal handler.
        handle.stop();
    }
}

/// Makes the signals that end programs stop the machine behind `handle`.
pub(crate) fn stop_on_termination(handle: StopHandle) -> io::Result<()> {
    // There is one machine in this process, so the slot is empty.
    let _ = STOP.set(handle);
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        if is_ignored(signal) {
            continue;
        }
        // SAFETY: an all-zero sigaction is valid, and the handler only does what handlers may.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = stop as extern "C" fn(libc::c_int) as libc::sighandler_t;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut())
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Whether a signal is ignored: nohup, or a shell that put this command into the background, wants it so.
pub(crate) fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: an all-zero sigaction is valid, and sigaction writes nothing but a valid one.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

static FILES: OnceLock<Vec<Arc<BackingFile>>> = OnceLock::new();

extern "C" fn explain(signal: libc::c_int) {
    terminal::restore_from_handler();
    // All of this makes system calls on what was prepared, and nothing else.
    if let Some(file) = FILES.get().into_iter().flatten().find(|file| file.is_truncated()) {
        let mut path = [0; 1024];
        let path = file.path(&mut path);
        for part in [b"kindling: ", path, BackingFile::TRUNCATED_MESSAGE.as_bytes(), b"\n"] {
            let _ = rustix::io::write(rustix::stdio::stderr(), part);
        }
        // SAFETY: _exit may be called in a signal handler.
        unsafe { libc::_exit(STATUS_FAILURE.into()) }
    }
    // SAFETY: the handler was installed with SA_RESETHAND, so this raises the default action.
    unsafe { libc::raise(signal) };
}

/// Says why, when this process touches guest memory that is gone because one of these files is shorter than it was.
pub(crate) fn explain_bus_errors(files: Vec<Arc<BackingFile>>) {
    if files.is_empty() || FILES.set(files).is_err() {
        return;
    }
    // SAFETY: an all-zero sigaction is valid, and the handler only does what handlers may.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = explain as extern "C" fn(libc::c_int) as libc::sighandler_t;
        action.sa_flags = libc::SA_RESETHAND;
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
    }
}

/// The signal that stopped the machine, if one did.
pub(crate) fn received() -> Option<u8> {
    u8::try_from(RECEIVED.load(Ordering::Acquire)).ok().filter(|&signal| signal != 0)
}
