//! A latch for vCPUs that continue from a pre-booted kernel: all but one wait until that one has reached init.
//!
//! The path to init is one instruction of one vCPU. Then all pages that the guest is going to write are copied. Copying
//! a page while several vCPUs run invalidates it for the others first, and vCPUs that access it spin in KVM until it is
//! mapped again (`kvm_faultin_pfn` in arch/x86/kvm/mmu/mmu.c). While they wait at the latch they access nothing.

use crate::bus::lock;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

/// Maximum wait of the others. The kernel was captured in the middle of the work of its vCPUs, so that the first one
/// may depend on the others before it reaches init.
const TIMEOUT: Duration = Duration::from_millis(20);

/// Where threads wait until it is opened.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    /// Lets all threads pass, from now on.
    pub(crate) fn open(&self) {
        *lock(&self.is_open) = true;
        self.opened.notify_all();
    }

    /// Blocks until the gate is open.
    pub(crate) fn wait(&self) {
        // A lock whose holder panicked counts as open.
        drop(self.opened.wait_while(lock(&self.is_open), |is_open| !*is_open));
    }

    /// Blocks until the gate is open, at most for a time.
    fn wait_for(&self, limit: Duration) {
        drop(self.opened.wait_timeout_while(lock(&self.is_open), limit, |is_open| !*is_open));
    }
}

/// Starts one vCPU immediately, and the others when the latch is opened.
#[derive(Debug)]
pub(crate) struct StartLatch {
    first: usize,
    gate: Gate,
}

impl StartLatch {
    /// Creates a latch at which all vCPUs wait except for the one with this index.
    pub(crate) fn closed_except(first: usize) -> Self {
        Self { first, gate: Gate::default() }
    }

    /// The index of the vCPU that does not wait.
    pub(crate) const fn first(&self) -> usize {
        self.first
    }

    /// Starts all vCPUs.
    pub(crate) fn open(&self) {
        self.gate.open();
    }

    /// Blocks until this vCPU may start.
    pub(crate) fn wait(&self, vcpu: usize) {
        if vcpu != self.first {
            self.gate.wait_for(TIMEOUT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn the_first_starts_and_the_others_wait() {
        let latch = StartLatch::closed_except(1);
        let (sender, passed) = mpsc::channel();
        std::thread::scope(|scope| {
            latch.wait(1);
            for vcpu in [0, 2] {
                let (sender, latch) = (sender.clone(), &latch);
                scope.spawn(move || {
                    latch.wait(vcpu);
                    sender.send(*lock(&latch.gate.is_open)).unwrap();
                });
            }
            assert!(passed.try_recv().is_err(), "a vCPU has passed the closed latch");
            latch.open();
            assert_eq!(passed.iter().take(2).collect::<Vec<_>>(), [true, true]);
        });
        latch.wait(0);
    }

    #[test]
    fn the_wait_times_out() {
        StartLatch::closed_except(0).wait(1);
    }
}
