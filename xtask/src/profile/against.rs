//! Comparison with an earlier profile (`--against`).

use super::record::{Lane, Phase, Profile};
use super::text::{milliseconds, signed_milliseconds};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// Number of rows in the terminal.
const ROWS: usize = 40;
/// The minimal change in nanoseconds that is reported; smaller ones would be shown as zero.
const MIN_CHANGE_NS: u64 = 500;

/// A phase in two profiles.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Difference {
    pub(super) lane: Lane,
    pub(super) name: String,
    /// Nanoseconds in the earlier profile, if the phase is there.
    pub(super) old: Option<u64>,
    /// Nanoseconds in this one.
    pub(super) new: Option<u64>,
}

impl Difference {
    /// Whether the phase is in only one of the profiles.
    const fn is_added_or_removed(&self) -> bool {
        self.old.is_none() || self.new.is_none()
    }

    /// The change of the duration.
    fn change(&self) -> i64 {
        let signed = |time: Option<u64>| i64::try_from(time.unwrap_or(0)).unwrap_or(i64::MAX);
        signed(self.new) - signed(self.old)
    }
}

/// The phases whose duration changed, or that only one profile has, by the size of the change. Phases with the same
/// name, such as initcalls of several files, are summed.
pub(super) fn differences(old: &Profile, new: &Profile) -> Vec<Difference> {
    let (earlier, now) = (sums(&old.phases), sums(&new.phases));
    let keys: BTreeSet<&(Lane, &str)> = earlier.keys().chain(now.keys()).collect();
    let mut differences: Vec<Difference> = keys
        .into_iter()
        .map(|key| Difference {
            lane: key.0,
            name: key.1.to_owned(),
            old: earlier.get(key).copied(),
            new: now.get(key).copied(),
        })
        .filter(|difference| {
            difference.change().unsigned_abs() >= MIN_CHANGE_NS || difference.is_added_or_removed()
        })
        .collect();
    differences.sort_by_key(|difference| std::cmp::Reverse(difference.change().unsigned_abs()));
    differences
}

/// The total duration of the phases of each name.
fn sums(phases: &[Phase]) -> BTreeMap<(Lane, &str), u64> {
    let mut sums = BTreeMap::new();
    for phase in phases {
        *sums.entry((phase.lane, &*phase.name)).or_default() += phase.duration;
    }
    sums
}

/// The comparison for the terminal.
pub(super) fn report(old: &Profile, new: &Profile) -> String {
    let mut text = String::from("\ncompared with the earlier profile, milliseconds\n\n");
    if old.host != new.host {
        let _ =
            writeln!(text, "note: the earlier profile was measured in {}\n", printable(&old.host.meaning));
    }
    let size = |profile: &Profile| (profile.guest.memory_mib, profile.guest.vcpus);
    if size(old) != size(new) {
        let (memory, vcpus) = size(old);
        let _ = writeln!(text, "note: the earlier guest had {memory} MiB and {vcpus} vCPUs\n");
    }
    text.push_str("      old       new    change  lane      phase\n");
    let totals = |profile: &Profile| {
        let totals = profile.totals;
        [totals.init_reached, totals.vmm, totals.kernel, totals.process]
    };
    let names = ["total until init", "VMM until the guest runs", "kernel", "total until the process ends"];
    for ((name, old), new) in names.into_iter().zip(totals(old)).zip(totals(new)) {
        row(&mut text, "", name, Some(old), Some(new));
    }
    text.push('\n');
    let differences = differences(old, new);
    for difference in differences.iter().take(ROWS) {
        row(&mut text, difference.lane.title(), &printable(&difference.name), difference.old, difference.new);
    }
    if differences.is_empty() {
        text.push_str("no phase changed\n");
    }
    if let Some(rest) = differences.get(ROWS..).filter(|rest| !rest.is_empty()) {
        let sum: i64 = rest.iter().map(Difference::change).sum();
        let _ =
            writeln!(text, "{:30.3}  {} others with smaller changes", signed_milliseconds(sum), rest.len());
    }
    text
}

fn row(text: &mut String, lane: &str, phase: &str, old: Option<u64>, new: Option<u64>) {
    let time =
        |time: Option<u64>| time.map_or_else(|| "-".to_owned(), |ns| format!("{:.3}", milliseconds(ns)));
    let signed = |time: Option<u64>| i64::try_from(time.unwrap_or(0)).unwrap_or(i64::MAX);
    let note = match (old, new) {
        (None, _) => "  (new)",
        (_, None) => "  (gone)",
        _ => "",
    };
    let change = signed_milliseconds(signed(new) - signed(old));
    let _ = writeln!(text, "{:>9} {:>9} {change:+9.3}  {lane:8}  {phase}{note}", time(old), time(new));
}

/// Replaces control characters, which the author of a file chooses, so that they do not reach the terminal.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '.' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::{phase, profile};
    use super::*;

    fn with(phases: Vec<Phase>) -> Profile {
        Profile { phases, ..profile() }
    }

    #[test]
    fn changed_phases_are_sorted_by_the_size_of_the_change() {
        let old = with(vec![
            phase(Lane::Kernel, "same", 0, 5),
            phase(Lane::Kernel, "slower", 0, 1_000_000),
            phase(Lane::Kernel, "faster", 0, 9_000_000),
            phase(Lane::Initcall, "gone", 0, 2_000_000),
            phase(Lane::Initcall, "twice", 0, 1000),
            phase(Lane::Initcall, "twice", 0, 2000),
        ]);
        let new = with(vec![
            phase(Lane::Kernel, "same", 7, 504),
            phase(Lane::Kernel, "slower", 0, 1_500_000),
            phase(Lane::Kernel, "faster", 0, 3_000_000),
            phase(Lane::Initcall, "twice", 0, 4000),
            phase(Lane::Init, "new", 0, 3_000_000),
        ]);
        let short: Vec<_> = differences(&old, &new).into_iter().map(|d| (d.name, d.old, d.new)).collect();
        let expected = [
            ("faster", Some(9_000_000), Some(3_000_000)),
            ("new", None, Some(3_000_000)),
            ("gone", Some(2_000_000), None),
            ("slower", Some(1_000_000), Some(1_500_000)),
            ("twice", Some(3000), Some(4000)),
        ];
        assert_eq!(short, expected.map(|(name, old, new)| (name.to_owned(), old, new)));
        let text = report(&old, &new);
        assert!(text.contains("    9.000     3.000    -6.000  kernel    faster\n"), "{text}");
        assert!(text.contains("        -     3.000    +3.000  init      new  (new)\n"), "{text}");
        assert!(text.contains("    2.000         -    -2.000  initcall  gone  (gone)\n"), "{text}");
        assert!(!text.contains("same"), "{text}");
    }

    #[test]
    fn a_different_host_or_guest_is_noted() {
        let mut old = profile();
        old.host.meaning = "real time".into();
        old.guest.vcpus = 4;
        old.phases.push(phase(Lane::Kernel, "\u{1b}[2J", 0, 1));
        let text = report(&old, &profile());
        assert!(text.contains("note: the earlier profile was measured in real time"), "{text}");
        assert!(text.contains("note: the earlier guest had 128 MiB and 4 vCPUs"), "{text}");
        assert!(!text.contains('\u{1b}'), "{text:?}");
        assert!(report(&profile(), &profile()).contains("no phase changed"));
    }
}
