//! Reports of a boot: its times, its profile, and the cause of a failure.

use crate::text;
use kindling::vmm::{Exit, ExitReason, Instant};
use serde::Serialize;
use std::fmt::Write;

#[expect(clippy::cast_precision_loss, reason = "for display; boots take less than 2^53 ns")]
fn milliseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e6
}

/// The times of the steps, and the numbers of exits to the VMM, as text.
pub(crate) fn timeline(exit: &Exit) -> String {
    let mut text = String::from("\nboot report (milliseconds since the command was started)\n\n");
    let mut previous = exit.timeline.start();
    for step in exit.timeline.steps() {
        let total = milliseconds(step.at.since(exit.timeline.start()));
        let own = milliseconds(step.at.since(previous));
        let _ = writeln!(text, "{total:11.3}  {own:+10.3}  {}", printable(&step.name));
        previous = step.at;
    }
    let exits = &exit.exits;
    let _ = writeln!(
        text,
        "\n{} exits to the VMM: {} port writes, {} port reads, {} to registers in memory, {} other; \
         {} of the port accesses were to ports without a device",
        exits.total(),
        exits.port_writes,
        exits.port_reads,
        exits.mmio_reads + exits.mmio_writes,
        exits.other,
        exit.unclaimed_ports,
    );
    text
}

/// A line for each device that failed: it stopped, or its backend ended.
pub(crate) fn device_failures(exit: &Exit) -> String {
    exit.device_failures.iter().map(|failure| device_failure(failure)).collect()
}

/// A line about a device that failed.
pub(crate) fn device_failure(failure: &str) -> String {
    format!("kindling: {}\n", printable(failure))
}

#[derive(Serialize)]
struct Json<'a> {
    status: u8,
    reason: String,
    /// Nanoseconds of CLOCK_MONOTONIC from which the steps count.
    start_ns: u64,
    steps: Vec<JsonStep<'a>>,
    exits: JsonExits,
}

#[derive(Serialize)]
struct JsonStep<'a> {
    name: &'a str,
    ns: u64,
}

#[derive(Serialize)]
struct JsonExits {
    total: u64,
    port_writes: u64,
    port_reads: u64,
    mmio_writes: u64,
    mmio_reads: u64,
    other: u64,
    unclaimed_ports: u64,
}

impl<'a> Json<'a> {
    fn of(exit: &'a Exit) -> Self {
        let exits = &exit.exits;
        let ns = |at: Instant| at.since(exit.timeline.start());
        Self {
            status: exit.reason.status(),
            reason: exit.reason.to_string(),
            start_ns: exit.timeline.start().0,
            steps: exit
                .timeline
                .steps()
                .iter()
                .map(|step| JsonStep { name: &step.name, ns: ns(step.at) })
                .collect(),
            exits: JsonExits {
                total: exits.total(),
                port_writes: exits.port_writes,
                port_reads: exits.port_reads,
                mmio_writes: exits.mmio_writes,
                mmio_reads: exits.mmio_reads,
                other: exits.other,
                unclaimed_ports: exit.unclaimed_ports,
            },
        }
    }
}

/// The report as JSON.
pub(crate) fn json(exit: &Exit) -> String {
    text::json(&Json::of(exit))
}

