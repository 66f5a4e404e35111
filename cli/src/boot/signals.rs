//! Signal handlers of `kindling boot`: SIGTERM, SIGINT, SIGHUP and SIGQUIT stop the machine in order. SIGBUS, when a file
//! that is mapped as guest memory was truncated, ends the process with a message.
#![expect(unsafe_code, reason = "signal handlers")]

use crate::signals::is_ignored;
use crate::{STATUS_FAILURE, terminal};
use kindling::vmm::BackingFile;
use kindling::vmm::StopHandle;
use std::io;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};

static STOP: OnceLock<StopHandle> = OnceLock::new();
static RECEIVED: AtomicI32 = AtomicI32::new(0);

extern "C" fn stop(signal: libc::c_int) {
    if RECEIVED.swap(signal, Ordering::AcqRel) != 0 {
        // The second signal ends the process immediately.
        terminal::restore_from_handler();
        // SAFETY: _exit may be called in a signal handler.
        unsafe { libc::_exit(128 + signal) }
    }
    if let Some(handle) = STOP.get() {
        // The handle writes to an eventfd, which is async-signal-safe.
        handle.stop();
    }
}

/// Installs handlers with which termination signals stop the machine of `handle`.
pub(crate) fn stop_on_termination(handle: StopHandle) -> io::Result<()> {
    // This process has one machine, so that the cell is empty.
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

static FILES: OnceLock<Vec<Arc<BackingFile>>> = OnceLock::new();

extern "C" fn explain(signal: libc::c_int) {
    terminal::restore_from_handler();
    // Only async-signal-safe calls, on data that was prepared before.
    if let Some(file) = FILES.get().into_iter().flatten().find(|file| file.is_truncated()) {
        for part in [b"kindling: ", file.path(), BackingFile::TRUNCATED_MESSAGE.as_bytes(), b"\n"] {
            let _ = rustix::io::write(rustix::stdio::stderr(), part);
        }
        // SAFETY: _exit may be called in a signal handler.
        unsafe { libc::_exit(STATUS_FAILURE.into()) }
    }
    // SAFETY: the handler was installed with SA_RESETHAND, so this raises the default action.
    unsafe { libc::raise(signal) };
}

/// Installs a handler of SIGBUS that names the file among these that was truncated while it was mapped as guest memory.
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

/// Returns the signal that stopped the machine, if one did.
pub(crate) fn received() -> Option<u8> {
    u8::try_from(RECEIVED.load(Ordering::Acquire)).ok().filter(|&signal| signal != 0)
}
