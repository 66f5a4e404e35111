//! The kernel's log, for a VMM that profiles the boot: sent when everything that is measured is over.

use crate::machine;
use crate::syscall;
use alloc::vec;

/// Sends the whole log.
pub(crate) fn send() {
    let Ok(size) = syscall::kernel_log_size() else { return };
    // Each line gains its level and time when it is read: the text is longer than what is stored.
    let mut text = vec![0; size.saturating_mul(2)];
    if let Ok(length) = syscall::read_kernel_log(&mut text) {
        machine::send_kernel_log(text.get(..length).unwrap_or_default());
    }
}
