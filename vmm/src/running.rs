//! A machine that runs: one thread per vCPU, and the thread that waits for its end.

use crate::bus::{GuestRequest, lock};
use crate::devices::virtio::balloon;
use crate::error::Error;
use crate::event_loop::{EventLoop, LoopEnd};
use crate::exit::{Exit, ExitReason};
use crate::kvm::{ExitCounts, Registers, Vcpu, VcpuEnd};
use crate::machine::Machine;
use crate::memory::BackingFile;
use crate::profile::{Profile, Recorder};
use crate::timeline::Instant;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

/// Lines of console output that an [`Exit`] keeps.
const CONSOLE_LINES: usize = 20;
/// How long to wait for a kicked vCPU before kicking it again: a signal that arrives just before
/// it enters the guest is lost, and the next one is not.
const KICK_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };

impl Machine {
    /// Starts the vCPUs.
    ///
    /// # Errors
    /// When the host refuses a thread or a descriptor.
    pub fn start(self) -> Result<Running, Error> {
        Running::start(self)
    }
}

/// How a vCPU's thread ended.
#[derive(Debug)]
struct VcpuOutcome {
    id: usize,
    vcpu: Vcpu,
    end: VcpuEnd,
    counts: ExitCounts,
    registers: Option<Registers>,
    /// Time stamp counter at the end, of a machine that is to be kept.
    tsc: Option<u64>,
    first_run: Instant,
    recorder: Option<Recorder>,
}

/// A running machine. Dropping it stops it.
#[derive(Debug)]
pub struct Running {
    threads: Vec<JoinHandle<()>>,
    /// Outcomes in the order in which the threads ended.
    outcomes: Arc<Mutex<Vec<VcpuOutcome>>>,
    ended: EventFd,
    stop: EventFd,
    event_loop: EventLoop,
    /// Dropped last, when no vCPU exists any more.
    machine: Machine,
}

/// Stops a running machine from elsewhere: another thread, or a signal handler.
#[derive(Debug)]
pub struct StopHandle(EventFd);

impl StopHandle {
    /// Tells the machine to stop. Its [`Running::wait`] then returns [`ExitReason::Stopped`].
    pub fn stop(&self) {
        // The counter of an eventfd that is read once cannot overflow.
        let _ = self.0.write(1);
    }

    /// The descriptor behind it: eight bytes written to it, a number other than zero, do what
    /// [`Self::stop`] does, also in a signal handler.
    #[must_use]
    pub fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// A machine that stopped where it was told to, with all that can be said of it.
#[derive(Debug)]
pub(crate) struct Frozen {
    /// In the order of their ids.
    pub(crate) vcpus: Vec<Vcpu>,
    /// The one that reached the mark.
    pub(crate) marked: usize,
    /// Time stamp counter when the last of them stopped. The machine goes on from there: later, its timers
    /// would have expired.
    pub(crate) tsc: Option<u64>,
    rest: Running,
}

impl Frozen {
    /// The machine, without its vCPUs.
    pub(crate) const fn machine(&self) -> &Machine {
        &self.rest.machine
    }
}

/// Memory and KVM's objects of a machine whose guest has ended. Dropping it gives them back.
#[derive(Debug)]
pub struct Remains(Running);

impl Remains {
    /// Leaves them to the kernel, for a program that ends now: its end frees the memory, and KVM's
    /// objects and the watch on files go when nobody waits for it any more.
    pub fn leave_to_kernel(self) {
        // Where the host has no io_uring, the end of the process takes the time instead.
        std::mem::forget(self.0.machine.vm.outlive_process(self.0.event_loop.changes()));
        std::mem::forget(self);
    }
}

extern "C" fn interrupted(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // That the signal arrives is all it is for: KVM_RUN and writes of the console return.
}

impl Running {
    pub(crate) fn start(mut machine: Machine) -> Result<Self, Error> {
        // A handler has to exist, or the signal would end the process. It does nothing, and no
        // other part of a program has a use for this signal number by convention.
        register_signal_handler(SIGRTMIN(), interrupted)
            .map_err(|error| Error::host("install a signal handler")(error.into()))?;
        let eventfd =
            || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::host("make an eventfd"));
        let (ended, stop) = (eventfd()?, eventfd()?);
        let devices = machine.devices.virtio.clone();
        let files = machine.memory.backing_files();
        let event_loop = EventLoop::new(
            &ended,
            &stop,
            machine.devices.input.take(),
            machine.control.take(),
            devices,
            files,
        )
        .map_err(Error::host("make an epoll instance"))?;
        let mut vcpus: Vec<_> = std::mem::take(&mut machine.vcpus).into_iter().enumerate().collect();
        // The first vCPU starts last: the others wait inside KVM until it wakes them. Where they wait at a latch
        // for one of them, that one comes first.
        match &machine.latch {
            Some(latch) => vcpus.swap(0, latch.first()),
            None => vcpus.reverse(),
        }
        let outcomes = Arc::default();
        let mut this = Self { threads: Vec::new(), outcomes, ended, stop, event_loop, machine };
        for (id, vcpu) in vcpus {
            this.start_vcpu(id, vcpu)?;
        }
        Ok(this)
    }

