//! The threads of a machine's vCPUs: started, paused, resumed and stopped together.

use crate::bus::{Buses, lock};
use crate::error::Error;
use crate::jail::{Jail, Thread};
use crate::kvm::{ExitCounts, Pause, Registers, SavedVcpu, Vcpu, VcpuEnd};
use crate::poll::wait_readable;
use crate::profile::Recorder;
use crate::start_latch::{Rendezvous, StartLatch};
use crate::timeline::Instant;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
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
    /// The time stamp counter at the end, if the machine continues later.
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

/// A thread that runs a vCPU whenever its machine runs: a vCPU that changes its thread waits for RCU (`kvm_vcpu_ioctl` in
/// virt/kvm/kvm_main.c), which takes 12 ms.
#[derive(Debug)]
struct VcpuThread {
    vcpu: usize,
    handle: JoinHandle<()>,
    runs: Sender<Box<dyn FnOnce() + Send>>,
}

/// The threads of a machine that is stopped and continues later.
#[derive(Debug, Default)]
pub(crate) struct IdleThreads(Vec<VcpuThread>);

impl Drop for IdleThreads {
    fn drop(&mut self) {
        for VcpuThread { handle, runs, .. } in self.0.drain(..) {
            drop(runs);
            // Threads do not panic: the profile aborts the process on a panic.
            let _ = handle.join();
        }
    }
}

/// The threads of a machine's vCPUs.
#[derive(Debug)]
pub(crate) struct VcpuThreads {
    threads: IdleThreads,
    /// Threads of an earlier run that have no vCPU in this one yet.
    earlier: IdleThreads,
    /// vCPUs and their outcomes in the order in which the threads ended.
    outcomes: Arc<Mutex<Vec<(Vcpu, VcpuOutcome)>>>,
    /// Written once by each thread that ends. Shared, because a vCPU's thread cannot close descriptors in its jail.
    ended: Arc<EventFd>,
    stopping: Arc<AtomicBool>,
    pause: Arc<Pause>,
    /// Where vCPUs wait for their first entry into the guest, until all threads are confined: a guest that takes over the
    /// thread of a vCPU shares memory with the others.
    confined: Arc<Rendezvous>,
    /// Where all vCPUs except one wait until that one has reached init, if the machine continues from a pre-booted kernel.
    latch: Option<Arc<StartLatch>>,
    jail: Jail,
    /// Whether the outcomes were taken, after all runs.
    is_taken: bool,
}

extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // The arrival of the signal is its whole effect: KVM_RUN and writes of the console return with EINTR.
}

impl VcpuThread {
    fn start(vcpu: usize) -> Result<Self, Error> {
        let (runs, received) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let handle = std::thread::Builder::new()
            .name(format!("vcpu{vcpu}"))
            .spawn(move || received.into_iter().for_each(|run| run()))
            .map_err(Error::host("start a vCPU's thread"))?;
        Ok(Self { vcpu, handle, runs })
    }
}

impl VcpuThreads {
    /// No threads yet, except for those of an earlier run.
    ///
    /// # Errors
    /// When the signal handler cannot be installed.
    pub(crate) fn new(
        ended: EventFd,
        stopping: Arc<AtomicBool>,
        latch: Option<Arc<StartLatch>>,
        earlier: IdleThreads,
        jail: Jail,
    ) -> Result<Self, Error> {
        // Without a handler the signal would end the process. By convention no other part of a program uses this
        // signal number.
        register_signal_handler(SIGRTMIN(), interrupted)
            .map_err(|error| Error::host("install a signal handler")(error.into()))?;
        let confined = Arc::<Rendezvous>::default();
        // The thread that calls `begin`.
        confined.expect();
        Ok(Self {
            threads: IdleThreads::default(),
            earlier,
            outcomes: Arc::default(),
            ended: Arc::new(ended),
            stopping,
            pause: Arc::default(),
            confined,
            latch,
            jail,
            is_taken: false,
        })
    }

