//! Aggregates samples into rows: median, minimum, maximum.

use super::metric::{Metric, Unit};
use super::plan::{Case, Sample, Scenario};
use serde::Serialize;

/// The statistics of one metric of one monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Row {
    /// The monitor's name.
    pub(super) vmm: String,
    /// The workload of the guests.
    pub(super) scenario: &'static str,
    /// Memory of the guest in MiB.
    pub(super) memory_mib: u64,
    /// vCPUs of the guest.
    pub(super) vcpus: u8,
    /// The metric.
    pub(super) metric: Metric,
    /// The unit of the values.
    pub(super) unit: Unit,
    /// The median; for an even number of values the mean of the two middle ones.
    pub(super) median: u64,
    /// The minimum.
    pub(super) min: u64,
    /// The maximum.
    pub(super) max: u64,
    /// The number of values.
    pub(super) runs: usize,
}

impl Row {
    /// The size of the guest.
    pub(super) const fn case(&self) -> Case {
        Case { memory_mib: self.memory_mib, vcpus: self.vcpus }
    }
}

/// One row per size, monitor and metric with samples, in the order of the samples.
pub(super) fn rows(scenario: Scenario, samples: &[Sample]) -> Vec<Row> {
    let mut groups: Vec<(Case, &str)> = Vec::new();
    for sample in samples {
        if !groups.contains(&(sample.case, &sample.vmm)) {
            groups.push((sample.case, &sample.vmm));
        }
    }
    let row = |(case, vmm): (Case, &str), metric: Metric| {
        let belongs = |sample: &&Sample| (sample.case, &*sample.vmm, sample.metric) == (case, vmm, metric);
        let mut values: Vec<u64> = samples.iter().filter(belongs).map(|sample| sample.value).collect();
        values.sort_unstable();
        Some(Row {
            vmm: vmm.to_owned(),
            scenario: scenario.name(),
            memory_mib: case.memory_mib,
            vcpus: case.vcpus,
            metric,
            unit: metric.unit(),
            median: median(&values)?,
            min: *values.first()?,
            max: *values.last()?,
            runs: values.len(),
        })
    };
    groups
        .into_iter()
        .flat_map(|group| Metric::all(scenario).map(move |metric| row(group, metric)))
        .flatten()
        .collect()
}

/// The median of sorted values; for an even number the mean of the two middle ones.
pub(crate) fn median(sorted: &[u64]) -> Option<u64> {
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = *sorted.get(sorted.len().checked_sub(1)? / 2)?;
    Some(lower + (upper - lower) / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CASE: Case = Case { memory_mib: 128, vcpus: 1 };

    fn sample(vmm: &str, metric: Metric, value: u64) -> Sample {
        Sample { vmm: vmm.to_owned(), case: CASE, metric, value }
    }

    #[test]
    fn the_median_of_an_even_number_is_the_mean_of_the_middle_two() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[7]), Some(7));
        assert_eq!(median(&[1, 4]), Some(2));
        assert_eq!(median(&[1, 2, 900]), Some(2));
        assert_eq!(median(&[1, 2, 5, 900]), Some(3));
    }

    #[test]
    fn rows_are_grouped_by_monitor_size_and_metric() {
        let mut samples = vec![
            sample("b", Metric::SpawnToExit, 30),
            sample("b", Metric::UserExits, 7),
            sample("b", Metric::SpawnToExit, 10),
            sample("a", Metric::SpawnToExit, 5),
            sample("b", Metric::SpawnToExit, 20),
        ];
        samples.push(Sample { case: Case { vcpus: 2, ..CASE }, ..samples[0].clone() });
        let rows = rows(Scenario::Boot, &samples);
        let short: Vec<_> = rows
            .iter()
            .map(|row| (&*row.vmm, row.vcpus, row.metric, row.median, row.min, row.max, row.runs))
            .collect();
        let expected = [
            ("b", 1, Metric::SpawnToExit, 20, 10, 30, 3),
            ("b", 1, Metric::UserExits, 7, 7, 7, 1),
            ("a", 1, Metric::SpawnToExit, 5, 5, 5, 1),
            ("b", 2, Metric::SpawnToExit, 30, 30, 30, 1),
        ];
        assert_eq!(short, expected);
    }
}
