//! Pausing vCPUs between two entries into the guest.

use super::{KvmError, VcpuState};
use crate::bus::lock;
use crate::timeline::Instant;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread::{self, ThreadId};

/// Where the vCPUs of a machine wait while it is paused.
#[derive(Debug, Default)]
pub(crate) struct Pause {
    is_set: AtomicBool,
    /// vCPUs that wait.
    waiting: Mutex<usize>,
    cleared: Condvar,
    /// Whether each vCPU saves its state before it waits.
    saves: AtomicBool,
    saved: Mutex<Saved>,
}

/// The saved states of a paused machine's vCPUs.
#[derive(Debug, Default)]
pub(crate) struct Saved {
    /// The thread of the vCPU that made the others wait.
    pub(crate) by: Option<ThreadId>,
    pub(crate) vcpus: Vec<SavedVcpu>,
}

/// The saved state of a vCPU.
#[derive(Debug)]
pub(crate) struct SavedVcpu {
    pub(crate) id: usize,
    pub(crate) state: Result<VcpuState, KvmError>,
    /// When the state was read.
    pub(crate) at: Instant,
}

impl Pause {
    /// Makes each vCPU wait before it enters the guest again.
    pub(crate) fn set(&self) {
        self.is_set.store(true, Ordering::Release);
    }

    /// Makes each vCPU save its state, and wait. Called by the thread of a vCPU.
    pub(crate) fn set_and_save(&self) {
        *lock(&self.saved) = Saved { by: Some(thread::current().id()), vcpus: Vec::new() };
        self.saves.store(true, Ordering::Release);
        self.set();
    }

    /// Whether each vCPU saves its state.
    pub(crate) fn saves(&self) -> bool {
        self.saves.load(Ordering::Acquire)
    }

    /// Saves the state of a vCPU, which waits next.
    pub(super) fn save(&self, vcpu: SavedVcpu) {
        lock(&self.saved).vcpus.push(vcpu);
    }

    /// The saved states, each of which is returned once.
    pub(crate) fn take_saved(&self) -> Saved {
        std::mem::take(&mut *lock(&self.saved))
    }

    /// Lets the vCPUs continue.
    pub(crate) fn clear(&self) {
        self.saves.store(false, Ordering::Release);
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