    fn start_vcpu(&mut self, id: usize, mut vcpu: Vcpu) -> Result<(), Error> {
        let ended = self.ended.try_clone().map_err(Error::host("duplicate an eventfd"))?;
        let buses = Arc::clone(&self.machine.devices.buses);
        let stopping: Arc<AtomicBool> = Arc::clone(&self.machine.stopping);
        let outcomes = Arc::clone(&self.outcomes);
        let is_kept = self.machine.is_kept;
        let latch = self.machine.latch.clone();
        let run = move || {
            // Whoever started this process may have blocked the signal.
            let _ = unblock_signal(SIGRTMIN());
            if let Some(latch) = latch {
                latch.wait(id);
            }
            // Without a timer there are no samples, which the profile shows.
            if let Some(recorder) = &mut vcpu.recorder {
                let _ = recorder.start_sampling();
            }
            let first_run = Instant::now();
            let end = vcpu.run(&buses, &stopping);
            // A counter that cannot be read is missed when the machine is written down.
            let tsc = is_kept.then(|| vcpu.tsc().ok()).flatten();
            let registers = end.is_failure().then(|| vcpu.registers()).flatten();
            let counts = *vcpu.counts();
            let mut recorder = vcpu.recorder.take();
            if let Some(recorder) = &mut recorder {
                recorder.stop_sampling();
            }
            lock(&outcomes).push(VcpuOutcome { id, vcpu, end, counts, registers, tsc, first_run, recorder });
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

    /// A handle with which others can stop this machine.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn stop_handle(&self) -> Result<StopHandle, Error> {
        self.stop.try_clone().map(StopHandle).map_err(Error::host("duplicate an eventfd"))
    }

    /// With which others change the size of the guest's balloon and read its statistics, if it has one.
    #[must_use]
    pub fn balloon(&self) -> Option<balloon::Control> {
        self.machine.devices.balloon.clone()
    }

    /// Files that the guest's memory is mapped from.
    #[must_use]
    pub fn backing_files(&self) -> Vec<Arc<BackingFile>> {
        self.machine.memory.backing_files()
    }

    /// Waits for the machine's end and gives back what it used.
    #[must_use]
    pub fn wait(self) -> Exit {
        let (mut exit, remains) = self.wait_for_end();
        drop(remains);
        exit.timeline.reached("machine given back");
        exit
    }

    /// Waits for the machine's end. Dropping what remains of it takes as long as a boot: KVM waits
    /// for every processor of the host to pass through a quiescent state.
    #[must_use]
    pub fn wait_for_end(mut self) -> (Exit, Remains) {
        let end = self.event_loop.run(&self.machine.devices.serial);
        let ended_at = Instant::now();
        self.stop_vcpus();
        for device in &self.machine.devices.virtio {
            lock(device).end();
        }
        (self.describe(end, ended_at), Remains(self))
    }

    /// Waits for the guest to reach the mark at which its machine is to stop.
    ///
    /// # Errors
    /// Why the guest ended before.
    pub(crate) fn freeze(mut self) -> Result<Frozen, ExitReason> {
        let end = self.event_loop.run(&self.machine.devices.serial);
        self.stop_vcpus();
        let at_mark = |outcome: &VcpuOutcome| matches!(outcome.end, VcpuEnd::Request(GuestRequest::Freeze));
        let marked = lock(&self.outcomes).first().filter(|first| at_mark(first)).map(|first| first.id);
        let Some(marked) = marked else {
            return Err(self.describe(end, Instant::now()).reason);
        };
        let mut outcomes = std::mem::take(&mut *lock(&self.outcomes));
        outcomes.sort_by_key(|outcome| outcome.id);
        let tsc = outcomes.iter().map(|outcome| outcome.tsc).max().flatten();
        let vcpus = outcomes.into_iter().map(|outcome| outcome.vcpu).collect();
        Ok(Frozen { vcpus, marked, tsc, rest: self })
    }

    /// Makes every vCPU thread end, and waits for it.
    fn stop_vcpus(&mut self) {
        self.machine.stopping.store(true, Ordering::Release);
        if let Some(latch) = &self.machine.latch {
            latch.open();
        }
        // All at once: one vCPU may wait for a lock that another holds while it writes, and only
        // that write can be interrupted. A thread that has left its outcome is as good as ended.
        while lock(&self.outcomes).len() < self.threads.len() {
            for thread in self.threads.iter().filter(|thread| !thread.is_finished()) {
                // The thread may end on its own in this moment; then nobody needs the signal.
                let _ = thread.kill(SIGRTMIN());
            }
            let _ = wait_readable(&self.ended);
        }
        for thread in self.threads.drain(..) {
            // Threads do not panic: the profile aborts the process on a panic.
            let _ = thread.join();
        }
    }

    fn describe(&mut self, end: LoopEnd, ended_at: Instant) -> Exit {
        let mut outcomes = std::mem::take(&mut *lock(&self.outcomes));
        let devices = &self.machine.devices;
        let mut exits = ExitCounts::default();
        for outcome in &outcomes {
            exits.add(&outcome.counts);
        }
        let mut timeline = self.machine.timeline.clone();
        if let Some(first) = outcomes.iter().map(|outcome| outcome.first_run).min() {
            timeline.reached_at("first instruction", first);
        }
        devices.add_marks(&mut timeline);
        timeline.reached_at("guest ended", ended_at);
        timeline.reached("vCPUs stopped");

        let profile = devices.kernel_log.as_ref().map(|log| {
            let mut profile = Profile { kernel_log: lock(log).text().to_vec(), ..Profile::default() };
            for recorder in outcomes.iter_mut().filter_map(|outcome| outcome.recorder.take()) {
                profile.add(recorder);
            }
            profile
        });
        let console_tail = lock(&devices.serial).last_lines(CONSOLE_LINES);
        let mut registers = None;
        let files = self.machine.memory.backing_files();
        let reason = match end {
            LoopEnd::TerminalEscape => ExitReason::TerminalEscape,
            LoopEnd::Stopped => ExitReason::Stopped,
            LoopEnd::MemoryLost => lost_memory(&files).unwrap_or(ExitReason::Stopped),
            // What ended first is why the machine ended; the rest stopped because of it.
            LoopEnd::VcpuEnded => match outcomes.into_iter().next() {
                Some(outcome) => {
                    registers = outcome.registers;
                    let lost = outcome.end.is_bad_address().then(|| lost_memory(&files)).flatten();
                    lost.unwrap_or_else(|| reason_of(outcome.end, &console_tail))
                }
                None => ExitReason::Stopped,
            },
        };
        Exit {
            reason,
            timeline,
            exits,
            device_failures: devices.virtio.iter().filter_map(|device| lock(device).failure()).collect(),
            unclaimed_ports: devices.buses.ports.unclaimed(),
            console_tail,
            registers,
            profile,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop_vcpus();
    }
}

/// Waits for a vCPU's end, or for the time after which it is kicked again.
fn wait_readable(ended: &EventFd) -> io::Result<()> {
    // Resets the counter, so that only an end after this moment cuts the wait short.
    let _ = ended.read();
    let fd = crate::event_loop::borrow(ended);
    poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&KICK_INTERVAL))?;
    Ok(())
}

