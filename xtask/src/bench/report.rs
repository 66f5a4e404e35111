//! The report of a bench: tables and JSON.

use super::metric::Metric;
use super::plan::{Case, Failure, Scenario};
use super::statistics::Row;
use serde::Serialize;
use std::fmt::Write;

/// The report.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    /// The workload of the guests.
    #[serde(skip)]
    pub(super) scenario: Scenario,
    /// The host of the measurements.
    pub(super) host: HostDescription,
    /// The measured values.
    pub(super) rows: Vec<Row>,
    /// Monitors without rows because they failed. Omitted from JSON when empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) failures: Vec<Failure>,
}

/// The host of the measurements.
#[derive(Clone, Debug, Serialize)]
pub(super) struct HostDescription {
    /// `exact-lab` or `hardware`.
    pub(super) kind: &'static str,
    /// The meaning of times on this host.
    pub(super) meaning: &'static str,
    /// The processor model and kernel release of the monitors' host.
    pub(super) machine: String,
    /// Notes on individual values, including those that are missing.
    pub(super) notes: Vec<String>,
}

/// Width of a column, and of the ratio in it.
const COLUMN: usize = 17;
const RATIO: usize = 7;
const VALUE: usize = COLUMN - RATIO;
/// Minimal width of the column with the monitors' names.
const NAME: usize = 14;

/// The legend of scenario `boot`. Columns come from different runs, so that with several vCPUs init may appear later
/// than the payload.
const BOOT_LEGEND: &str = "\
All times are from the spawn of the monitor's process; the ratio is to the first row of the same table.
Below each median: the smallest and largest value. One warm-up boot is not counted.
kindling-preboot: Kindling started from a pre-booted kernel (`kindling preboot`)
init: its first instruction; first byte: init's greeting on the console; both in guests without payload
output: the payload's first byte on the console; exit: the end of the monitor's process
VMM only: until the first guest entry, plus from the last exit to the end of the process
CPU time: user and system time of the monitor's process, including its guest
private, PSS: memory of the process without guest memory while a payload waits for input: pages
  of no other process (including its program, if it is the only instance), and proportional set size;
  page tables and kernel objects are not counted
user exits, guest faults: KVM's kvm_userspace_exit and kvm_page_fault until the payload's first output
";

/// The legend of scenario `io`.
const IO_LEGEND: &str = "\
read, write: random offsets of a disk, a raw file in the host's memory; bypassing the guest's page cache; one request
  in flight, or 32 (x32); 128k: sequential
random: from /dev/hwrng; give back: free page reporting of 64 MiB that the guest freed: the time for which the
  guest did not run, without its timer ticks
what the devices add: a disk, a network card and a vsock; to the time from the spawn to init's first byte on the
  console, and to the private memory of the monitor's process; compared with the same guest without them
the host's part: the total without the time in guest mode (between KVM's entries and exits), from another run
the ratio is to the first row of the same table; below each median: the smallest and largest value
";

/// The legend of scenario `run`.
const RUN_LEGEND: &str = "\
hello: `kindling run` of a small static program from a container image, from the spawn to the end of the process;
  busybox: the same for its echo. The kernel was pre-booted and the image converted by an earlier run
crun, runc, bubblewrap: the same programs in containers, with Debian's programs and the configuration of `crun spec`; of
  crun also with --cgroup-manager=disabled, as `kindling run` has no cgroup by default; no container: the program itself
volume, folder: busybox with `-v NAME:GUEST`, with an existing volume, and with `-v /HOST:GUEST`
hello, spare; busybox, spare: the same with `--spare`, where an earlier run has left a spare monitor
exec true: `kindling exec` of busybox's true in a running guest, from the spawn to the end of the process
stream: per MiB of 1 GiB through the standard input of `cat` in a guest and back from its standard output; without
  `kindling run`, of 64 MiB through a port of a virtio console; including the sender and the receiver
growth: of the private memory of the monitor's process, without guest memory, during the stream
own: private memory of front and monitor without guest memory, while a shell waits for input; second: the same for a
  guest beside that one, with which it shares the pages of the programs
";

/// The legend of scenario `jail`.
const JAIL_LEGEND: &str = "\
kindling: `kindling run` of busybox's echo from a container image; the kernel was pre-booted and the image converted by an
  earlier run. to init: from the start of the command to init's first instruction, when all layers are entered
off, standard, full: `--jail off`, the default, and `--jail full`; compare each with `off` of the same user
others: a boot from the kernel's first instruction, from the spawn to the payload's output or to the end; with --no-seccomp,
  with the filters that are the default, and in the jailer beside the program, whose directory is prepared before
";

/// The legend of scenario `clone`.
const CLONE_LEGEND: &str = "\
payload, its end: of a small static program in a copy of a template, from the request, when it reaches the monitor; exit: of
  `kindling run --template`, from the spawn to the end of the process; the template is a guest without other processes
