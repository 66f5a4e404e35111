//! The kernel's log, for a VMM that profiles the boot. Init sends it after everything that is measured.

use crate::machine;
use crate::syscall;
use alloc::vec;

/// Sends the complete log.
pub(crate) fn send() {
    let Ok(size) = syscall::kernel_log_size() else { return };
    // The kernel prefixes each line with level and time when it is read: the text is longer than the buffer's content.
    let mut text = vec![0; size.saturating_mul(2)];
    if let Ok(length) = syscall::read_kernel_log(&mut text) {
        machine::send_kernel_log(text.get(..length).unwrap_or_default());
    }
}
