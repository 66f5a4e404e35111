//! Combines the measurements into one timeline.
//!
//! The plain boot, without recording, is authoritative for the steps of VMM and init and for the duration of the
//! kernel's boot. The marks of the marked boot divide the kernel's time. Each mark made that boot longer by about the
//! same time. An equal share of the difference between the two boots is therefore subtracted from each time per
//! preceding mark, so that the phases add up to the plain boot.

use super::boots::{FIRST_INSTRUCTION, INIT, Mark, Measured, Records, Report};
use super::kernel_image::KernelImage;
use super::phases::{CALLS_INITCALLS, ENTRY, MarkTarget, about_step};
use super::record::{Exits, Lane, Perturbation, Phase, Totals};
use super::{devices, stacks};
use anyhow::{Result, ensure};
use std::collections::{BTreeMap, HashMap};

/// The outermost functions of every kernel stack, which are omitted.
const OUTERMOST: [&str; 5] = [
    "common_startup_64",
    "x86_64_start_kernel",
    "x86_64_start_reservations",
    "ret_from_fork_asm",
    "ret_from_fork",
];

/// The targets of marks, by the address of their function.
pub(super) type Functions = HashMap<u64, MarkTarget>;

/// The step at which a guest ends by itself, and the step after it.
const GUEST_ENDED: &str = "guest ended";
const PROCESS_ENDED: &str = "process ended";
/// The name of samples in user space.
const USER_SPACE: &str = "init (user space)";

/// The durations of the plain boot.
pub(super) fn totals(measured: &Measured) -> Result<Totals> {
    let plain = &measured.plain;
    Ok(Totals {
        vmm: plain.at(FIRST_INSTRUCTION)?,
        kernel: plain.kernel_time()?,
        init_reached: plain.at(INIT)?,
        process: measured.plain_time,
    })
}

/// The overhead of recording in the kernel's boot.
pub(super) fn perturbation(measured: &Measured) -> Result<Perturbation> {
    let (plain, marked) = (measured.plain.kernel_time()?, measured.marked.report.kernel_time()?);
    let longer = |time: u64| i64::try_from(time).unwrap_or(i64::MAX) - i64::try_from(plain).unwrap_or(0);
    let init = measured.marked.report.at(INIT)?;
    let held: Vec<u64> =
        measured.marked.marks.iter().filter(|mark| mark.0 <= init).map(|mark| mark.3).collect();
    let marks = held.len() as u64;
    ensure!(marks > 0, "the marked boot recorded no kernel function; this is a bug in xtask");
    let sampled = measured.sampled.as_ref().map(|records| records.report.kernel_time()).transpose()?;
    Ok(Perturbation {
        marked_longer: longer(marked),
        marks,
        cost_of_mark: marked.saturating_sub(plain) / marks,
        held_per_mark: held.iter().sum::<u64>() / marks,
        sampled_longer: sampled.map(longer),
    })
}

/// Converts times of the marked boot to times of the plain boot.
struct Clock<'a> {
    marks: &'a [Mark],
    cost: u64,
    /// The times of the first instructions of guest and init in each boot.
    marked: (u64, u64),
    plain: (u64, u64),
}

impl Clock<'_> {
    fn of(measured: &Measured, cost: u64) -> Result<Clock<'_>> {
        let ends =
            |report: &Report| Ok::<_, anyhow::Error>((report.at(FIRST_INSTRUCTION)?, report.at(INIT)?));
        Ok(Clock {
            marks: &measured.marked.marks,
            cost,
            marked: ends(&measured.marked.report)?,
            plain: ends(&measured.plain)?,
        })
    }

    fn plain(&self, time: u64) -> u64 {
        if time >= self.marked.1 {
            return self.plain.1 + (time - self.marked.1);
        }
        let before = self.marks.partition_point(|mark| mark.0 < time) as u64;
        let since = time.saturating_sub(self.marked.0).saturating_sub(before * self.cost);
        (self.plain.0 + since).min(self.plain.1)
    }
}