    /// Starts the thread of a vCPU, or uses that of an earlier run. It waits at the latch first. If `stops` is set, the machine
    /// continues later: the thread completes the vCPU's last instruction and reads the time stamp counter.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left.
    pub(crate) fn start(
        &mut self,
        id: usize,
        mut vcpu: Vcpu,
        buses: &Arc<Buses>,
        stops: bool,
    ) -> Result<(), Error> {
        let ended = Arc::clone(&self.ended);
        let (buses, latch) = (Arc::clone(buses), self.latch.clone());
        let (stopping, pause) = (Arc::clone(&self.stopping), Arc::clone(&self.pause));
        let all_confined = Arc::clone(&self.confined);
        all_confined.expect();
        let outcomes = Arc::clone(&self.outcomes);
        let jail = self.jail;
        let earlier = self.earlier.0.iter().position(|thread| thread.vcpu == id);
        let earlier = earlier.map(|index| self.earlier.0.swap_remove(index));
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
                Ok(()) => vcpu.run(id, &buses, &stopping, &pause),
                Err(error) => VcpuEnd::NotConfined(error),
            };
            // If that fails, the capture fails later, with its own error.
            let is_settled = stops && vcpu.settle();
            let tsc = is_settled.then(|| vcpu.tsc().ok()).flatten();
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
        let thread = earlier.map_or_else(|| VcpuThread::start(id), Ok)?;
        // The thread receives as long as this sender exists.
        let _ = thread.runs.send(Box::new(run));
        self.threads.0.push(thread);
        Ok(())
    }

    /// The threads of a machine that has stopped and continues later.
    pub(crate) fn into_idle(mut self) -> IdleThreads {
        std::mem::take(&mut self.threads)
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

    /// A function that pauses all vCPUs for a snapshot, as [`Self::pause`] does; for the thread of a vCPU.
    pub(crate) fn marker(&self) -> impl FnOnce() + Send + use<> {
        let pause = Arc::clone(&self.pause);
        move || pause.mark()
    }

    /// Whether the vCPUs are paused for a snapshot.
    pub(crate) fn is_marked(&self) -> bool {
        self.pause.is_marked()
    }

    /// Reads the states of all vCPUs, which are paused, in the order of their ids; also returns the id of the vCPU that paused the
    /// others. `None` if one does not run any more.
    pub(crate) fn save(&self) -> Option<(Vec<SavedVcpu>, usize)> {
        const LIMIT: Duration = Duration::from_secs(5);
        let count = self.threads.0.len().saturating_sub(lock(&self.outcomes).len());
        let (mut vcpus, marked_by) = self.pause.save_all(count, LIMIT);
        let of_marker = |thread: &&VcpuThread| Some(thread.handle.thread().id()) == marked_by;
        let marker = self.threads.0.iter().find(of_marker)?.vcpu;
        vcpus.sort_unstable_by_key(|vcpu| vcpu.id);
        (vcpus.len() == self.threads.0.len()).then_some((vcpus, marker))
    }

    /// Whether no vCPU runs guest code or handles an exit, after [`Self::pause`].
    pub(crate) fn is_paused(&self) -> bool {
        self.pause.waiting() + lock(&self.outcomes).len() >= self.threads.0.len()
    }

    /// Interrupts every vCPU that runs.
    pub(crate) fn kick(&self) {
        for thread in &self.threads.0 {
            // A thread without a run ignores it.
            let _ = thread.handle.kill(SIGRTMIN());
        }
    }

    /// Ends the run of every thread, and waits for it.
    pub(crate) fn stop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        self.pause.clear();
        self.confined.abandon();
        if let Some(latch) = &self.latch {
            latch.open();
        }
        // All vCPUs are kicked together: one may wait for a lock that another holds while it writes to the console, and
        // only that write can be interrupted. A thread with an outcome does not enter the guest again.
        while lock(&self.outcomes).len() < self.running() {
            self.kick();
            // Resets the counter, so that only an end after this moment cuts the wait short.
            let _ = self.ended.read();
            let _ = wait_readable(
                crate::poll::borrow(&self.ended),
                Some(std::time::Instant::now() + KICK_INTERVAL),
            );
        }
    }

    /// The number of threads that have a run or an outcome that was not taken.
    fn running(&self) -> usize {
        if self.is_taken { 0 } else { self.threads.0.len() }
    }

    /// The vCPUs whose threads have ended, and their outcomes in the order of the ends; each is returned once.
    pub(crate) fn take_outcomes(&mut self) -> (Vec<Vcpu>, Vec<VcpuOutcome>) {
        self.is_taken = true;
        std::mem::take(&mut *lock(&self.outcomes)).into_iter().unzip()
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.stop();
    }
}
