//! A gate in front of vCPUs that go on from a pre-booted kernel: all but one wait until that one has got to init.
//!
//! The way to init is one instruction of one vCPU, and then all pages are copied that the guest is going to write
//! to. A page that is copied while several vCPUs run is taken from the others first, and those that want it spin in
//! KVM until it is back (`kvm_faultin_pfn` in arch/x86/kvm/mmu/mmu.c). Behind the gate nobody wants it.

use crate::bus::lock;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

/// How long the others wait at most. The kernel stopped in the middle of what its vCPUs were doing, so the first might
/// want something of theirs before it gets to init.
const LONGEST: Duration = Duration::from_millis(20);

/// Lets one vCPU through at once, and the others when it is opened.
#[derive(Debug)]
pub(crate) struct Gate {
    first: usize,
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    /// A closed gate for all but the vCPU of this number.
    pub(crate) const fn closed_but_for(first: usize) -> Self {
        Self { first, is_open: Mutex::new(false), opened: Condvar::new() }
    }

    /// The vCPU that need not wait.
    pub(crate) const fn first(&self) -> usize {
        self.first
    }

    /// Lets all through.
    pub(crate) fn open(&self) {
        *lock(&self.is_open) = true;
        self.opened.notify_all();
    }

    /// Returns when a vCPU may go on.
    pub(crate) fn pass(&self, vcpu: usize) {
        if vcpu != self.first {
            // A lock whose holder panicked is as good as an open gate.
            drop(self.opened.wait_timeout_while(lock(&self.is_open), LONGEST, |is_open| !*is_open));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn the_first_passes_and_the_others_wait() {
        let gate = Gate::closed_but_for(1);
        let (sender, passed) = mpsc::channel();
        std::thread::scope(|scope| {
            gate.pass(1);
            for vcpu in [0, 2] {
                let (sender, gate) = (sender.clone(), &gate);
                scope.spawn(move || {
                    gate.pass(vcpu);
                    sender.send(*lock(&gate.is_open)).unwrap();
                });
            }
            assert!(passed.try_recv().is_err(), "nobody but the first gets through a closed gate");
            gate.open();
            assert_eq!(passed.iter().take(2).collect::<Vec<_>>(), [true, true]);
        });
        gate.pass(0);
    }

    #[test]
    fn a_gate_that_nobody_opens_lets_all_through_in_the_end() {
        Gate::closed_but_for(0).pass(1);
    }
}