impl VcpuEnd {
    /// Whether the registers at this end tell somebody something.
    const fn is_failure(&self) -> bool {
        !matches!(self, Self::Request(_) | Self::Stopped)
    }

    /// Whether KVM found no memory where the guest has some.
    fn is_bad_address(&self) -> bool {
        matches!(self, Self::RunFailed(error) if error.raw_os_error() == Some(libc::EFAULT))
    }
}

/// Whether the kernel's last words were those of a panic (`panic` in kernel/panic.c).
fn has_panicked(console: &[String]) -> bool {
    console.iter().any(|line| line.contains("Kernel panic - not syncing"))
}

/// That a file which is guest memory has become shorter, if one has.
fn lost_memory(files: &[Arc<BackingFile>]) -> Option<ExitReason> {
    let mut path = [0; 4096];
    let path = String::from_utf8_lossy(files.iter().find(|file| file.is_truncated())?.path(&mut path));
    Some(ExitReason::MemoryLost { path: path.into_owned() })
}

fn reason_of(end: VcpuEnd, console: &[String]) -> ExitReason {
    match end {
        VcpuEnd::Request(GuestRequest::End(guest_protocol::ExitStatus::Payload(code))) => {
            ExitReason::Payload(code)
        }
        VcpuEnd::Request(GuestRequest::End(guest_protocol::ExitStatus::InitPanic)) => ExitReason::InitPanic,
        VcpuEnd::Request(GuestRequest::Reset) if has_panicked(console) => ExitReason::GuestPanic,
        VcpuEnd::Request(GuestRequest::Reset) => ExitReason::Reset,
        // Nobody asked this machine to stop there.
        VcpuEnd::Request(GuestRequest::Freeze | GuestRequest::Retry) => ExitReason::Stopped,
        VcpuEnd::TripleFault if has_panicked(console) => ExitReason::GuestPanic,
        VcpuEnd::TripleFault => ExitReason::TripleFault,
        VcpuEnd::InternalError { suberror } => ExitReason::KvmInternalError { suberror },
        VcpuEnd::EntryFailed { reason } => {
            ExitReason::VmmFailure(format!("the processor refused to enter the guest (reason {reason:#x})"))
        }
        VcpuEnd::Unexpected(exit) => {
            ExitReason::VmmFailure(format!("KVM reported {exit}, which no guest of this machine can cause"))
        }
        VcpuEnd::RunFailed(error) => ExitReason::VmmFailure(format!("KVM could not run a vCPU: {error}")),
        VcpuEnd::Stopped => ExitReason::Stopped,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ioctls::VcpuExit;

    #[test]
    fn memory_that_is_missing_is_recognised_however_kvm_says_so() {
        let missing = VcpuExit::MemoryFault { flags: 0, gpa: 1 << 32, size: 4096 };
        assert!(VcpuEnd::of_exit(&missing).is_bad_address());
        assert!(VcpuEnd::RunFailed(io::Error::from_raw_os_error(libc::EFAULT)).is_bad_address());
        assert!(!VcpuEnd::of_exit(&VcpuExit::Hlt).is_bad_address());
        assert!(!VcpuEnd::RunFailed(io::Error::from_raw_os_error(libc::EINVAL)).is_bad_address());
    }
}