parked: an earlier run has left a copy that waits (`--spare`)
create: `kindling template create` without a command, from the spawn to the end of the process
25: of 25 commands that are started at once, from the first spawn to the end of a process; 95th percentile
guest faults: page faults on guest memory handled by KVM, of a copy that is made on request
private: memory of front and monitor, including guest memory, while a shell waits for input in a copy, beside another copy
snapshot: `kindling snapshot` of a guest whose shell waits for input, from the spawn to the end of the process
restore: `kindling restore -d` from there, from the spawn to the end of the process, when the guest's processes continue
";

/// The legend of scenario `start`.
const START_LEGEND: &str = "\
busybox: `kindling run` of busybox's echo from a container image, from the spawn to the end of the process; the kernel
  was pre-booted and the image converted by an earlier run
guest faults: page faults on guest memory handled by KVM during that time
idle: private memory of the process of `kindling run`, including guest memory, while a shell waits for input
";

impl Report {
    /// The report as JSON.
    pub(super) fn json(&self) -> serde_json::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// The report as tables, grouped by the size of the guest.
    pub(super) fn tables(&self) -> String {
        let host = &self.host;
        let mut text = format!("\nmeasured in {}\non {}\n", host.meaning, host.machine);
        for case in self.cases() {
            let _ = writeln!(
                text,
                "\n{}: {case}, median of {}",
                self.scenario.name(),
                describe_runs(&self.rows, case)
            );
            for (title, metrics) in Metric::tables(self.scenario) {
                self.table(&mut text, case, title, &metrics);
            }
        }
        text.push('\n');
        text.push_str(match self.scenario {
            Scenario::Boot => BOOT_LEGEND,
            Scenario::Io => IO_LEGEND,
            Scenario::Run => RUN_LEGEND,
            Scenario::Start => START_LEGEND,
            Scenario::Clone => CLONE_LEGEND,
            Scenario::Jail => JAIL_LEGEND,
        });
        for note in &host.notes {
            let _ = writeln!(text, "{note}");
        }
        text
    }

    /// The sizes that have rows, in order.
    pub(super) fn cases(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        for row in &self.rows {
            if !cases.contains(&row.case()) {
                cases.push(row.case());
            }
        }
        cases
    }

    /// The monitors that have rows, in order.
    pub(super) fn vmms(&self) -> Vec<&str> {
        let mut vmms = Vec::new();
        for row in &self.rows {
            if !vmms.contains(&&*row.vmm) {
                vmms.push(&*row.vmm);
            }
        }
        vmms
    }

    /// The row of a size, a monitor and a metric.
    pub(super) fn row(&self, case: Case, vmm: &str, metric: Metric) -> Option<&Row> {
        self.rows.iter().find(|row| row.case() == case && row.vmm == vmm && row.metric == metric)
    }

    fn table(&self, text: &mut String, case: Case, title: &str, metrics: &[Metric]) {
        let is_there = |vmm: &&str| metrics.iter().any(|&metric| self.row(case, vmm, metric).is_some());
        if !self.vmms().iter().any(is_there) {
            return;
        }
        if !title.is_empty() {
            let _ = write!(text, "\n{title}");
        }
        let width = self.vmms().iter().map(|name| name.len()).max().unwrap_or(0).max(NAME);
        let _ = write!(text, "\n{:width$}", "");
        for metric in metrics {
            let _ = write!(text, "{:>VALUE$}{:RATIO$}", metric.title(), "");
        }
        trim_line(text);
        let vmms = self.vmms();
        for vmm in &vmms {
            let cells = metrics.iter().map(|&metric| self.row(case, vmm, metric));
            if cells.clone().all(|cell| cell.is_none()) {
                continue;
            }
            let (mut medians, mut ranges) = (format!("{vmm:width$}"), " ".repeat(width));
            for cell in cells {
                let Some(row) = cell else {
                    let _ = write!(medians, "{:>VALUE$}{:RATIO$}", "-", "");
                    ranges.push_str(&" ".repeat(COLUMN));
                    continue;
                };
                let first = vmms.first().and_then(|first| self.row(case, first, row.metric));
                let (value, ratio) = (row.metric.show(row.median), self.ratio(row, first));
                let _ = write!(medians, "{value:>VALUE$}{ratio:>RATIO$}");
                let range = format!("{}-{}", row.metric.show(row.min), row.metric.show(row.max));
                let _ = write!(ranges, "{range:>COLUMN$}");
            }
            text.push_str(&medians);
            trim_line(text);
            text.push_str(&ranges);
            trim_line(text);
        }
    }
}

impl Report {
    /// The ratio to the first monitor's value. Monitors without Kindling's boot mark port have no time of init's first
    /// instruction, so the value that stands in for it has no ratio.
    fn ratio(&self, row: &Row, first: Option<&Row>) -> String {
        let Some(first) = first.filter(|first| first.median > 0) else { return String::new() };
        if row.metric == Metric::SpawnToInit && self.is_stand_in(row) {
            return "*".to_owned();
        }
        let ratio = row.metric.scaled(row.median) / row.metric.scaled(first.median);
        // Wider ratios would touch the value.
        if ratio < 100.0 { format!("{ratio:.2}x") } else { format!("{ratio:.0}x") }
    }

