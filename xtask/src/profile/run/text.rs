//! The profile of a run as text.

use super::Step;
use super::faults::{Exit, Fault, Kind, by_reason};
use super::measure::{Record, Run};
use super::memory::Use;
use crate::profile::text::milliseconds;
use kindling_vmm::Instant;
use std::fmt::Write;

/// The process or machine to whose time a step belongs.
fn lane(step: &str) -> &'static str {
    match step {
        "command entered" | "root filesystem found" | "process ended" => "front",
        "payload ended" => "payload",
        "payload started" | "guest ended" => "init",
        step if step.starts_with("init: ") => "init",
        _ => "monitor",
    }
}

/// The steps of a run, with the end of the process.
fn steps(run: &Run) -> Vec<Step> {
    let end = Step { name: "process ended".to_owned(), ns: run.ended };
    run.steps.iter().cloned().chain([end]).collect()
}

/// All tables.
pub(super) fn report(
    arguments: &crate::profile::Arguments,
    record: &Record,
    faults: &[Fault],
    exits: &[Exit],
) -> String {
    let plural = if arguments.vcpus == 1 { "" } else { "s" };
    let mut text = format!(
        "`kindling run` of busybox's true: {}, converted image, {} MiB, {} vCPU{plural}\n",
        if arguments.spare { "spare monitor" } else { "pre-booted kernel" },
        arguments.memory,
        arguments.vcpus
    );
    timeline(&mut text, record, faults, exits);
    by_use(&mut text, faults);
    let _ = writeln!(text, "\nexits of the guest by reason\n");
    for (reason, count) in by_reason(exits) {
        let _ = writeln!(text, "{count:9}  {reason}");
    }
    let _ = writeln!(
        text,
        "\ntimes are of a run without tracing, which ended after {:.3} ms; faults and exits of another one, which ended \
         after {:.3} ms",
        milliseconds(record.plain.ended),
        milliseconds(record.traced.ended)
    );
    text
}

/// The steps in order, with the faults and exits in each.
fn timeline(text: &mut String, record: &Record, faults: &[Fault], exits: &[Exit]) {
    let _ = writeln!(text, "\nsteps, milliseconds; faults and exits during each\n");
    let _ = writeln!(text, "      end       own  faults   exits  lane     step");
    let (mut before, mut traced_before) = (0, 0);
    let traced = steps(&record.traced);
    for (number, step) in steps(&record.plain).into_iter().enumerate() {
        // Both runs have the same steps.
        let until = traced.get(number).map_or(traced_before, |step| step.ns);
        let is_in = |at: Instant| (traced_before..until).contains(&at.since(Instant(record.traced.started)));
        let faults = faults.iter().filter(|fault| is_in(fault.at)).count();
        let exits = exits.iter().filter(|exit| is_in(exit.at)).count();
        let (end, own) = (milliseconds(step.ns), milliseconds(step.ns.saturating_sub(before)));
        let _ =
            writeln!(text, "{end:9.3} {own:9.3} {faults:7} {exits:7}  {:7}  {}", lane(&step.name), step.name);
        (before, traced_before) = (step.ns, until);
    }
}

/// The faults by what the guest has there, and by what the host does.
fn by_use(text: &mut String, faults: &[Fault]) {
    let _ = writeln!(text, "\npage faults on guest memory: {}\n", faults.len());
    let _ = write!(text, "{:22}", "");
    for kind in Kind::ALL {
        let _ = write!(text, " {:>13}", kind.title());
    }
    let _ = writeln!(text, "           all");
    let row = |text: &mut String, title: &str, chosen: &dyn Fn(&Fault) -> bool| {
        let count = |kind: Option<Kind>| {
            faults.iter().filter(|fault| chosen(fault) && kind.is_none_or(|kind| fault.kind == kind)).count()
        };
        if count(None) == 0 {
            return;
        }
        let _ = write!(text, "{title:22}");
        for kind in Kind::ALL {
            let _ = write!(text, " {:13}", count(Some(kind)));
        }
        let _ = writeln!(text, " {:13}", count(None));
    };
    for what in Use::ALL {
        row(text, what.title(), &|fault| fault.what == what);
    }
    row(text, "all", &|_| true);
    text.push_str(
        "\nmapped: a page of the saved memory that the guest reads; copied: one that it writes; copied before: one that was\n\
         copied when init started; page table: copied because the processor walks page tables in it; zero: a new page;\n\
         filled: a page that a device has written, such as the page cache of a disk\n",
    );
}
