//! KVM's tracepoints of a guest, read through a tracefs instance.
//!
//! They are the same for every monitor. Recording them slows the guest down, so traced runs provide counts, and only
//! times during which no guest runs.

use super::process::Run;
use anyhow::{Context, Result, bail};
use kindling_vmm::Instant;
use std::fs;
use std::path::{Path, PathBuf};

/// The mount point of tracefs.
const TRACEFS: &str = "/sys/kernel/tracing";
/// Size of each processor's buffer in KiB; a boot takes less than a tenth.
const BUFFER_KIB: u32 = 16 * 1024;

/// A recorded tracepoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    /// VM entry.
    Entry,
    /// Exit to user space.
    UserExit,
    /// A page fault on guest memory.
    PageFault,
}

impl Event {
    const ALL: [(Self, &'static str); 3] = [
        (Self::Entry, "kvm_entry"),
        (Self::UserExit, "kvm_userspace_exit"),
        (Self::PageFault, "kvm_page_fault"),
    ];
}

/// The result of a traced run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Traced {
    /// Exits to the monitor until the text was read.
    pub(super) user_exits: u64,
    /// Page faults on guest memory until then.
    pub(super) page_faults: u64,
    /// Time before the first entry plus time after the last exit.
    pub(super) vmm_only: u64,
}

impl Traced {
    /// The tracepoints to record.
    pub(super) const EVENTS: [&str; 3] = [Event::ALL[0].1, Event::ALL[1].1, Event::ALL[2].1];

    /// Evaluates the trace of a boot.
    ///
    /// # Errors
    /// When the trace contains no entry.
    pub(super) fn of(trace: &str, run: &Run) -> Result<Self> {
        evaluate(trace, run.spawned, run.seen, run.ended).context("KVM recorded no entry of the guest")
    }
}

/// The number of page faults on guest memory in a trace.
pub(super) fn page_faults(trace: &str) -> u64 {
    trace.lines().filter_map(event).map(|(event, _)| u64::from(event == Event::PageFault)).sum()
}

/// A tracefs instance that records the events of this process's children.
#[derive(Debug)]
pub(crate) struct Tracer {
    instance: PathBuf,
}

impl Tracer {
    /// Creates the instance.
    ///
    /// # Errors
    /// When the kernel has no such tracepoints or the user lacks permission.
    pub(crate) fn new() -> Result<Self> {
        let events = Path::new(TRACEFS).join("events/kvm");
        if !events.exists() {
            bail!("{} does not exist or is not accessible", events.display());
        }
        let name = format!("kindling-bench-{}", std::process::id());
        let tracer = Self { instance: Path::new(TRACEFS).join("instances").join(name) };
        fs::create_dir(&tracer.instance)
            .with_context(|| format!("cannot create {}", tracer.instance.display()))?;
        tracer.set("buffer_size_kb", &BUFFER_KIB.to_string())?;
        // CLOCK_MONOTONIC, like all other times.
        tracer.set("trace_clock", "mono")?;
        // Events that do not fit are dropped and counted, so that the first entry is kept.
        tracer.set("options/overwrite", "0")?;
        tracer.set("options/event-fork", "1")?;
        tracer.set("set_event_pid", &std::process::id().to_string())?;
        Ok(tracer)
    }

    /// Clears the buffer and enables these tracepoints of KVM.
    pub(crate) fn start(&self, events: &[&str]) -> Result<()> {
        self.set("trace", "")?;
        events.iter().try_for_each(|name| self.set(&format!("events/kvm/{name}/enable"), "1"))
    }

    /// Stops recording and returns the trace, with one line per event.
    pub(crate) fn finish(&self) -> Result<String> {
        self.set("events/kvm/enable", "0")?;
        for entry in fs::read_dir(self.instance.join("per_cpu"))? {
            let stats = fs::read_to_string(entry?.path().join("stats"))?;
            if lost(&stats) {
                bail!("the kernel's trace buffer was too small");
            }
        }
        Ok(fs::read_to_string(self.instance.join("trace"))?)
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        let path = self.instance.join(file);
        fs::write(&path, value).with_context(|| format!("cannot write {value:?} to {}", path.display()))
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.instance);
    }
}

/// Whether a processor's statistics report lost events.
fn lost(stats: &str) -> bool {
    let is_loss = |line: &str| line.starts_with("overrun:") || line.starts_with("dropped events:");
    stats.lines().any(|line| is_loss(line) && !line.ends_with(": 0"))
}

