//! What a user sees: tables, and the same as JSON.

use super::metric::Metric;
use super::plan::{Case, Failure, Scenario};
use super::statistics::Row;
use serde::Serialize;
use std::fmt::Write;

/// Everything that is reported.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    /// What the guests did.
    #[serde(skip)]
    pub(super) scenario: Scenario,
    /// Where it was measured.
    pub(super) host: HostDescription,
    /// What was measured.
    pub(super) rows: Vec<Row>,
    /// Monitors that have no rows because they failed. Absent from JSON where none did.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) failures: Vec<Failure>,
}

/// Where something was measured.
#[derive(Clone, Debug, Serialize)]
pub(super) struct HostDescription {
    /// `exact-lab` or `hardware`.
    pub(super) kind: &'static str,
    /// What a value from there means.
    pub(super) meaning: &'static str,
    /// The processor and the kernel under the monitors.
    pub(super) machine: String,
    /// What the reader has to know about single values, those that are missing among them.
    pub(super) notes: Vec<String>,
}

/// Width of a column, and of the ratio inside it.
const COLUMN: usize = 17;
const RATIO: usize = 7;
const VALUE: usize = COLUMN - RATIO;
/// Width of the monitors' names, unless one is longer.
const NAME: usize = 14;

/// Lines under the tables of boots: what the columns are. Different columns come from different runs, so that
/// with several vCPUs init may seem to be later than the payload.
const BOOT_LEGEND: &str = "\
All times are from the spawn of the monitor's process; the ratio is to the first row of the same table.
Below each median are smallest and largest value. One boot before all others does not count.
kindling-preboot: Kindling continuing from a kernel that it booted before (`kindling preboot`)
init: its first instruction; first byte: init's greeting on the console; both in guests without payload
output: the payload's first byte there, in guests with it; exit: the monitor's process has ended
VMM only: until the guest is first entered, and from its last exit to the process's end
CPU time: user and system time of the monitor's process, its guest's included
private, PSS: the process's memory without guest memory while a payload waits for input; pages that
  only it has (its program's too, when it runs alone), and these with its share of the others; page
  tables and the kernel's objects are not counted
user exits, guest faults: KVM's kvm_userspace_exit and kvm_page_fault until the payload's first output
";

/// Lines under the tables of operations.
const IO_LEGEND: &str = "\
read, write: random places of a disk, a raw file in memory on the host; past the guest's page cache; one request
  at a time, or 32 (x32); 128k: one after the other
random: of /dev/hwrng; give back: of 64 MiB that the guest freed, by free page reporting, what is missing of the
  guest's time beyond its ticks
what the devices add: a disk, a network card and a vsock; to the time from the spawn to init's first byte on the
  console, and to the memory that only the monitor's process has; beside the same guest without them
the host's part: the whole without the time between KVM's entries of the guest and its exits, from another run
the ratio is to the first row of the same table; below each median are smallest and largest value
";

/// Lines under the tables of programs.
const RUN_LEGEND: &str = "\
hello: `kindling run` of a small static program from a container image, from the spawn to the end of the process;
  busybox: the same of its echo. The kernel was booted and the image converted for a run before
volume, folder: busybox with `-v NAME:GUEST`, of a volume that was used before, and with `-v /HOST:GUEST`
exec true: `kindling exec` of busybox's true in a guest that runs, from the spawn to the end of the process
stream: for each MiB of 1 GiB through the standard input of `cat` in a guest and back from its standard output; without
  `kindling run`, of 64 MiB through a port of a virtio console. Who sends and who receives is in it
growth: of the memory that only the monitor's process has, without its guest's, from before to after
";

/// Lines under the tables of starts.
const START_LEGEND: &str = "\
busybox: `kindling run` of busybox's echo from a container image, from the spawn to the end of the process; the kernel
  was booted and the image converted for a run before
guest faults: page faults on guest memory that KVM handled meanwhile
idle: memory that only the process of `kindling run` has, its guest's included, while a shell waits for input
";

impl Report {
    /// As JSON.
    pub(super) fn json(&self) -> serde_json::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// As tables, one pair per size.
    pub(super) fn tables(&self) -> String {
        let host = &self.host;
        let mut text = format!("\nmeasured in {}\non {}\n", host.meaning, host.machine);
        for case in self.cases() {
            let _ = writeln!(
                text,
                "\n{}: {case}, median of {}",
                self.scenario.name(),
                runs_in_words(&self.rows, case)
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
        });
        for note in &host.notes {
            let _ = writeln!(text, "{note}");
        }
        text
    }

    /// The sizes that have rows, in their order.
    pub(super) fn cases(&self) -> Vec<Case> {
        let mut cases = Vec::new();
        for row in &self.rows {
            if !cases.contains(&row.case()) {
                cases.push(row.case());
            }
        }
        cases
    }

    /// The monitors that have rows, in their order.
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
    /// How many times the first monitor's value this is. A monitor without our ports has no time of
    /// init's first instruction, so that what stands there is not compared.
    fn ratio(&self, row: &Row, first: Option<&Row>) -> String {
        let Some(first) = first.filter(|first| first.median > 0) else { return String::new() };
        if row.metric == Metric::SpawnToInit && self.is_stand_in(row) {
            return "*".to_owned();
        }
        let ratio = row.metric.scaled(row.median) / row.metric.scaled(first.median);
        // Larger ones would touch the value.
        if ratio < 100.0 { format!("{ratio:.2}x") } else { format!("{ratio:.0}x") }
    }

    /// Whether init's first byte stands for its first instruction.
    fn is_stand_in(&self, row: &Row) -> bool {
        let byte = self.row(row.case(), &row.vmm, Metric::SpawnToFirstByte);
        byte.is_some_and(|byte| (byte.median, byte.min, byte.max) == (row.median, row.min, row.max))
    }
}

fn runs_in_words(rows: &[Row], case: Case) -> String {
    match rows.iter().filter(|row| row.case() == case).map(|row| row.runs).max() {
        Some(1) => "1 run".to_owned(),
        runs => format!("{} runs", runs.unwrap_or(0)),
    }
}

/// Ends a line without spaces before its end.
fn trim_line(text: &mut String) {
    text.truncate(text.trim_end_matches(' ').len());
    text.push('\n');
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::plan::Sample;
    use crate::bench::statistics::rows;

    /// Two monitors, one of which is a stranger.
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
    fn json_has_the_promised_fields() {
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
    fn metrics_have_the_promised_names() {
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
    fn tables_compare_like_with_like() {
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
