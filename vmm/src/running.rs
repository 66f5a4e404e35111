//! A running machine: a thread per vCPU, and the event loop on the thread that waits for the machine's end.

use crate::bus::{GuestRequest, lock};
use crate::control::Control;
use crate::devices::virtio::balloon;
use crate::error::{Error, with_causes};
use crate::event_loop::{EventLoop, LoopEnd};
use crate::exit::{Exit, ExitReason};
use crate::jail::Thread;
use crate::kvm::{Clocks, ExitCounts, Vcpu, VcpuEnd};
use crate::machine::{Machine, Purpose};
use crate::memory::BackingFile;
use crate::preboot::error::PrebootError;
use crate::profile::Profile;
use crate::timeline::Instant;
use crate::vcpu_threads::{VcpuOutcome, VcpuThreads};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// Time limit for the requests in flight of a machine that is going to be saved.
const REQUESTS_LIMIT: Duration = Duration::from_secs(5);

/// Lines of console output that an [`Exit`] keeps.
const CONSOLE_LINES: usize = 20;

impl Machine {
    /// Starts the vCPUs.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left.
    pub fn start(self) -> Result<Running, Error> {
        Running::start(self)
    }
}

/// A running machine. Dropping it stops it.
#[derive(Debug)]
pub struct Running {
    vcpus: VcpuThreads,
    stop: EventFd,
    event_loop: EventLoop,
    /// What delays the destruction of the machine until after the end of this process.
    outlives: Option<OwnedFd>,
    /// Dropped last, after all vCPUs.
    machine: Machine,
}

/// Stops a running machine from another thread or a signal handler.
#[derive(Debug)]
pub struct StopHandle(EventFd);

impl StopHandle {
    /// Requests that the machine stops. [`Running::wait`] then returns [`ExitReason::Stopped`].
    pub fn stop(&self) {
        // A write fails only if the counter overflows, and then the request is pending anyway.
        let _ = self.0.write(1);
    }

    /// The eventfd of the handle. Writing a nonzero 8-byte integer to it has the effect of [`Self::stop`]; a signal
    /// handler may do so.
    #[must_use]
    pub fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// A machine that stopped at the stage of its [`Purpose`].
#[derive(Debug)]
pub(crate) struct CapturedMachine {
    /// The vCPUs, in the order of their ids.
    pub(crate) vcpus: Vec<Vcpu>,
    /// The id of the vCPU that reached the stage.
    pub(crate) init_vcpu: usize,
    /// The time stamp counter when the last vCPU stopped, from which later machines continue: at a later value, the
    /// guest's timers would have expired. `None` if one is in the middle of an instruction.
    tsc: Option<u64>,
    stopped: Running,
}

impl CapturedMachine {
    /// The machine, without its vCPUs.
    pub(crate) const fn machine(&self) -> &Machine {
        &self.stopped.machine
    }

    /// The clocks of the machine when its last vCPU stopped.
    ///
    /// # Errors
    /// When KVM does not report them.
    pub(crate) fn clocks(&self) -> Result<Clocks, Error> {
        let in_access = PrebootError::NotCapturable("a vCPU is in the middle of an access to a device");
        let tsc = self.tsc.ok_or(in_access)?;
        Ok(Clocks::at(tsc, &self.stopped.machine.vm, &self.vcpus[0])?)
    }

    /// The machine with its vCPUs, which continues when it is started again.
    pub(crate) fn into_machine(self) -> Machine {
        let Running { mut machine, vcpus: threads, .. } = self.stopped;
        machine.threads = threads.into_idle();
        machine.vcpus = self.vcpus;
        machine.stopping.store(false, Ordering::Release);
        machine
    }
}

/// A machine whose guest has ended. Dropping it frees its memory and destroys its KVM objects.
#[derive(Debug)]
pub struct StoppedMachine(Running);

impl StoppedMachine {
    /// The connection to the front, if it is another process.
    pub(crate) const fn control(&self) -> Option<&Control> {
        self.0.event_loop.control()
    }