/// The report and the records of a profiled boot, as JSON.
pub(crate) fn profile(exit: &Exit) -> String {
    #[derive(Serialize)]
    struct ProfileJson<'a> {
        report: Json<'a>,
        /// Time in nanoseconds since the start, vCPU, instruction pointer, possible return addresses.
        samples: Vec<(u64, u8, u64, &'a [u64])>,
        /// Time as above, what the guest did, port or address.
        exits: Vec<(u64, &'static str, u64)>,
        /// Time as above, vCPU, function, nanoseconds for which the VMM held the guest.
        marks: Vec<(u64, u8, u64, u64)>,
        kernel_log: String,
    }
    let ns = |at: Instant| at.since(exit.timeline.start());
    let recorded = exit.profile.as_ref();
    let profile = ProfileJson {
        report: Json::of(exit),
        samples: recorded
            .iter()
            .flat_map(|profile| &profile.samples)
            .map(|sample| (ns(sample.at), sample.vcpu, sample.instruction, sample.stack.as_slice()))
            .collect(),
        exits: recorded
            .iter()
            .flat_map(|profile| &profile.exits)
            .map(|exit| (ns(exit.at), exit.kind.name(), exit.address))
            .collect(),
        marks: recorded
            .iter()
            .flat_map(|profile| &profile.marks)
            .map(|mark| (ns(mark.at), mark.vcpu, mark.function, mark.held))
            .collect(),
        kernel_log: recorded
            .map(|profile| String::from_utf8_lossy(&profile.kernel_log).into_owned())
            .unwrap_or_default(),
    };
    serde_json::to_string(&profile).unwrap_or_default() + "\n"
}

/// The report of a failed guest: reason, last stage, registers, end of the console, and advice.
pub(crate) fn failure(exit: &Exit) -> String {
    let mut text = format!("\nkindling: {}\n", printable(&exit.reason.to_string()));
    let _ = writeln!(text, "  last stage reached: {}", printable(last_stage(exit)));
    if let Some(registers) = &exit.registers {
        let r = &registers.general;
        let [cr0, cr2, cr3, cr4] = registers.control;
        let _ = writeln!(
            text,
            "  rip {:#018x}  rsp {:#018x}  rflags {:#010x}\n  \
             rax {:#018x}  rbx {:#018x}  rcx {:#018x}  rdx {:#018x}\n  \
             rsi {:#018x}  rdi {:#018x}  rbp {:#018x}  r8  {:#018x}\n  \
             cr0 {cr0:#010x}  cr2 {cr2:#018x}  cr3 {cr3:#010x}  cr4 {cr4:#010x}  efer {:#06x}",
            r.rip, r.rsp, r.rflags, r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.r8, registers.efer,
        );
    }
    if exit.reason == ExitReason::TripleFault && exit.registers.is_none() {
        text.push_str("  no registers: KVM on AMD processors resets them before it reports a triple fault\n");
    }
    if exit.console_tail.is_empty() {
        text.push_str("  the console is empty\n");
    } else {
        text.push_str("  last lines of the console:\n");
        for line in &exit.console_tail {
            let _ = writeln!(text, "  | {}", printable(line));
        }
    }
    let _ = writeln!(text, "  {}", advice(&exit.reason));
    text
}

/// Encodes as JSON, without characters that could control the user's terminal (see [`printable`]). JSON itself leaves DEL
/// and control characters beyond ASCII unescaped.
pub(crate) fn printable_json(value: &impl Serialize) -> String {
    let text = text::json(value);
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        // JSON has escaped the other ones. The line ends of its layout stay.
        if !c.is_ascii() && is_control(c) || c == '\u{7f}' {
            let _ = write!(escaped, "\\u{:04x}", u32::from(c));
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// Replaces characters of a guest's text that could control the user's terminal or reorder other text.
pub(crate) fn printable(line: &str) -> String {
    line.chars().map(|c| if is_control(c) && c != '\t' { '.' } else { c }).collect()
}

/// Whether a terminal interprets a character instead of showing it: a control character, or one that sets the direction of
/// writing (Unicode Standard Annex 9, table "Explicit directional formatting characters").
fn is_control(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn last_stage(exit: &Exit) -> &str {
    let ends = ["guest ended", "vCPUs stopped", "machine released"];
    let mut steps = exit.timeline.steps().iter().rev();
    steps.find(|step| !ends.contains(&&*step.name)).map_or("none", |step| &step.name)
}

const fn advice(reason: &ExitReason) -> &'static str {
    match reason {
        ExitReason::InitPanic => "init's message above says what it could not do",
        ExitReason::GuestPanic => {
            "a panic before init's first instruction is mostly a missing driver or root filesystem: \
             boot with --cmdline and without `quiet` to see more"
        }
        ExitReason::Reset => {
            "a payload that reboots ends like this, and so does a kernel that panics without a console: \
             boot with `console=ttyS0` and without `quiet` to see more"
        }
        ExitReason::TripleFault => {
            "before the kernel's first message this is mostly a kernel for another machine, or too little \
             memory: try more with --memory, and --cmdline with `earlyprintk=serial`"
        }
        ExitReason::KvmInternalError { .. } => {
            "`kindling doctor` shows whether this host's KVM can run Linux at all"
        }
        ExitReason::MemoryLost { .. } => {
            "files that guests have as memory are replaced by renaming, not rewritten"
        }
        _ => "please report this with the lines above",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_escapes_control_characters() {
        let words = ["a\u{1b}[2J", "\u{9b}2J\u{7f}", "ü", "a\u{202e}b"];
        let text = printable_json(&words);
        assert_eq!(text.chars().find(|&c| is_control(c) && c != '\n'), None);
        assert_eq!(serde_json::from_str::<[String; 4]>(&text).unwrap(), words);
    }

    #[test]
    fn control_characters_of_lines_are_replaced() {
        assert_eq!(printable("a\u{1b}[2J\tü\u{9b}"), "a.[2J\tü.");
        // Shown by a terminal, "exe.txt" would look like "txt.exe".
        assert_eq!(printable("\u{202e}exe\u{2066}\u{200f}"), ".exe..");
    }
}