/// All phases of the boot.
pub(super) fn phases(measured: &Measured, functions: &Functions, cost: u64) -> Result<Vec<Phase>> {
    let mut phases = steps(measured)?;
    let clock = Clock::of(measured, cost)?;
    let mut latest = 0;
    let mut marks: Vec<(u64, &MarkTarget)> = Vec::new();
    for mark in &measured.marked.marks {
        // A mark close to the previous one may cost less than the average.
        latest = clock.plain(mark.0).max(latest);
        if let Some(begins) = functions.get(&mark.2).filter(|_| latest < clock.plain.1) {
            marks.push((latest, begins));
        }
    }
    phases.extend(kernel(&marks, clock.plain));
    phases.sort_by_key(|phase| (phase.lane, phase.start));
    Ok(phases)
}

/// The steps of VMM and init; each lasts from the end of the previous one.
fn steps(measured: &Measured) -> Result<Vec<Phase>> {
    let (first, init) = (measured.plain.at(FIRST_INSTRUCTION)?, measured.plain.at(INIT)?);
    let end = measured.plain.at(GUEST_ENDED)?;
    let mut phases = Vec::new();
    let mut start = 0;
    let process = [(PROCESS_ENDED, measured.plain_time)];
    let steps = measured.plain.steps.iter().map(|step| (&*step.name, step.ns)).chain(process);
    for (name, at) in steps {
        let lane = if at <= first || at > end { Lane::Vmm } else { Lane::Init };
        if at != init {
            phases.push(Phase {
                lane,
                name: name.to_owned(),
                about: about_step(name).to_owned(),
                start,
                duration: at.saturating_sub(start),
            });
        }
        start = at;
    }
    Ok(phases)
}

/// The kernel's phases and initcalls. A phase lasts until the next one begins. The first initcall of a level begins a
/// phase. An initcall lasts until the next mark of either kind.
fn kernel(marks: &[(u64, &MarkTarget)], (first, init): (u64, u64)) -> Vec<Phase> {
    let phase = |lane, name: &str, about: &str, start| Phase {
        lane,
        name: name.to_owned(),
        about: about.to_owned(),
        start,
        duration: 0,
    };
    let mut phases = vec![phase(Lane::Kernel, ENTRY.0, ENTRY.1, first)];
    let mut initcalls: Vec<Phase> = Vec::new();
    let (mut level, mut in_thread) = ("", false);
    for (number, (at, begins)) in marks.iter().enumerate() {
        match begins {
            MarkTarget::Phase(name, about) => {
                phases.push(phase(Lane::Kernel, name, about, *at));
                level = "";
                in_thread |= *name == CALLS_INITCALLS;
            }
            MarkTarget::Initcall(call) if !in_thread => {
                phases.push(phase(
                    Lane::Kernel,
                    &call.name,
                    "an initcall that is called earlier as well",
                    *at,
                ));
            }
            MarkTarget::Initcall(call) => {
                if level != call.level {
                    level = call.level;
                    phases.push(phase(
                        Lane::Kernel,
                        &format!("initcalls: {level}"),
                        "see the initcalls",
                        *at,
                    ));
                }
                let file = call.file.as_deref().map(|file| format!(", {file}.c")).unwrap_or_default();
                let about = format!("{level}{file}");
                let next = marks.get(number + 1).map_or(init, |(next, _)| *next);
                let duration = next.saturating_sub(*at);
                initcalls.push(Phase { duration, ..phase(Lane::Initcall, &call.name, &about, *at) });
            }
        }
    }
    let starts: Vec<u64> = phases.iter().skip(1).map(|phase| phase.start).chain([init]).collect();
    for (phase, next) in phases.iter_mut().zip(starts) {
        phase.duration = next.saturating_sub(phase.start);
    }
    phases.extend(initcalls);
    phases
}

