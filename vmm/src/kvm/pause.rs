//! Pausing vCPUs between two entries into the guest.

use crate::bus::lock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};

/// Where the vCPUs of a machine wait while it is paused.
#[derive(Debug, Default)]
pub(crate) struct Pause {
    is_set: AtomicBool,
    /// vCPUs that wait.
    waiting: Mutex<usize>,
    cleared: Condvar,
}

impl Pause {
    /// Makes each vCPU wait before it enters the guest again.
    pub(crate) fn set(&self) {
        self.is_set.store(true, Ordering::Release);
    }

    /// Lets the vCPUs continue.
    pub(crate) fn clear(&self) {
        // The lock orders this against a vCPU that is about to wait.
        let waiting = lock(&self.waiting);
        self.is_set.store(false, Ordering::Release);
        drop(waiting);
        self.cleared.notify_all();
    }

    /// The number of vCPUs that wait.
    pub(crate) fn waiting(&self) -> usize {
        // Those that wait after the pause was cleared are about to continue.
        let waiting = lock(&self.waiting);
        if self.is_set.load(Ordering::Acquire) { *waiting } else { 0 }
    }

    /// Waits while the machine is paused; whether it was.
    pub(super) fn wait(&self) -> bool {
        if !self.is_set.load(Ordering::Acquire) {
            return false;
        }
        let mut waiting = lock(&self.waiting);
        *waiting += 1;
        while self.is_set.load(Ordering::Acquire) {
            // A lock whose holder panicked ends the wait.
            match self.cleared.wait(waiting) {
                Ok(guard) => waiting = guard,
                Err(_) => return true,
            }
        }
        *waiting -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpus_wait_until_the_pause_is_cleared() {
        let pause = Pause::default();
        assert!(!pause.wait(), "a machine that is not paused holds no vCPU");
        pause.set();
        std::thread::scope(|scope| {
            let vcpus = [scope.spawn(|| pause.wait()), scope.spawn(|| pause.wait())];
            while pause.waiting() < vcpus.len() {
                std::thread::yield_now();
            }
            assert!(vcpus.iter().all(|vcpu| !vcpu.is_finished()));
            pause.clear();
            assert!(vcpus.into_iter().all(|vcpu| vcpu.join().unwrap()));
        });
        pause.set();
        assert_eq!(pause.waiting(), 0);
    }
}
