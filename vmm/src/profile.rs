//! The records of a profiled boot: samples of the guest's instruction pointer, VM exits, and the kernel log.
#![expect(unsafe_code, reason = "a timer that signals one thread has no safe wrapper")]

use crate::config::ProfileConfig;
use crate::timeline::Instant;
use guest_protocol::port;
use std::io;
use std::time::Duration;
use vmm_sys_util::signal::SIGRTMIN;

/// Maximum number of records per kind. A boot causes some hundreds; a guest with more exits than this is not booting
/// any more.
const RECORDS_MAX: usize = 1 << 20;

/// Maximum number of samples; each contains up to 4 KiB of stack.
const SAMPLES_MAX: usize = 1 << 16;

/// Maximum number of times that the sample interval is doubled for a guest that makes no progress.
const DOUBLINGS_MAX: u32 = 6;

/// Minimum delay of the next attempt after a missed sample: much longer than taking a sample.
const AGAIN_MIN: Duration = Duration::from_millis(1);

/// A sample of a vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The time of the sample.
    pub at: Instant,
    /// The index of the vCPU.
    pub vcpu: u8,
    /// The instruction pointer, a virtual address of the guest.
    pub instruction: u64,
    /// Values on the kernel stack that may be return addresses, innermost first. The kernel has no frame pointers, so
    /// that some are leftovers of earlier calls.
    pub stack: Vec<u64>,
}

/// The first call of a kernel function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionMark {
    /// When the VMM handled the exit.
    pub at: Instant,
    /// The index of the vCPU.
    pub vcpu: u8,
    /// The virtual address of the function.
    pub function: u64,
    /// Nanoseconds that the VMM took to handle the exit, without those of the exit and entry themselves.
    pub held: u64,
}

/// The operation that caused an exit to the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExitKind {
    /// Read of an I/O port.
    PortRead,
    /// Write of an I/O port.
    PortWrite,
    /// Read of a memory-mapped register.
    MmioRead,
    /// Write of a memory-mapped register.
    MmioWrite,
}

impl ExitKind {
    /// The name of the operation in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::PortRead => "port read",
            Self::PortWrite => "port write",
            Self::MmioRead => "memory read",
            Self::MmioWrite => "memory write",
        }
    }
}

/// A VM exit to the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitRecord {
    /// When the VMM handled the exit.
    pub at: Instant,
    /// The operation of the guest.
    pub kind: ExitKind,
    /// The port, or the guest-physical address.
    pub address: u64,
}

/// The records of a boot, in the order of time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// Samples of the vCPUs.
    pub samples: Vec<Sample>,
    /// VM exits to the VMM, without those of function marks and of the transfer of the kernel log.
    pub exits: Vec<ExitRecord>,
    /// First calls of the configured functions.
    pub marks: Vec<FunctionMark>,
    /// The kernel log as returned by syslog(2); empty if init has not sent it. The guest controls its content.
    pub kernel_log: Vec<u8>,
}

impl Profile {
    /// Adds the records of one vCPU.
    pub(crate) fn add(&mut self, recorder: Recorder) {
        self.samples.extend(recorder.samples);
        self.exits.extend(recorder.exits);
        self.marks.extend(recorder.marks);
        self.samples.sort_by_key(|sample| sample.at);
        self.exits.sort_by_key(|exit| exit.at);
        self.marks.sort_by_key(|mark| mark.at);
    }
}

/// The recorder of one vCPU, which is used on its thread.
#[derive(Debug)]
pub struct Recorder {
    sample_interval: Option<Duration>,
    vcpu: u8,
    timer: Option<SampleTimer>,
    samples: Vec<Sample>,
    exits: Vec<ExitRecord>,
    marks: Vec<FunctionMark>,
}

impl Recorder {
    pub(crate) const fn new(config: &ProfileConfig, vcpu: u8) -> Self {
        let sample_interval = config.sample_interval;
        Self { sample_interval, vcpu, timer: None, samples: Vec::new(), exits: Vec::new(), marks: Vec::new() }
    }