/// The exits of the marked boot, the most frequent first. Its guest also sends the kernel log at the end; those exits
/// are omitted.
pub(super) fn exits(measured: &Measured, cost: u64) -> Result<Vec<Exits>> {
    let clock = Clock::of(measured, cost)?;
    let end = measured.plain.at(GUEST_ENDED)?;
    let mut groups: BTreeMap<(&str, u64), Vec<u64>> = BTreeMap::new();
    for (at, reason, address) in &measured.marked.exits {
        let at = clock.plain(*at);
        if at <= end {
            groups.entry((reason, *address)).or_default().push(at);
        }
    }
    let exits = |((reason, address), at): ((&str, u64), Vec<u64>)| Exits {
        reason: reason.to_owned(),
        address,
        device: devices::name(reason, address).to_owned(),
        before_init: at.iter().filter(|at| **at < clock.plain.1).count() as u64,
        at,
    };
    let mut exits: Vec<Exits> = groups.into_iter().map(exits).collect();
    exits.sort_by_key(|exits| std::cmp::Reverse(exits.before_init));
    Ok(exits)
}

/// The stacks of all samples (phase, then functions), with their counts.
pub(super) fn stacks(
    records: &Records,
    kernel: &KernelImage,
    functions: &Functions,
) -> Result<Vec<(Vec<String>, u64)>> {
    let mut counts: BTreeMap<Vec<String>, u64> = BTreeMap::new();
    let (first, init) = (records.report.at(FIRST_INSTRUCTION)?, records.report.at(INIT)?);
    let marks: Vec<(u64, &MarkTarget)> =
        records.marks.iter().filter_map(|mark| Some((mark.0, functions.get(&mark.2)?))).collect();
    let phases = self::kernel(&marks, (first, init));
    let phases: Vec<&Phase> = phases.iter().filter(|phase| phase.lane == Lane::Kernel).collect();
    for (at, _, instruction, words) in &records.samples {
        let phase = if *at >= init {
            Lane::Init.title()
        } else {
            let behind = phases.partition_point(|phase| phase.start <= *at);
            behind.checked_sub(1).map_or(ENTRY.0, |index| &phases[index].name)
        };
        let mut stack = vec![phase.to_owned()];
        let callers = stacks::callers(kernel, words).into_iter().skip_while(|name| OUTERMOST.contains(name));
        stack.extend(callers.map(str::to_owned));
        stack.push(innermost(kernel, *instruction, *at >= init));
        *counts.entry(stack).or_default() += 1;
    }
    Ok(counts.into_iter().collect())
}

