//! The measurements of scenario `io`: operations on devices.

use super::measure::Bench;
use super::metric::{Metric, Part};
use super::trace::{self, Tracer};
use super::vmms::{Devices, Kind, Task};
use anyhow::{Context, Result};
use io_payload::{DISK_BYTES, MARK_PORT, Operation};
use kindling_vmm::Instant;
use std::fs;
use std::path::Path;

/// Repetitions of each operation. The exact lab is deterministic enough for a few.
const COUNT: u32 = 256;

/// KVM tracepoints that [`evaluate`] reads.
const EVENTS: [&str; 4] = ["kvm_entry", "kvm_exit", "kvm_userspace_exit", "kvm_pio"];

impl Bench<'_> {
    /// Compares guests with all devices with guests without devices, and measures the operations.
    pub(super) fn operations(&mut self, tracer: Option<&Tracer>, runs: u32) -> Result<()> {
        let others = self.entropy_and_balloon();
        let devices = self.all_devices()?;
        let _kernel = self.preboot()?;
        for run in 1..=runs {
            eprintln!("run {run} of {runs} ...");
            self.devices = Devices::default();
            let (boot, memory) = self.presence()?;
            self.devices = devices.clone();
            let (boot_with, memory_with) = self.presence()?;
            self.add(Metric::DevicesBoot, boot_with.saturating_sub(boot));
            self.add(Metric::DevicesMemory, memory_with.saturating_sub(memory));
            // Operations cost the same in a pre-booted guest.
            if self.vmm.kind == Kind::Prebooted {
                continue;
            }
            self.timed(tracer)?;
            if others.entropy || others.balloon {
                self.devices = others.clone();
                self.timed(tracer)?;
            }
        }
        Ok(())
    }

    /// The disk, and each other device with which the monitor boots. Each combination is booted once before it is
    /// measured, as a warm-up.
    fn all_devices(&mut self) -> Result<Devices> {
        self.boot(Task::Greet, None, |_| Ok(()))?;
        let disk = Devices { disk: Some(disk(self.scratch)?), ..Devices::default() };
        self.devices = disk.clone();
        self.boot(Task::Greet, None, |_| Ok(()))?;
        let tap = self.peers.tap.clone();
        let with_tap = tap.map(|tap| Devices { tap: Some(tap), ..self.devices.clone() });
        self.try_devices("a network card", with_tap);
        let vsock = self.peers.vsock.clone();
        let with_vsock = vsock.map(|vsock| Devices { vsock: Some(vsock), ..self.devices.clone() });
        self.try_devices("vsock", with_vsock);
        Ok(self.devices.clone())
    }

    /// The devices that are measured in a separate guest: its kernel uses them at any time, which would disturb the
    /// operations of other devices.
    fn entropy_and_balloon(&mut self) -> Devices {
        self.try_devices("entropy", Some(Devices { entropy: true, ..Devices::default() }));
        self.try_devices("a balloon", Some(Devices { balloon: true, ..self.devices.clone() }));
        std::mem::take(&mut self.devices)
    }

    /// Boots with more devices, and keeps them if that succeeds.
    fn try_devices(&mut self, what: &str, devices: Option<Devices>) {
        let Some(devices) = devices else { return };
        let before = std::mem::replace(&mut self.devices, devices);
        if let Err(error) = self.boot(Task::Greet, None, |_| Ok(())) {
            self.omitted.push(format!("{} with {what}: {error:#}", self.vmm.name));
            self.devices = before;
        }
    }

    /// The time until init's first output, and the monitor's private memory.
    fn presence(&self) -> Result<(u64, u64)> {
        let run = self.boot(Task::Greet, None, |_| Ok(()))?;
        Ok((run.seen.since(run.spawned), self.memory_usage()?.private))
    }

    /// Measures times in one guest and KVM's events in another.
    fn timed(&mut self, tracer: Option<&Tracer>) -> Result<()> {
        let task = Task::Operate { count: COUNT, reports: self.devices.balloon };
        let times = reported(&self.boot(task, None, |_| Ok(()))?.console)?;
        let traced = match tracer {
            Some(tracer) => {
                tracer.start(&EVENTS)?;
                let run = self.boot(task, None, |_| Ok(()))?;
                evaluate(&tracer.finish()?, run.spawned)
            }
            None => Vec::new(),
        };
        for (operation, nanoseconds) in times {
            let per_operation = |value: u64| value / u64::from(operation.repetitions(COUNT));
            let mut add = |part, value| self.add(Metric::Operation(operation, part), per_operation(value));
            add(Part::Whole, nanoseconds);
            if let Some((_, counts)) = traced.iter().find(|(of, _)| *of == operation) {
                add(Part::Host, nanoseconds.saturating_sub(counts.guest));
                add(Part::Exits, counts.exits * 1000);
                add(Part::UserExits, counts.user_exits * 1000);
            }
        }
        Ok(())
    }
}