    /// Leaves memory and KVM objects to the kernel, for a program that exits now: the exit frees the memory, and the
    /// kernel destroys the KVM objects and the watch on mapped files after it, so that no process waits for that.
    pub fn leave_to_kernel(mut self) {
        // A jail does not allow it any more; there it was tried before the guest ran.
        if !self.0.machine.jail.is_on() {
            self.0.prepare_to_leave();
        }
        std::mem::forget(self);
    }
}

impl Running {
    pub(crate) fn start(mut machine: Machine) -> Result<Self, Error> {
        let eventfd =
            || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::host("create an eventfd"));
        let (ended, stop) = (eventfd()?, eventfd()?);
        // No device is used before it gets its host's side.
        let (devices, files) = match machine.purpose {
            Purpose::Wait => Default::default(),
            _ => (machine.devices.virtio.clone(), machine.memory.backing_files()),
        };
        let event_loop = EventLoop::new(
            &ended,
            &stop,
            machine.devices.input.take(),
            machine.control.take(),
            devices,
            files,
            machine.jail,
        )
        .map_err(Error::host("create an epoll instance"))?;
        machine.jail.enter_root()?;
        let mut vcpus: Vec<_> = std::mem::take(&mut machine.vcpus).into_iter().enumerate().collect();
        // The first vCPU starts last: the others wait in KVM until it starts them. With a latch, the vCPU that does not
        // wait there starts first.
        match &machine.latch {
            Some(latch) => vcpus.swap(0, latch.first()),
            None => vcpus.reverse(),
        }
        let stopping = Arc::clone(&machine.stopping);
        let (latch, earlier) = (machine.latch.take(), std::mem::take(&mut machine.threads));
        let mut threads = VcpuThreads::new(ended, stopping, latch, earlier, machine.jail)?;
        for (id, vcpu) in vcpus {
            threads.start(id, vcpu, &machine.devices.buses, machine.purpose != Purpose::Run)?;
        }
        let mut this = Self { vcpus: threads, stop, event_loop, outlives: None, machine };
        if this.machine.jail.is_on() {
            this.prepare_to_leave();
        }
        // This thread serves no device before it waits for the first event.
        this.machine.jail.confine_thread(Thread::EventLoop)?;
        this.vcpus.begin();
        Ok(this)
    }

    /// Prepares [`StoppedMachine::leave_to_kernel`].
    fn prepare_to_leave(&mut self) {
        // On hosts without io_uring, the exit of the process takes this time instead.
        self.outlives = self.machine.vm.outlive_process(self.event_loop.changes()).ok();
    }

    /// Creates a handle that stops this machine.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn stop_handle(&self) -> Result<StopHandle, Error> {
        self.stop.try_clone().map(StopHandle).map_err(Error::host("duplicate an eventfd"))
    }

    /// A handle that changes the size of the guest's balloon and reads its statistics, if there is a balloon.
    #[must_use]
    pub fn balloon(&self) -> Option<balloon::Control> {
        self.machine.devices.balloon.clone()
    }

    /// The files that are mapped into guest memory.
    #[must_use]
    pub fn backing_files(&self) -> Vec<Arc<BackingFile>> {
        self.machine.memory.backing_files()
    }

    /// Waits for the machine's end, and releases its resources.
    #[must_use]
    pub fn wait(self) -> Exit {
        let (mut exit, stopped) = self.wait_for_end();
        drop(stopped);
        exit.timeline.reached("machine released");
        exit
    }

    /// Waits for the machine's end. Dropping the stopped machine takes as long as a boot, because KVM waits until every
    /// processor of the host has passed through a quiescent state (RCU).
    #[must_use]
    pub fn wait_for_end(mut self) -> (Exit, StoppedMachine) {
        let end = self.event_loop.run(&self.machine, &self.vcpus);
        let ended_at = Instant::now();
        self.vcpus.stop();
        for device in &self.machine.devices.virtio {
            lock(device).end();
        }
        // The vCPUs are released with the machine, or by the kernel: the jail allows no munmap.
        let (vcpus, outcomes) = self.vcpus.take_outcomes();
        self.machine.vcpus = vcpus;
        (self.describe(outcomes, end, ended_at), StoppedMachine(self))
    }

    /// Waits until the guest reaches the stage at which the machine stops, of its [`Purpose`].
    ///
    /// # Errors
    /// When the guest ends before; the error is the reason of its end.
    pub(crate) fn wait_for_capture(mut self) -> Result<CapturedMachine, ExitReason> {
        let end = self.event_loop.run(&self.machine, &self.vcpus);
        self.vcpus.stop();
        self.event_loop.complete_requests(REQUESTS_LIMIT);
        let at_mark = |outcome: &VcpuOutcome| matches!(outcome.end, VcpuEnd::Request(GuestRequest::Capture));
        let (vcpus, outcomes) = self.vcpus.take_outcomes();
        let Some(init_vcpu) = outcomes.first().filter(|first| at_mark(first)).map(|first| first.id) else {
            return Err(self.describe(outcomes, end, Instant::now()).reason);
        };
        let tsc = outcomes.iter().map(|outcome| outcome.tsc).collect::<Option<Vec<_>>>();
        let tsc = tsc.and_then(|all| all.into_iter().max());
        let mut vcpus: Vec<_> = outcomes.iter().map(|outcome| outcome.id).zip(vcpus).collect();
        vcpus.sort_by_key(|(id, _)| *id);
        let vcpus = vcpus.into_iter().map(|(_, vcpu)| vcpu).collect();
        Ok(CapturedMachine { vcpus, init_vcpu, tsc, stopped: self })
    }

    fn describe(&self, mut outcomes: Vec<VcpuOutcome>, end: LoopEnd, ended_at: Instant) -> Exit {
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
            // The vCPU that ended first is the cause; the others stopped because of it.
            LoopEnd::VcpuEnded => match outcomes.into_iter().min_by_key(VcpuOutcome::is_stopped) {
                Some(outcome) => {
                    registers = outcome.registers;
                    let lost = outcome.end.is_bad_address().then(|| lost_memory(&files)).flatten();
                    lost.unwrap_or_else(|| reason_of(outcome.end, &console_tail))
                }
                None => ExitReason::Stopped,
            },
        };
        let failures = devices.virtio.iter().filter_map(|device| lock(device).failure());
        let failures = failures.chain(lock(&devices.serial).failure());
        Exit {
            reason,
            timeline,
            exits,
            device_failures: failures.collect(),
            unclaimed_ports: devices.buses.ports.unclaimed(),
            console_tail,
            registers,
            profile,
        }
    }
}

