//! What ends with a guest of this program.

use super::GuestDir;
use kindling_vmm::control::Monitor;

/// What belongs to a guest of this program. Dropping it ends the guest.
#[derive(Debug)]
pub(crate) struct Owner {
    pub(crate) monitor: Option<Monitor>,
    pub(crate) directory: Option<GuestDir>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        drop(self.monitor.take());
        if let Some(directory) = self.directory.take() {
            directory.remove();
        }
    }
}
