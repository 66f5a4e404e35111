//! The profile as text: the phases in order, then the longest ones.

use super::record::{Lane, Phase, Profile};
use std::fmt::Write;

/// Maximum number of rows in the table of the longest phases.
const MAX_PHASES: usize = 30;
/// Maximum number of rows in the table of exits.
const MAX_EXITS: usize = 12;

/// A time in milliseconds.
#[expect(clippy::cast_precision_loss, reason = "for display; boots take less than 2^53 ns")]
pub(super) fn milliseconds(ns: u64) -> f64 {
    ns as f64 / 1e6
}

/// A signed time in milliseconds.
#[expect(clippy::cast_precision_loss, reason = "for display; boots take less than 2^53 ns")]
pub(super) fn signed_milliseconds(ns: i64) -> f64 {
    ns as f64 / 1e6
}

/// All tables.
pub(super) fn report(profile: &Profile) -> String {
    let mut text = heading(profile);
    in_order(&mut text, profile);
    longest(&mut text, profile);
    exits(&mut text, profile);
    let _ = writeln!(text, "\n{}", perturbation(profile));
    text
}

fn heading(profile: &Profile) -> String {
    let (guest, totals) = (&profile.guest, &profile.totals);
    let plural = if guest.vcpus == 1 { "" } else { "s" };
    format!(
        "\nmeasured in {}\nguest: Linux {}, {} MiB, {} vCPU{plural}\n\n\
         {:9.3} ms from the start of the process to init: {:.3} in the VMM, {:.3} in the kernel\n\
         {:9.3} ms from the start of the process to its end\n",
        profile.host.meaning,
        guest.kernel,
        guest.memory_mib,
        guest.vcpus,
        milliseconds(totals.init_reached),
        milliseconds(totals.vmm),
        milliseconds(totals.kernel),
        milliseconds(totals.process),
    )
}

/// The phases in order of time, without initcalls, which lie within some of them.
fn in_order(text: &mut String, profile: &Profile) {
    let _ = writeln!(text, "\nphases, milliseconds\n\n    start       own  lane    phase");
    let mut phases: Vec<&Phase> =
        profile.phases.iter().filter(|phase| phase.lane != Lane::Initcall).collect();
    phases.sort_by_key(|phase| phase.start);
    for phase in phases {
        let (start, own) = (milliseconds(phase.start), milliseconds(phase.duration));
        let row = format!("{start:9.3} {own:9.3}  {:6}  {}", phase.lane.title(), phase.name);
        let _ = writeln!(text, "{}", with_about(row, &phase.about));
    }
}

/// The longest phases, with initcalls instead of the phases that consist of them.
fn longest(text: &mut String, profile: &Profile) {
    let mut phases: Vec<&Phase> =
        profile.phases.iter().filter(|phase| !phase.name.starts_with("initcalls: ")).collect();
    phases.sort_by_key(|phase| std::cmp::Reverse(phase.duration));
    let whole = profile.totals.process.max(1);
    let _ = writeln!(
        text,
        "\nlongest phases, milliseconds and share of the total\n\n      own    part  lane      phase"
    );
    for phase in phases.into_iter().take(MAX_PHASES) {
        let own = milliseconds(phase.duration);
        let part = 100.0 * own / milliseconds(whole);
        let row = format!("{own:9.3}  {part:4.1} %  {:8}  {}", phase.lane.title(), phase.name);
        let _ = writeln!(text, "{}", with_about(row, &phase.about));
    }
}

/// Appends the description of a phase to a row, at a fixed column if possible.
fn with_about(row: String, about: &str) -> String {
    const COLUMN: usize = 62;
    if about.is_empty() { row } else { format!("{row:COLUMN$} {about}") }
}

fn exits(text: &mut String, profile: &Profile) {
    let total: u64 = profile.exits.iter().map(|exits| exits.before_init).sum();
    let _ = writeln!(text, "\n{total} exits to the VMM before init\n");
    let reached: Vec<_> = profile.exits.iter().filter(|exits| exits.before_init > 0).collect();
    for exits in reached.iter().take(MAX_EXITS) {
        let _ = writeln!(
            text,
            "{:7}  {:12} {:#12x}  {}",
            exits.before_init, exits.reason, exits.address, exits.device
        );
    }
    let rest: u64 = reached.iter().skip(MAX_EXITS).map(|exits| exits.before_init).sum();
    if rest > 0 {
        let _ = writeln!(text, "{rest:7}  others");
    }
}

/// The overhead of recording and its correction.
pub(super) fn perturbation(profile: &Profile) -> String {
    let p = &profile.perturbation;
    let mut text = format!(
        "recording: totals, VMM and init are from a boot without recording. The kernel's phases are from another boot,\n\
         which {} marks made {:.3} ms longer: {:.1} us per preceding mark were subtracted from each time (the VMM held\nthe \
         guest for {:.1} us per mark).",
        p.marks,
        signed_milliseconds(p.marked_longer),
        milliseconds(p.cost_of_mark) * 1e3,
        milliseconds(p.held_per_mark) * 1e3,
    );
    if !profile.without_mark.is_empty() {
        let _ = write!(
            text,
            "\nWithout a mark, because the compiler inlined them: {}.",
            profile.without_mark.join(", ")
        );
    }
    if let (Some(samples), Some(longer)) = (&profile.samples, p.sampled_longer) {
        let count: u64 = samples.stacks.iter().map(|(_, count)| count).sum();
        let _ = write!(
            text,
            "\n{count} samples every {} us are from a third boot, which they made {:.3} ms longer; each represents {:.1} us.",
            samples.interval_us,
            signed_milliseconds(longer),
            milliseconds(samples.ns_per_sample) * 1e3,
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::profile;
    use super::*;

    #[test]
    fn the_report_has_every_part() {
        let text = report(&profile());
        for expected in [
            "5.000 ms from the start of the process to init: 1.000 in the VMM, 4.000 in the kernel",
            "    0.000     1.000  VMM     kernel loaded",
            "    1.500  21.4 %  initcall  pty_init",
            "1 exits to the VMM before init",
            "      1  port write          0x3f8  serial port",
            "which 3 marks made 0.001 ms longer: 0.3 us per preceding mark were subtracted from each time",
            "3 samples every 25 us",
        ] {
            assert!(text.contains(expected), "{expected:?} is missing in {text}");
        }
        let longest = text.find("longest phases").unwrap();
        assert!(text[longest..].find("pty_init") < text[longest..].find("kernel loaded"));
    }
}
