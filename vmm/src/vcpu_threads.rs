//! The threads of a machine's vCPUs: started, paused, resumed and stopped together.

use crate::bus::{Buses, lock};
use crate::error::Error;
use crate::jail::{Jail, Thread};
use crate::kvm::{ExitCounts, Pause, Registers, Vcpu, VcpuEnd};
use crate::poll::wait_readable;
use crate::profile::Recorder;
use crate::start_latch::{Rendezvous, StartLatch};
use crate::timeline::Instant;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

/// Interval between two signals to a vCPU that has to leave the guest: a signal that arrives just before the vCPU
/// enters the guest is lost, and the next one is not.
pub(crate) const KICK_INTERVAL: Duration = Duration::from_millis(1);

/// The result of a vCPU's thread.
#[derive(Debug)]
pub(crate) struct VcpuOutcome {
    pub(crate) id: usize,
    pub(crate) end: VcpuEnd,
    pub(crate) counts: ExitCounts,
    pub(crate) registers: Option<Registers>,
    /// The time stamp counter at the end, if the machine is captured.
    pub(crate) tsc: Option<u64>,
    pub(crate) first_run: Instant,
    pub(crate) recorder: Option<Recorder>,
}

impl VcpuOutcome {
    /// Whether the thread ended because the machine was stopped, and so is not the cause of its end.
    pub(crate) const fn is_stopped(&self) -> bool {
        matches!(self.end, VcpuEnd::Stopped)
    }
}

/// The threads of a machine's vCPUs.
#[derive(Debug)]
pub(crate) struct VcpuThreads {
    threads: Vec<JoinHandle<()>>,
    /// vCPUs and their outcomes in the order in which the threads ended.
    outcomes: Arc<Mutex<Vec<(Vcpu, VcpuOutcome)>>>,
    /// Written once by each thread that ends. Shared, because a vCPU's thread cannot close descriptors in its jail.
    ended: Arc<EventFd>,
    stopping: Arc<AtomicBool>,
    pause: Arc<Pause>,
    /// Where vCPUs wait for their first entry into the guest, until all threads are confined: a guest that takes over the
    /// thread of a vCPU shares memory with the others.
    confined: Arc<Rendezvous>,
    jail: Jail,
}

extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // The arrival of the signal is its whole effect: KVM_RUN and writes of the console return with EINTR.
}

impl VcpuThreads {
    /// No threads yet.
    ///
    /// # Errors
    /// When the signal handler cannot be installed.
    pub(crate) fn new(ended: EventFd, stopping: Arc<AtomicBool>, jail: Jail) -> Result<Self, Error> {
        // Without a handler the signal would end the process. By convention no other part of a program uses this
        // signal number.
        register_signal_handler(SIGRTMIN(), interrupted)
            .map_err(|error| Error::host("install a signal handler")(error.into()))?;
        let confined = Arc::<Rendezvous>::default();
        // The thread that calls `begin`.
        confined.expect();
        Ok(Self {
            threads: Vec::new(),
            outcomes: Arc::default(),
            ended: Arc::new(ended),
            stopping,
            pause: Arc::default(),
            confined,
            jail,
        })
    }

    /// Starts the thread of a vCPU, which waits at `latch` first. If `is_captured` is set, the thread reads the time
    /// stamp counter at its end.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left.
    pub(crate) fn start(
        &mut self,
        id: usize,
        mut vcpu: Vcpu,
        buses: &Arc<Buses>,
        latch: Option<&Arc<StartLatch>>,
        is_captured: bool,
    ) -> Result<(), Error> {
        let ended = Arc::clone(&self.ended);
        let (buses, latch) = (Arc::clone(buses), latch.cloned());
        let (stopping, pause) = (Arc::clone(&self.stopping), Arc::clone(&self.pause));
        let all_confined = Arc::clone(&self.confined);
        all_confined.expect();
        let outcomes = Arc::clone(&self.outcomes);
        let jail = self.jail;
        let run = move || {
            // The parent of this process may have blocked the signal.
            let _ = unblock_signal(SIGRTMIN());
            // Without a timer the profile has no samples.
            if let Some(recorder) = &mut vcpu.recorder {
                let _ = recorder.start_sampling();
            }
            let confined = jail.confine_thread(Thread::Vcpu);
            if confined.is_err() {
                // The others do not enter the guest beside this thread.
                stopping.store(true, Ordering::Release);
            }
            all_confined.wait();
            if let Some(latch) = latch {
                latch.wait(id);
            }
            let first_run = Instant::now();
            let end = match confined {
                Ok(()) => vcpu.run(&buses, &stopping, &pause),
                Err(error) => VcpuEnd::NotConfined(error),
            };
            // If the counter cannot be read, the capture fails later, with its own error.
            let tsc = is_captured.then(|| vcpu.tsc().ok()).flatten();
            let registers = end.is_failure().then(|| vcpu.registers()).flatten();
            let counts = *vcpu.counts();
            let mut recorder = vcpu.recorder.take();
            if let Some(recorder) = &mut recorder {
                recorder.stop_sampling();
            }
            let outcome = VcpuOutcome { id, end, counts, registers, tsc, first_run, recorder };
            lock(&outcomes).push((vcpu, outcome));
            // The reader is polled until every thread has ended, so this cannot overflow.
            let _ = ended.write(1);
        };
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(run)
            .map_err(Error::host("start a vCPU's thread"))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Lets the vCPUs enter the guest for the first time, when all threads are confined. The calling one is.
    pub(crate) fn begin(&self) {
        self.confined.arrive();
    }

    /// Makes all vCPUs leave the guest and wait. They do so after [`Self::kick`], which is repeated until
    /// [`Self::is_paused`].
    pub(crate) fn pause(&self) {
        self.pause.set();
    }

    /// Lets paused vCPUs enter the guest again.
    pub(crate) fn resume(&self) {
        self.pause.clear();
    }

    /// Whether no vCPU runs guest code or handles an exit, after [`Self::pause`].
    pub(crate) fn is_paused(&self) -> bool {
        self.pause.waiting() + lock(&self.outcomes).len() >= self.threads.len()
    }

    /// Interrupts every vCPU that runs.
    pub(crate) fn kick(&self) {
        for thread in self.threads.iter().filter(|thread| !thread.is_finished()) {
            // A thread that ends in this moment needs no signal.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    /// Ends every thread, and waits for it.
    pub(crate) fn stop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        self.pause.clear();
        self.confined.abandon();
        // All vCPUs are kicked together: one may wait for a lock that another holds while it writes to the console, and
        // only that write can be interrupted. A thread with an outcome does not enter the guest again.
        while lock(&self.outcomes).len() < self.threads.len() {
            self.kick();
            // Resets the counter, so that only an end after this moment cuts the wait short.
            let _ = self.ended.read();
            let _ = wait_readable(
                crate::poll::borrow(&self.ended),
                Some(std::time::Instant::now() + KICK_INTERVAL),
            );
        }
        for thread in self.threads.drain(..) {
            // Threads do not panic: the profile aborts the process on a panic.
            let _ = thread.join();
        }
    }

    /// The vCPUs whose threads have ended, and their outcomes in the order of the ends; each is returned once.
    pub(crate) fn take_outcomes(&self) -> (Vec<Vcpu>, Vec<VcpuOutcome>) {
        std::mem::take(&mut *lock(&self.outcomes)).into_iter().unzip()
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.stop();
    }
}
