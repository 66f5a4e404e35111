//! What a profiled boot records beside its timeline: where the guest was at regular moments, each
//! exit to the VMM, and the kernel's own log.
#![expect(unsafe_code, reason = "a timer that signals one thread has no safe wrapper")]

use crate::config::ProfileConfig;
use crate::timeline::Instant;
use guest_protocol::port;
use std::io;
use std::time::Duration;
use vmm_sys_util::signal::SIGRTMIN;

/// Records of one kind that a boot can leave at most. A boot has some hundreds; a guest that makes
/// more exits than this is not booting any more.
const RECORDS_MAX: usize = 1 << 20;

/// Samples that a boot can leave at most: each has a part of a stack, 4 KiB at most.
const SAMPLES_MAX: usize = 1 << 16;

/// How often the time to the next sample is doubled at most, for a guest that did not get on.
const DOUBLINGS_MAX: u32 = 6;

/// The least time after which a sample that was missed is tried again: much more than one takes.
const AGAIN_MIN: Duration = Duration::from_millis(1);

/// Where a vCPU was at a moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The moment.
    pub at: Instant,
    /// The vCPU.
    pub vcpu: u8,
    /// Its instruction pointer.
    pub instruction: u64,
    /// Numbers on its kernel stack that may be return addresses, the innermost first. The kernel
    /// keeps no frame pointers: some are left over from earlier calls.
    pub stack: Vec<u64>,
}

/// The first call of a function of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionMark {
    /// When the VMM took it up.
    pub at: Instant,
    /// The vCPU.
    pub vcpu: u8,
    /// The function's address, as the vCPU had it.
    pub function: u64,
    /// Nanoseconds for which the VMM held the guest; the exit and the entry took more.
    pub held: u64,
}

/// What a guest did to leave to the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExitKind {
    /// Read an I/O port.
    PortRead,
    /// Wrote an I/O port.
    PortWrite,
    /// Read a device's register in memory.
    MmioRead,
    /// Wrote a device's register in memory.
    MmioWrite,
}

impl ExitKind {
    /// What a report calls it.
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

/// One exit to the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitRecord {
    /// When the VMM took it up.
    pub at: Instant,
    /// What the guest did.
    pub kind: ExitKind,
    /// The port or the guest-physical address.
    pub address: u64,
}

/// The records of a boot, by time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// Where the vCPUs were.
    pub samples: Vec<Sample>,
    /// Their exits to the VMM, without those of the marks and of sending the log.
    pub exits: Vec<ExitRecord>,
    /// First calls of the functions that were asked for.
    pub marks: Vec<FunctionMark>,
    /// The kernel's log as its `syslog` call gives it; empty where init sent none.
    pub kernel_log: Vec<u8>,
}

impl Profile {
    /// Adds the records of a vCPU.
    pub(crate) fn add(&mut self, recorder: Recorder) {
        self.samples.extend(recorder.samples);
        self.exits.extend(recorder.exits);
        self.marks.extend(recorder.marks);
        self.samples.sort_by_key(|sample| sample.at);
        self.exits.sort_by_key(|exit| exit.at);
        self.marks.sort_by_key(|mark| mark.at);
    }
}

/// Takes the records of one vCPU, on its thread.
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

    /// Starts to interrupt the calling thread, where samples are asked for.
    pub(crate) fn start_sampling(&mut self) -> io::Result<()> {
        self.timer = self.sample_interval.map(SampleTimer::start).transpose()?;
        Ok(())
    }

    /// Stops that.
    pub(crate) fn stop_sampling(&mut self) {
        self.timer = None;
    }

    /// Whether the time of the next sample has come.
    pub(crate) fn sample_is_due(&self) -> bool {
        self.samples.len() < SAMPLES_MAX
            && self.timer.as_ref().is_some_and(|timer| timer.due <= Instant::now())
    }

    /// Records where the vCPU is, and waits for the next time: longer where it is the same instruction as before. An
    /// entry of the guest may take as long as the interval, and then it would never get on.
    pub(crate) fn sample(&mut self, instruction: u64, stack: Vec<u64>) {
        let stood_still = self.samples.last().is_some_and(|last| last.instruction == instruction);
        self.samples.push(Sample { at: Instant::now(), vcpu: self.vcpu, instruction, stack });
        if let Some(timer) = &mut self.timer {
            timer.doublings = if stood_still { (timer.doublings + 1).min(DOUBLINGS_MAX) } else { 0 };
            timer.rearm();
        }
    }

    /// Records the first call of a function, which was taken up at `at`; the guest is about to go on.
    pub(crate) fn mark(&mut self, at: Instant, function: u64) {
        let held = Instant::now().since(at);
        self.marks.push(FunctionMark { at, vcpu: self.vcpu, function, held });
    }

    /// Records an exit. The kernel's log arrives when all that is measured is over, some bytes with each
    /// exit: it is not recorded, and neither is what comes after it.
    pub(crate) fn exit(&mut self, kind: ExitKind, address: u64) {
        if (kind, address) == (ExitKind::PortWrite, port::KERNEL_LOG.into()) {
            return self.stop_sampling();
        }
        if self.exits.len() < RECORDS_MAX {
            self.exits.push(ExitRecord { at: Instant::now(), kind, address });
        }
    }
}

/// Interrupts the thread that started it with the signal that makes `KVM_RUN` return, once each
/// time that it is armed and much later again: a timer that soon repeated by itself would leave a guest without a single
/// instruction where taking a sample takes longer than the interval.
#[derive(Debug)]
struct SampleTimer {
    id: libc::timer_t,
    interval: Duration,
    /// How often it is doubled the next time.
    doublings: u32,
    due: Instant,
}

// SAFETY: a timer's id is a number to the kernel, which any thread of the process may use.
unsafe impl Send for SampleTimer {}

impl SampleTimer {
    fn start(interval: Duration) -> io::Result<Self> {
        let mut id: libc::timer_t = std::ptr::null_mut();
        // SAFETY: an all-zero sigevent is valid; the kernel reads it and fills the timer's id. The
        // signal's handler exists since `Running::start`.
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
        // A signal that arrives just before the vCPU is entered is lost; a later one is not.
        let interval = self.interval.saturating_mul(1 << self.doublings);
        let again = interval.saturating_mul(8).max(AGAIN_MIN);
        let setting = libc::itimerspec { it_interval: time(again), it_value: time(interval) };
        // SAFETY: the timer is this one's own, and the kernel reads the setting.
        unsafe { libc::timer_settime(self.id, 0, &raw const setting, std::ptr::null_mut()) };
        let interval = u64::try_from(interval.as_nanos()).unwrap_or(u64::MAX);
        self.due = Instant(Instant::now().0.saturating_add(interval));
    }
}

impl Drop for SampleTimer {
    fn drop(&mut self) {
        // SAFETY: the timer was made by `start` and is deleted once.
        unsafe { libc::timer_delete(self.id) };
    }
}