/// The event of a line and its time, if it is one of [`Event::ALL`].
fn event(line: &str) -> Option<(Event, Instant)> {
    let (name, at, _) = split(line)?;
    let (event, _) = Event::ALL.into_iter().find(|(_, known)| *known == name)?;
    Some((event, at))
}

/// Splits a line into the event's name, its time and its arguments:
/// `     CPU 0/KVM-171     [000] d..1.     3.641028: kvm_entry: vcpu 0, rip 0x...`.
pub(crate) fn split(line: &str) -> Option<(&str, Instant, &str)> {
    let (before, event) = line.split_once(": kvm_")?;
    let (name, rest) = event.split_once(": ")?;
    let name = &line[before.len() + 2..before.len() + 6 + name.len()];
    let (seconds, fraction) = before.rsplit(' ').next()?.split_once('.')?;
    let microseconds = seconds.parse::<u64>().ok()? * 1_000_000 + fraction.parse::<u64>().ok()?;
    Some((name, Instant(microseconds * 1000), rest))
}

fn evaluate(trace: &str, spawned: Instant, seen: Instant, ended: Instant) -> Option<Traced> {
    let (mut first_entry, mut last_exit) = (None, None);
    let (mut user_exits, mut page_faults) = (0, 0);
    // Earlier events belong to a failed run that was repeated.
    for (event, at) in trace.lines().filter_map(event).filter(|(_, at)| *at >= spawned) {
        match event {
            Event::Entry => first_entry = Some(first_entry.map_or(at, |first: Instant| first.min(at))),
            Event::UserExit => last_exit = last_exit.max(Some(at)),
            Event::PageFault => {}
        }
        user_exits += u64::from(event == Event::UserExit && at <= seen);
        page_faults += u64::from(event == Event::PageFault && at <= seen);
    }
    let vmm_only = first_entry?.since(spawned) + ended.since(last_exit?);
    Some(Traced { user_exits, page_faults, vmm_only })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
# tracer: nop
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
       CPU 0/KVM-171     [000] d..1.     3.000100: kvm_entry: vcpu 0, rip 0xfff0
          vcpu 0-172     [001] .....     3.000090: kvm_page_fault: vcpu 0 rip 0xfff0 address 0x0
          vcpu 0-172     [001] .....     3.000120: kvm_page_fault: vcpu 0 rip 0x1: kvm_entry
          vcpu 0-172     [001] .....     3.000200: kvm_userspace_exit: reason KVM_EXIT_IO (2)
          vcpu 0-172     [001] d..1.     3.000250: kvm_entry: vcpu 0, rip 0xfff2
          vcpu 0-172     [001] .....     3.000300: kvm_userspace_exit: reason restart (-4)
          vcpu 0-172     [001] .....     3.000300: kvm_exit: vcpu 0
";

    #[test]
    fn events_are_counted_until_the_text_was_read() {
        let traced = evaluate(TRACE, Instant(3_000_000_000), Instant(3_000_250_000), Instant(3_000_900_000));
        assert_eq!(traced, Some(Traced { user_exits: 1, page_faults: 2, vmm_only: 100_000 + 600_000 }));
    }

    #[test]
    fn page_faults_are_counted_in_the_whole_trace() {
        assert_eq!(page_faults(TRACE), 2);
    }

    #[test]
    fn events_before_the_spawn_are_ignored() {
        let before = TRACE.replace("     3.000", "     2.000");
        let both = before + TRACE;
        let traced =
            |trace| evaluate(trace, Instant(3_000_000_000), Instant(3_000_250_000), Instant(3_000_900_000));
        assert_eq!(traced(&both), traced(TRACE));
    }

    #[test]
    fn a_trace_without_an_entry_has_no_result() {
        assert_eq!(evaluate("# tracer: nop\n", Instant(0), Instant(1), Instant(2)), None);
    }

    #[test]
    fn lost_events_are_detected() {
        assert!(!lost("entries: 3\noverrun: 0\ncommit overrun: 0\ndropped events: 0\nread events: 7\n"));
        assert!(lost("entries: 3\noverrun: 0\ndropped events: 12\n"));
        assert!(lost("overrun: 1\ndropped events: 0\n"));
    }
}