impl VcpuEnd {
    /// Whether KVM could not access the guest's memory at an address where the machine has some.
    fn is_bad_address(&self) -> bool {
        matches!(self, Self::RunFailed(error) if error.raw_os_error() == Some(libc::EFAULT))
    }
}

/// Whether the last lines of the console contain a kernel panic (`panic` in kernel/panic.c).
fn has_panicked(console: &[String]) -> bool {
    console.iter().any(|line| line.contains("Kernel panic - not syncing"))
}

/// The exit reason if a file that is mapped into guest memory was truncated.
fn lost_memory(files: &[Arc<BackingFile>]) -> Option<ExitReason> {
    let path = String::from_utf8_lossy(files.iter().find(|file| file.is_truncated())?.path());
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
        VcpuEnd::Request(GuestRequest::HostFailed(what)) => ExitReason::VmmFailure(what.to_owned()),
        // Only a machine that continues later has a device that requests `Capture`, and only memory-mapped devices request
        // `Retry`, which the vCPU handles.
        VcpuEnd::Request(GuestRequest::Capture | GuestRequest::Retry) => ExitReason::Stopped,
        VcpuEnd::TripleFault if has_panicked(console) => ExitReason::GuestPanic,
        VcpuEnd::TripleFault => ExitReason::TripleFault,
        VcpuEnd::InternalError { suberror } => ExitReason::KvmInternalError { suberror },
        VcpuEnd::EntryFailed { reason } => {
            ExitReason::VmmFailure(format!("the processor refused to enter the guest (reason {reason:#x})"))
        }
        VcpuEnd::HeldProcessor => {
            ExitReason::VmmFailure("the guest kept the processor from its host, and cannot continue".into())
        }
        VcpuEnd::Unexpected(exit) => {
            ExitReason::VmmFailure(format!("KVM reported {exit}, which no guest of this machine can cause"))
        }
        VcpuEnd::RunFailed(error) if error.raw_os_error() == Some(libc::EAGAIN) => ExitReason::VmmFailure(
            "KVM could not start a thread to run a vCPU: the user has as many processes as are allowed; end some, or \
             raise the limit (`ulimit -u`, or pids.max of the cgroup)"
                .into(),
        ),
        VcpuEnd::RunFailed(error) => ExitReason::VmmFailure(format!("KVM could not run a vCPU: {error}")),
        VcpuEnd::NotConfined(error) => ExitReason::VmmFailure(with_causes(&error)),
        VcpuEnd::Stopped => ExitReason::Stopped,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_ioctls::VcpuExit;
    use std::io;

    #[test]
    fn missing_memory_is_recognized_in_both_forms_of_kvm() {
        let missing = VcpuExit::MemoryFault { flags: 0, gpa: 1 << 32, size: 4096 };
        assert!(VcpuEnd::of_exit(&missing).is_bad_address());
        assert!(VcpuEnd::RunFailed(io::Error::from_raw_os_error(libc::EFAULT)).is_bad_address());
        assert!(!VcpuEnd::of_exit(&VcpuExit::Hlt).is_bad_address());
        assert!(!VcpuEnd::RunFailed(io::Error::from_raw_os_error(libc::EINVAL)).is_bad_address());
    }
}
