//! `kindling doctor`: checks whether the host can run microVMs.

use crate::command_line::{Command, flag};
use crate::text::{WIDTH, wrapped};
use kindling::vmm::Instant;
use kindling::vmm::host::{Finding, Report, Sources, Status};
use kindling::vmm::probe::probe;
use std::io::IsTerminal;

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    json: bool,
}

pub(crate) const COMMAND: Command<Arguments> =
    Command::new("doctor", "Check whether this host can run microVMs, and what would improve it", run)
        .options(&[flag("", "json", |all| all.json = true, "Print JSON instead of text")])
        .notes(
            "Exit status: 0 if KVM runs guests at full speed by hardware virtualization, 1 if not, 2 for an invalid \
             argument. Tests KVM by running guest code, which takes up to a second if KVM is slow. Changes nothing on \
             the host. \"Reported\" times were measured by others on other hosts.",
        );

/// Exit status if guests run at full speed.
const STATUS_GOOD: u8 = 0;
/// Exit status if guests do not run at full speed, or not at all.
const STATUS_NOT_GOOD: u8 = 1;

/// Prints the findings. Returns the exit status.
fn run(arguments: &Arguments, _: Instant) -> u8 {
    let probe = probe();
    let report = Report::new(&Sources::host(), &probe);
    restore_sigpipe();
    let text = if arguments.json {
        // Structures of strings always serialize.
        crate::text::json(&report)
    } else {
        screen(&report, Style::of_stdout())
    };
    match crate::print(text.as_bytes()) {
        0 if probe.is_good() => STATUS_GOOD,
        0 => STATUS_NOT_GOOD,
        failure => failure,
    }
}

/// Restores the default action of SIGPIPE, so that a closed pipe ends this process as it does other commands
/// (`kindling doctor | head`). Rust's runtime ignores the signal.
#[expect(unsafe_code, reason = "there is no safe interface to a signal's default action")]
fn restore_sigpipe() {
    // SAFETY: the default action runs no code of this process, and nothing here relies on the
    // signal being ignored: only printing is left to do.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Layout of the text.
#[derive(Clone, Copy)]
struct Style {
    width: usize,
    colour: bool,
}

impl Style {
    const MIN_WIDTH: usize = 60;

    fn of_stdout() -> Self {
        let stdout = std::io::stdout();
        if !stdout.is_terminal() {
            return Self { width: WIDTH, colour: false };
        }
        let columns = rustix::termios::tcgetwinsize(&stdout).map_or(0, |size| usize::from(size.ws_col));
        // A terminal of unknown size reports 0.
        let width = if columns == 0 { WIDTH } else { columns.clamp(Self::MIN_WIDTH, WIDTH) };
        Self { width, colour: std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) }
    }
}

/// The columns at which name and fact of a finding start.
const NAME_COLUMN: usize = 12;
const FACT_COLUMN: usize = NAME_COLUMN + 17;

/// The report as text.
fn screen(report: &Report, style: Style) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        text += &paragraph(finding, style);
        text.push('\n');
    }
    text + &wrapped(&report.verdict, 0, style.width) + "\n"
}

fn paragraph(finding: &Finding, style: Style) -> String {
    let word = finding.status.word();
    let mut text = if style.colour { coloured(finding.status) } else { word.to_owned() };
    text += &format!("{:1$}", "", NAME_COLUMN - word.len());
    text += &format!("{:1$}", finding.name, FACT_COLUMN - NAME_COLUMN);
    text += wrapped(&finding.fact, FACT_COLUMN, style.width).trim_start();
    text.push('\n');
    text += &wrapped(&finding.meaning, NAME_COLUMN, style.width);
    text.push('\n');
    if let Some(advice) = &finding.advice {
        text += &wrapped(&format!("do: {advice}"), NAME_COLUMN, style.width);
        text.push('\n');
    }
    text
}

fn coloured(status: Status) -> String {
    let code = match status {
        Status::Good => 32,
        Status::Improvable => 33,
        Status::Bad => 31,
        Status::Unknown => 36,
    };
    format!("\x1b[{code}m{}\x1b[0m", status.word())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::words;

    const PLAIN: Style = Style { width: 60, colour: false };

    fn report() -> Report {
        let good = Finding {
            name: "memory",
            status: Status::Good,
            fact: "2 GiB".into(),
            meaning: "Guests have room.".into(),
            advice: None,
        };
        let bad = Finding {
            name: "kvm",
            status: Status::Bad,
            fact: "software KVM: an instruction was not executed".into(),
            meaning: "Linux guests do not run on it: it does not emulate all instructions.".into(),
            advice: Some(
                "`sudo modprobe -r kvm_pvm && sudo modprobe kvm_intel`, and if that is refused, `reboot`"
                    .into(),
            ),
        };
        Report { verdict: "guests do not run on this host".into(), findings: vec![bad, good] }
    }

    #[test]
    fn the_screen_is_aligned_and_keeps_commands_whole() {
        let expected = "\
bad         kvm              software KVM: an instruction
                             was not executed
            Linux guests do not run on it: it does not
            emulate all instructions.
            do:
            `sudo modprobe -r kvm_pvm && sudo modprobe kvm_intel`,
            and if that is refused, `reboot`

good        memory           2 GiB
            Guests have room.

guests do not run on this host
";
        assert_eq!(screen(&report(), PLAIN), expected);
    }

    #[test]
    fn colour_changes_nothing_but_the_colour_of_a_word() {
        let coloured = screen(&report(), Style { colour: true, ..PLAIN });
        assert!(coloured.starts_with("\x1b[31mbad\x1b[0m         kvm"), "{coloured:?}");
        let plain = coloured.replace("\x1b[31m", "").replace("\x1b[32m", "").replace("\x1b[0m", "");
        assert_eq!(plain, screen(&report(), PLAIN));
    }

    #[test]
    fn no_line_is_longer_than_the_width_unless_it_is_one_word() {
        for width in 30..100 {
            for line in screen(&report(), Style { width, colour: false }).lines() {
                let fits = line.chars().count() <= width;
                let single = words(line.trim_start_matches("do: ").trim()).count() == 1;
                let starts = line.starts_with("bad") && words(line).count() == 3;
                assert!(fits || single || starts, "{width}: {line:?}");
            }
        }
    }

    #[test]
    fn a_finding_starts_in_its_column_whatever_the_status() {
        for status in [Status::Good, Status::Improvable, Status::Bad, Status::Unknown] {
            for name in ["kvm", "user_namespaces"] {
                let finding = Finding { name, status, ..report().findings.remove(0) };
                let text = paragraph(&finding, PLAIN);
                assert_eq!(text.find(name), Some(NAME_COLUMN));
                assert_eq!(text.find("software"), Some(FACT_COLUMN));
            }
        }
    }

    #[test]
    fn the_json_has_the_promised_shape() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["verdict"], "guests do not run on this host");
        assert_eq!(json["findings"][0]["status"], "bad");
        assert_eq!(json["findings"][1]["advice"], serde_json::Value::Null);
        assert_eq!(json.as_object().unwrap().len(), 2);
    }
}
