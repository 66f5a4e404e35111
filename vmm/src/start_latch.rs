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
struct Gate {
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    /// Lets all threads pass, from now on.
    fn open(&self) {
        *lock(&self.is_open) = true;
        self.opened.notify_all();
    }

    /// Blocks until the gate is open, at most for a time.
    fn wait_for(&self, limit: Duration) {
        // A lock whose holder panicked counts as open.
        drop(self.opened.wait_timeout_while(lock(&self.is_open), limit, |is_open| !*is_open));
    }
}

/// Where threads wait for each other: until as many have arrived as are expected.
#[derive(Debug, Default)]
pub(crate) struct Rendezvous {
    missing: Mutex<usize>,
    complete: Condvar,
}

impl Rendezvous {
    /// Expects one more thread.
    pub(crate) fn expect(&self) {
        *lock(&self.missing) += 1;
    }

    /// Counts a thread that does not wait.
    pub(crate) fn arrive(&self) {
        let mut missing = lock(&self.missing);
        *missing = missing.saturating_sub(1);
        if *missing == 0 {
            self.complete.notify_all();
        }
    }

    /// Counts the calling thread, and blocks until all have arrived.
    pub(crate) fn wait(&self) {
        self.arrive();
        drop(self.complete.wait_while(lock(&self.missing), |missing| *missing > 0));
    }

    /// Lets all threads pass, even if some have not arrived.
    pub(crate) fn abandon(&self) {
        *lock(&self.missing) = 0;
        self.complete.notify_all();
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
    fn threads_wait_for_each_other() {
        let rendezvous = Rendezvous::default();
        let passed = std::sync::atomic::AtomicUsize::new(0);
        let (sender, arriving) = mpsc::channel();
        (0..3).for_each(|_| rendezvous.expect());
        std::thread::scope(|scope| {
            for _ in 0..2 {
                let (sender, rendezvous, passed) = (sender.clone(), &rendezvous, &passed);
                scope.spawn(move || {
                    sender.send(()).unwrap();
                    rendezvous.wait();
                    passed.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                });
            }
            arriving.iter().take(2).for_each(drop);
            while *lock(&rendezvous.missing) > 1 {
                std::thread::yield_now();
            }
            assert_eq!(passed.load(std::sync::atomic::Ordering::SeqCst), 0);
            rendezvous.arrive();
        });
        assert_eq!(passed.into_inner(), 2);
    }

    #[test]
    fn an_abandoned_rendezvous_does_not_block() {
        let rendezvous = Rendezvous::default();
        (0..3).for_each(|_| rendezvous.expect());
        std::thread::scope(|scope| {
            scope.spawn(|| rendezvous.wait());
            rendezvous.abandon();
        });
        // Threads that arrive later pass too.
        rendezvous.wait();
        rendezvous.arrive();
    }

    #[test]
    fn the_wait_times_out() {
        StartLatch::closed_except(0).wait(1);
    }
}