/// The name of the function of a sample's instruction.
fn innermost(kernel: &KernelImage, instruction: u64, init_runs: bool) -> String {
    const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
    // The kernel starts at physical addresses, before it maps itself.
    let address = if instruction < KERNEL_MAP && !init_runs { instruction | KERNEL_MAP } else { instruction };
    match kernel.symbols.function(address) {
        Some(name) => name.to_owned(),
        None if init_runs => USER_SPACE.to_owned(),
        None => "no symbol".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::boots::Step;
    use super::super::kernel_image::{Initcall, tests as image};
    use super::*;

    fn report(steps: &[(&str, u64)]) -> Report {
        let steps = steps.iter().map(|(name, ns)| Step { name: (*name).to_owned(), ns: *ns }).collect();
        Report { steps }
    }

    /// Functions 1 and 3 begin phases, 2 is an initcall. The plain boot's kernel takes 1000, the
    /// marked boot's 1300 with three marks: 100 for each.
    fn measured() -> (Measured, Functions) {
        let plain = report(&[
            ("kernel loaded", 60),
            (FIRST_INSTRUCTION, 100),
            (INIT, 1100),
            ("init: configuration read", 1150),
            (GUEST_ENDED, 1200),
            ("vCPUs stopped", 1230),
        ]);
        let marked = Records {
            report: report(&[(FIRST_INSTRUCTION, 200), (INIT, 1500), (GUEST_ENDED, 1700)]),
            marks: vec![(300, 0, 1, 40), (600, 0, 2, 40), (1200, 0, 3, 40)],
            exits: vec![
                (250, "port write".into(), 0x3f8),
                (1100, "port write".into(), 0x3f8),
                (1600, "port read".into(), 0x558),
                (1601, "port write".into(), 0x554),
            ],
            samples: Vec::new(),
        };
        let initcall =
            Initcall { address: 2, name: "pty_init".into(), level: "device", file: Some("pty".into()) };
        let functions = HashMap::from([
            (1, MarkTarget::Phase("kernel_init_freeable", "")),
            (2, MarkTarget::Initcall(initcall)),
            (3, MarkTarget::Phase("free_initmem", "")),
        ]);
        (Measured { plain, plain_time: 1260, marked, sampled: None }, functions)
    }

    #[test]
    fn phases_add_up_to_the_plain_boot() {
        let (measured, functions) = measured();
        let perturbation = perturbation(&measured).unwrap();
        assert_eq!(
            (perturbation.marked_longer, perturbation.marks, perturbation.cost_of_mark),
            (300, 3, 100)
        );
        let phases = phases(&measured, &functions, perturbation.cost_of_mark).unwrap();
        let short: Vec<_> = phases.iter().map(|p| (p.lane, &*p.name, p.start, p.duration)).collect();
        let expected = [
            (Lane::Vmm, "kernel loaded", 0, 60),
            (Lane::Vmm, FIRST_INSTRUCTION, 60, 40),
            (Lane::Vmm, "vCPUs stopped", 1200, 30),
            (Lane::Vmm, PROCESS_ENDED, 1230, 30),
            (Lane::Kernel, "entry", 100, 100),
            (Lane::Kernel, "kernel_init_freeable", 200, 200),
            (Lane::Kernel, "initcalls: device", 400, 500),
            (Lane::Kernel, "free_initmem", 900, 200),
            (Lane::Initcall, "pty_init", 400, 500),
            (Lane::Init, "init: configuration read", 1100, 50),
            (Lane::Init, GUEST_ENDED, 1150, 50),
        ];
        assert_eq!(short, expected);
        assert_eq!(phases.iter().find(|p| p.name == "pty_init").unwrap().about, "device, pty.c");
    }

    #[test]
    fn exits_are_counted_up_to_init() {
        let (measured, _) = measured();
        let exits = exits(&measured, 100).unwrap();
        let short: Vec<_> = exits.iter().map(|e| (e.address, &*e.device, e.before_init, &e.at[..])).collect();
        let expected: [(u64, &str, u64, &[u64]); 2] =
            [(0x3f8, "serial port", 2, &[150, 800]), (0x558, "configuration", 0, &[1200])];
        assert_eq!(short, expected);
    }

    #[test]
    fn a_faster_marked_boot_does_not_change_times() {
        let (mut measured, functions) = measured();
        measured.marked.report = report(&[(FIRST_INSTRUCTION, 200), (INIT, 1190)]);
        let perturbation = perturbation(&measured).unwrap();
        assert_eq!((perturbation.marked_longer, perturbation.cost_of_mark), (-10, 0));
        let phases = phases(&measured, &functions, 0).unwrap();
        let kernel: u64 = phases.iter().filter(|p| p.lane == Lane::Kernel).map(|p| p.duration).sum();
        assert_eq!(kernel, 1000);
    }

    #[test]
    fn samples_are_grouped_by_phase_and_function() {
        let kernel = image::kernel(&[0x90; 64], &[("startup_64", 0), ("memset", 32)], "");
        let (measured, functions) = measured();
        let physical = image::TEXT & 0x7fff_ffff;
        let samples = vec![
            (210, 0, physical, vec![]),
            (310, 0, image::TEXT + 40, vec![]),
            (320, 0, image::TEXT + 41, vec![]),
            (1600, 0, 0x20_0000, vec![]),
        ];
        let records = Records { samples, ..measured.marked };
        let stacks = stacks(&records, &kernel, &functions).unwrap();
        let short: Vec<(String, u64)> = stacks.into_iter().map(|(stack, n)| (stack.join(" > "), n)).collect();
        let expected = [
            ("entry > startup_64", 1),
            ("init > init (user space)", 1),
            ("kernel_init_freeable > memset", 2),
        ];
        assert_eq!(short, expected.map(|(stack, count)| (stack.to_owned(), count)));
    }
}
