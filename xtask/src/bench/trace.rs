//! What KVM says of a guest: its tracepoints, read through tracefs in an instance of its own.
//!
//! They are the same for every monitor. Recording them costs the guest time, so runs that are
//! traced give counts, and only those times in which no guest runs.

use super::process::Run;
use anyhow::{Context, Result, bail};
use kindling_vmm::Instant;
use std::fs;
use std::path::{Path, PathBuf};

/// Where tracefs is mounted.
const TRACEFS: &str = "/sys/kernel/tracing";
/// KiB of each processor's buffer: a boot takes less than a tenth.
const BUFFER_KIB: u32 = 16 * 1024;

/// What is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    /// A processor goes into the guest.
    Entry,
    /// KVM returns to the monitor.
    UserExit,
    /// An access to guest memory that is not mapped, or not yet.
    PageFault,
}

impl Event {
    const ALL: [(Self, &'static str); 3] = [
        (Self::Entry, "kvm_entry"),
        (Self::UserExit, "kvm_userspace_exit"),
        (Self::PageFault, "kvm_page_fault"),
    ];
}

/// What a traced run gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Traced {
    /// Exits to the monitor until the text was seen.
    pub(super) user_exits: u64,
    /// Faults on guest memory until then.
    pub(super) page_faults: u64,
    /// Time before the first entry and after the last exit.
    pub(super) vmm_only: u64,
}

impl Traced {
    /// The events that it takes.
    pub(super) const EVENTS: [&str; 3] = [Event::ALL[0].1, Event::ALL[1].1, Event::ALL[2].1];

    /// What a trace says of a boot.
    ///
    /// # Errors
    /// When the guest never ran.
    pub(super) fn of(trace: &str, run: &Run) -> Result<Self> {
        evaluate(trace, run.spawned, run.seen, run.ended).context("KVM recorded no entry of the guest")
    }
}

/// The number of faults on guest memory in a trace.
pub(super) fn page_faults(trace: &str) -> u64 {
    trace.lines().filter_map(event).map(|(event, _)| u64::from(event == Event::PageFault)).sum()
}

/// A place where the kernel records the events of this process's children.
#[derive(Debug)]
pub(super) struct Tracer {
    instance: PathBuf,
}

impl Tracer {
    /// Makes the place.
    ///
    /// # Errors
    /// Where the kernel cannot record or this user may not.
    pub(super) fn new() -> Result<Self> {
        let events = Path::new(TRACEFS).join("events/kvm");
        if !events.exists() {
            bail!("{} is not there for this user", events.display());
        }
        let name = format!("kindling-bench-{}", std::process::id());
        let tracer = Self { instance: Path::new(TRACEFS).join("instances").join(name) };
        fs::create_dir(&tracer.instance)
            .with_context(|| format!("cannot make {}", tracer.instance.display()))?;
        tracer.set("buffer_size_kb", &BUFFER_KIB.to_string())?;
        // The clock of all other times.
        tracer.set("trace_clock", "mono")?;
        // What does not fit is lost and counted, so that the first entry stays.
        tracer.set("options/overwrite", "0")?;
        tracer.set("options/event-fork", "1")?;
        tracer.set("set_event_pid", &std::process::id().to_string())?;
        Ok(tracer)
    }

    /// Forgets what was recorded, and begins to record these of KVM's events.
    pub(super) fn start(&self, events: &[&str]) -> Result<()> {
        self.set("trace", "")?;
        events.iter().try_for_each(|name| self.set(&format!("events/kvm/{name}/enable"), "1"))
    }

    /// Stops, and gives what was recorded, a line for each event.
    pub(super) fn finish(&self) -> Result<String> {
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

/// Whether a processor's statistics say that events are missing.
fn lost(stats: &str) -> bool {
    let is_loss = |line: &str| line.starts_with("overrun:") || line.starts_with("dropped events:");
    stats.lines().any(|line| is_loss(line) && !line.ends_with(": 0"))
}

/// The event of a line and its time, if it is one of ours.
fn event(line: &str) -> Option<(Event, Instant)> {
    let (name, at, _) = split(line)?;
    let (event, _) = Event::ALL.into_iter().find(|(_, known)| *known == name)?;
    Some((event, at))
}

/// An event's name, its time and what else its line says:
/// `     CPU 0/KVM-171     [000] d..1.     3.641028: kvm_entry: vcpu 0, rip 0x...`.
pub(super) fn split(line: &str) -> Option<(&str, Instant, &str)> {
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
    // What came before was a run that failed, and was made again.
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
    fn events_count_until_the_text_was_seen() {
        let traced = evaluate(TRACE, Instant(3_000_000_000), Instant(3_000_250_000), Instant(3_000_900_000));
        assert_eq!(traced, Some(Traced { user_exits: 1, page_faults: 2, vmm_only: 100_000 + 600_000 }));
    }

    #[test]
    fn faults_count_wherever_they_are() {
        assert_eq!(page_faults(TRACE), 2);
    }

    #[test]
    fn events_of_a_run_that_failed_before_do_not_count() {
        let before = TRACE.replace("     3.000", "     2.000");
        let both = before + TRACE;
        let traced =
            |trace| evaluate(trace, Instant(3_000_000_000), Instant(3_000_250_000), Instant(3_000_900_000));
        assert_eq!(traced(&both), traced(TRACE));
    }

    #[test]
    fn a_trace_without_a_guest_gives_nothing() {
        assert_eq!(evaluate("# tracer: nop\n", Instant(0), Instant(1), Instant(2)), None);
    }

    #[test]
    fn lost_events_are_noticed() {
        assert!(!lost("entries: 3\noverrun: 0\ncommit overrun: 0\ndropped events: 0\nread events: 7\n"));
        assert!(lost("entries: 3\noverrun: 0\ndropped events: 12\n"));
        assert!(lost("overrun: 1\ndropped events: 0\n"));
    }
}