    /// Whether the time of init's first byte stands in for that of its first instruction.
    fn is_stand_in(&self, row: &Row) -> bool {
        let byte = self.row(row.case(), &row.vmm, Metric::SpawnToFirstByte);
        byte.is_some_and(|byte| (byte.median, byte.min, byte.max) == (row.median, row.min, row.max))
    }
}

fn describe_runs(rows: &[Row], case: Case) -> String {
    match rows.iter().filter(|row| row.case() == case).map(|row| row.runs).max() {
        Some(1) => "1 run".to_owned(),
        runs => format!("{} runs", runs.unwrap_or(0)),
    }
}

/// Ends a line without trailing spaces.
fn trim_line(text: &mut String) {
    text.truncate(text.trim_end_matches(' ').len());
    text.push('\n');
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::plan::Sample;
    use crate::bench::statistics::rows;

    /// A report of Kindling and of a monitor without boot marks.
    pub(in crate::bench) fn report() -> Report {
        let case = Case { memory_mib: 128, vcpus: 1 };
        let values = [
            ("kindling", Metric::SpawnToInit, 20_000_000),
            ("kindling", Metric::SpawnToFirstByte, 25_000_000),
            ("kindling", Metric::VmmPrivateMemory, 1 << 20),
            ("<qemu>", Metric::SpawnToInit, 100_000_000),
            ("<qemu>", Metric::SpawnToFirstByte, 100_000_000),
            ("<qemu>", Metric::UserExits, 12),
        ];
        let samples = values.map(|(vmm, metric, value)| Sample { vmm: vmm.to_owned(), case, metric, value });
        let host = HostDescription {
            kind: "exact-lab",
            meaning: "the exact lab",
            machine: "a processor".to_owned(),
            notes: vec!["a note".to_owned()],
        };
        Report { scenario: Scenario::Boot, host, rows: rows(Scenario::Boot, &samples), failures: Vec::new() }
    }

    #[test]
    fn json_has_the_documented_fields() {
        let json: serde_json::Value = serde_json::from_str(&report().json().unwrap()).unwrap();
        assert_eq!(json["host"]["kind"], "exact-lab");
        assert_eq!(json["rows"].as_array().unwrap().len(), 6);
        let expected = serde_json::json!({
            "vmm": "<qemu>", "scenario": "boot", "memory_mib": 128, "vcpus": 1, "metric": "user_exits",
            "unit": "count", "median": 12, "min": 12, "max": 12, "runs": 1,
        });
        assert_eq!(json["rows"][5], expected);
        let fields: Vec<_> = json.as_object().unwrap().keys().collect();
        assert_eq!(fields, ["host", "rows"]);

        let case = Case { memory_mib: 64, vcpus: 2 };
        let failure = Failure { vmm: "x".to_owned(), case, what: "it ended".to_owned() };
        let failed = Report { failures: vec![failure], ..report() };
        let json: serde_json::Value = serde_json::from_str(&failed.json().unwrap()).unwrap();
        let expected = serde_json::json!([{ "vmm": "x", "memory_mib": 64, "vcpus": 2, "what": "it ended" }]);
        assert_eq!(json["failures"], expected);
    }

    #[test]
    fn metrics_have_the_documented_names_and_units() {
        let names: Vec<_> = Metric::all(Scenario::Boot).collect();
        let names = serde_json::to_value(names).unwrap();
        let expected = serde_json::json!([
            "spawn_to_init",
            "spawn_to_first_byte",
            "spawn_to_output",
            "spawn_to_exit",
            "vmm_only",
            "cpu_time",
            "vmm_private_memory",
            "vmm_proportional_memory",
            "user_exits",
            "guest_page_faults",
        ]);
        assert_eq!(names, expected);
        let units: Vec<_> =
            Metric::all(Scenario::Boot).map(|metric| serde_json::to_value(metric.unit()).unwrap()).collect();
        assert_eq!(units[4..10], ["ns", "ns", "bytes", "bytes", "count", "count"]);
    }

    #[test]
    fn tables_show_ratios_only_of_comparable_values() {
        let text = report().tables();
        let line = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap();
        let words: Vec<_> = line("<qemu>").split_whitespace().collect();
        assert_eq!(words, ["<qemu>", "100.000", "*", "100.000", "4.00x", "-", "-", "-"]);
        let words: Vec<_> = line("kindling").split_whitespace().collect();
        assert_eq!(words, ["kindling", "20.000", "1.00x", "25.000", "1.00x", "-", "-", "-"]);
        assert!(text.contains("\nboot: 128 MiB, 1 vCPU, median of 1 run\n"), "{text}");
        assert!(text.contains("measured in the exact lab\non a processor\n"), "{text}");
        assert!(text.ends_with("\na note\n"), "{text}");
        assert!(text.lines().all(|line| line.len() <= 104 && line.trim_end() == line), "{text}");
    }
}