    /// Starts to interrupt the calling thread periodically, if samples are configured.
    pub(crate) fn start_sampling(&mut self) -> io::Result<()> {
        self.timer = self.sample_interval.map(SampleTimer::start).transpose()?;
        Ok(())
    }

    /// Stops the interruptions.
    pub(crate) fn stop_sampling(&mut self) {
        self.timer = None;
    }

    /// Whether the next sample is due.
    pub(crate) fn sample_is_due(&self) -> bool {
        self.samples.len() < SAMPLES_MAX
            && self.timer.as_ref().is_some_and(|timer| timer.due <= Instant::now())
    }

    /// Records a sample, and schedules the next one: with a longer interval if the instruction is the same as before.
    /// An entry into the guest may take as long as the interval, in which case the guest would make no progress.
    pub(crate) fn sample(&mut self, instruction: u64, stack: Vec<u64>) {
        let stood_still = self.samples.last().is_some_and(|last| last.instruction == instruction);
        self.samples.push(Sample { at: Instant::now(), vcpu: self.vcpu, instruction, stack });
        if let Some(timer) = &mut self.timer {
            timer.doublings = if stood_still { (timer.doublings + 1).min(DOUBLINGS_MAX) } else { 0 };
            timer.rearm();
        }
    }

    /// Records the first call of a function; the exit was handled from `at` until now.
    pub(crate) fn mark(&mut self, at: Instant, function: u64) {
        let held = Instant::now().since(at);
        self.marks.push(FunctionMark { at, vcpu: self.vcpu, function, held });
    }

    /// Records an exit. The transfer of the kernel log after the end of the boot causes many exits; neither these nor
    /// later exits are recorded.
    pub(crate) fn exit(&mut self, kind: ExitKind, address: u64) {
        if (kind, address) == (ExitKind::PortWrite, port::KERNEL_LOG.into()) {
            return self.stop_sampling();
        }
        if self.exits.len() < RECORDS_MAX {
            self.exits.push(ExitRecord { at: Instant::now(), kind, address });
        }
    }
}

/// A timer that interrupts the thread that started it, with the signal that makes `KVM_RUN` return: once after each
/// arming, and again much later. With a short period, a guest would never execute an instruction if taking a sample
/// takes longer than the period.
#[derive(Debug)]
struct SampleTimer {
    id: libc::timer_t,
    interval: Duration,
    /// Number of times that the next interval is doubled.
    doublings: u32,
    due: Instant,
}

// SAFETY: the kernel identifies a timer by a number, which any thread of the process may use.
unsafe impl Send for SampleTimer {}

impl SampleTimer {
    fn start(interval: Duration) -> io::Result<Self> {
        let mut id: libc::timer_t = std::ptr::null_mut();
        // SAFETY: an all-zero sigevent is valid; the kernel reads it and writes the timer's id. `Running::start` has
        // installed the signal's handler.
        let result = unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = SIGRTMIN();
            event.sigev_notify_thread_id = libc::gettid();
            libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut id)
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut this = Self { id, interval, doublings: 0, due: Instant(0) };
        this.rearm();
        Ok(this)
    }

    fn rearm(&mut self) {
        let time = |duration: Duration| libc::timespec {
            tv_sec: libc::time_t::try_from(duration.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: duration.subsec_nanos().into(),
        };
        // A signal that arrives just before the entry into the guest is lost; the next one is not.
        let interval = self.interval.saturating_mul(1 << self.doublings);
        let again = interval.saturating_mul(8).max(AGAIN_MIN);
        let setting = libc::itimerspec { it_interval: time(again), it_value: time(interval) };
        // SAFETY: the timer belongs to this structure, and the kernel only reads the setting.
        unsafe { libc::timer_settime(self.id, 0, &raw const setting, std::ptr::null_mut()) };
        let interval = u64::try_from(interval.as_nanos()).unwrap_or(u64::MAX);
        self.due = Instant(Instant::now().0.saturating_add(interval));
    }
}

impl Drop for SampleTimer {
    fn drop(&mut self) {
        // SAFETY: the timer was created by `start`, and is deleted once.
        unsafe { libc::timer_delete(self.id) };
    }
}