/// Creates a disk image without holes.
fn disk(folder: &Path) -> Result<std::path::PathBuf> {
    let path = folder.join("disk");
    if !path.exists() {
        fs::write(&path, vec![0x5a; usize::try_from(DISK_BYTES)?]).context("cannot create a disk image")?;
    }
    Ok(path)
}

/// Parses the nanoseconds of all repetitions of each operation from the payload's output.
fn reported(console: &str) -> Result<Vec<(Operation, u64)>> {
    let line = |line: &str| {
        let (name, time) = line.trim().split_once(' ')?;
        Some((Operation::from_name(name)?, time.parse().ok()?))
    };
    let times: Vec<_> = console.lines().filter_map(line).collect();
    anyhow::ensure!(!times.is_empty(), "its payload reported no operation");
    Ok(times)
}

/// KVM events during the repetitions of one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    /// Nanoseconds in guest mode.
    guest: u64,
    exits: u64,
    user_exits: u64,
}

/// Counts the events between the payload's marks. Timestamps of a trace are in microseconds; the rounding averages out.
fn evaluate(trace: &str, spawned: Instant) -> Vec<(Operation, Counts)> {
    let mut all: Vec<(Operation, Counts)> = Vec::new();
    let mut is_open = false;
    // The last entry of each vCPU.
    let mut entered: Vec<(&str, Instant)> = Vec::new();
    // Earlier events belong to a failed run that was repeated.
    for (name, at, rest) in trace.lines().filter_map(trace::split).filter(|(_, at, _)| *at >= spawned) {
        if let Some(value) = written(name, rest) {
            let operation = Operation::from_number(value);
            is_open = operation.is_some();
            all.extend(operation.map(|operation| (operation, Counts::default())));
        }
        // Both lines begin with `vcpu 0`; in one of them a comma follows.
        let vcpu = rest.split([',', ' ']).nth(1).unwrap_or_default();
        let entry = entered.iter().position(|(of, _)| *of == vcpu);
        match name {
            "kvm_entry" if entry.is_none() => entered.push((vcpu, at)),
            _ => {}
        }
        let Some((_, counts)) = all.last_mut().filter(|_| is_open) else {
            if let ("kvm_exit", Some(entry)) = (name, entry) {
                entered.swap_remove(entry);
            }
            continue;
        };
        match (name, entry) {
            ("kvm_exit", Some(entry)) => {
                counts.guest += at.since(entered.swap_remove(entry).1);
                counts.exits += 1;
            }
            ("kvm_userspace_exit", _) => counts.user_exits += 1,
            _ => {}
        }
    }
    all
}

/// The byte that the guest wrote to the mark port: `pio_write at 0x80 size 1 count 1 val 0x3`.
fn written(name: &str, rest: &str) -> Option<u8> {
    let rest = rest.strip_prefix(&format!("pio_write at {MARK_PORT:#x} ")).filter(|_| name == "kvm_pio")?;
    let (_, value) = rest.rsplit_once("val 0x")?;
    u8::from_str_radix(value.split_whitespace().next()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
       CPU 0/KVM-171     [000] d..1.     2.000100: kvm_pio: pio_write at 0x80 size 1 count 1 val 0x1
          vcpu 0-172     [001] d..1.     3.000100: kvm_entry: vcpu 0, rip 0xfff0
          vcpu 0-172     [001] d..1.     3.000150: kvm_exit: vcpu 0 reason ioio rip 0x1
          vcpu 0-172     [001] .....     3.000160: kvm_pio: pio_write at 0x80 size 1 count 1 val 0x1
          vcpu 0-172     [001] .....     3.000165: kvm_userspace_exit: reason KVM_EXIT_IO (2)
          vcpu 0-172     [001] d..1.     3.000170: kvm_entry: vcpu 0, rip 0xfff2
          vcpu 0-172     [001] d..1.     3.000180: kvm_exit: vcpu 0 reason npf rip 0x1
          vcpu 0-172     [001] d..1.     3.000190: kvm_entry: vcpu 0, rip 0xfff2
          vcpu 0-172     [001] d..1.     3.000195: kvm_exit: vcpu 0 reason ioio rip 0x1
          vcpu 0-172     [001] .....     3.000196: kvm_pio: pio_write at 0x80 size 1 count 1 val 0xff
          vcpu 0-172     [001] d..1.     3.000200: kvm_entry: vcpu 0, rip 0xfff2
          vcpu 0-172     [001] d..1.     3.000300: kvm_exit: vcpu 0 reason ioio rip 0x1
";

    #[test]
    fn only_events_between_the_marks_are_counted() {
        let counts = Counts { guest: 15_000, exits: 2, user_exits: 1 };
        let expected = [(Operation::BlockRead4kDepth32, counts)];
        assert_eq!(evaluate(TRACE, Instant(3_000_000_000)), expected);
    }

    #[test]
    fn results_of_the_payload_are_parsed_by_name() {
        let console = format!("noise 1\r\nblock_read_4k 1000\r\n{}\r\n", io_payload::END);
        assert_eq!(reported(&console).unwrap(), [(Operation::BlockRead4k, 1000)]);
        assert!(reported("").is_err());
    }
}
