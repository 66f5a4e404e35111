//! `cargo xtask budget`: the spread of the values of `tests/boot-budget.json` between labs.
//!
//! The test program `exact_boot` prints each value that it checks against the budget on a separate line. This command
//! runs it in many labs, one after the other, and prints the distribution of each value, so that budgets and margins
//! are based on measurements.

use crate::bench::statistics::median;
use crate::lab::Job;
use crate::test::{self, Program};
use crate::test_lab::{self, TESTBED};
use anyhow::{Context, Result, ensure};
use clap::Args;
use std::collections::BTreeMap;
use std::time::Duration;

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Number of labs to measure in
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    labs: u32,
    /// Run only tests whose names contain this
    filter: Option<String>,
}

/// The test program.
const PROGRAM: &str = "exact_boot";
/// The prefix of a line with a value: `figure: NAME: LEAST of [ALL]`.
const FIGURE: &str = "figure: ";
/// Limit of the time without output.
const OUTPUT_TIMEOUT: Duration = Duration::from_secs(120);

/// Measures and prints a table. The exit status is 1 if a test failed in one of the labs.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let (_lock, testbed) = test::testbed()?;
    let scratch = tempfile::tempdir_in(crate::cargo::target_directory())?;
    let programs = test::programs(false, scratch.path())?;
    let program = programs
        .iter()
        .find(|program| program.name == PROGRAM)
        .context("the test program exact_boot was not built")?;
    let mut figures: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    let mut failed = 0;
    for lab in 1..=arguments.labs {
        let (passed, output) = measure(program, &testbed, arguments.filter.as_deref())?;
        let found = figures_of(&output);
        ensure!(!found.is_empty(), "no test printed a value:\n{output}");
        for (name, value) in found {
            figures.entry(name).or_default().push(value);
        }
        failed += u32::from(!passed);
        println!("lab {lab} of {}: {}", arguments.labs, if passed { "passed" } else { "failed" });
        if !passed {
            println!("{output}");
        }
    }
    print!("{}", table(&figures));
    println!("tests failed in {failed} of {} labs", arguments.labs);
    Ok(u8::from(failed > 0))
}

/// Runs the test program in one exact lab; returns whether its tests passed, and its output.
fn measure(program: &Program, testbed: &std::path::Path, filter: Option<&str>) -> Result<(bool, String)> {
    let path = format!("/tests/{PROGRAM}");
    let mut command = vec![path.clone(), "--test-threads=1".to_owned(), "--nocapture".to_owned()];
    command.extend(filter.map(str::to_owned));
    let job = Job {
        exact: true,
        cpus: 1,
        memory_mib: test_lab::MEMORY_MIB,
        command,
        environment: vec![("KINDLING_TESTBED".to_owned(), TESTBED.to_owned())],
        with: vec![(testbed.to_owned(), TESTBED.to_owned()), (program.path.clone(), path)],
        ..Job::default()
    };
    let mut output = Vec::new();
    let mut answer = |data: &[u8]| {
        output.extend_from_slice(data);
        Ok(None)
    };
    let status = job.drive(OUTPUT_TIMEOUT, &mut answer)?;
    Ok((status == 0, String::from_utf8_lossy(&output).into_owned()))
}

/// Parses the values in the output of a test program.
fn figures_of(output: &str) -> Vec<(String, u64)> {
    let figure = |line: &str| {
        // The first line of a test follows the test's name without a line break.
        let (_, figure) = line.split_once(FIGURE)?;
        let (name, values) = figure.rsplit_once(": ")?;
        Some((name.to_owned(), values.split_whitespace().next()?.parse().ok()?))
    };
    output.lines().filter_map(figure).collect()
}

/// Formats a row per value.
fn table(figures: &BTreeMap<String, Vec<u64>>) -> String {
    let width = figures.keys().map(String::len).max().unwrap_or(0);
    let mut table = format!(
        "{:width$}  {:>12}  {:>12}  {:>12}  {:>8}  labs\n",
        "figure", "min", "median", "max", "spread"
    );
    for (name, values) in figures {
        let mut values = values.clone();
        values.sort_unstable();
        let (min, max) = (values[0], values[values.len() - 1]);
        let median = median(&values).unwrap_or_default();
        let tenths = ((max - min) * 1000).checked_div(min).unwrap_or(0);
        let spread = format!("{}.{} %", tenths / 10, tenths % 10);
        table +=
            &format!("{name:width$}  {min:>12}  {median:>12}  {max:>12}  {spread:>8}  {}\n", values.len());
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_minimum_median_maximum_and_spread_of_each_value() {
        let output = "test a ... figure: exec: 2000 of [2000, 2100]\nfigure: boot, VM created: 254000 of []\nok\nfigure: exec: many\n";
        assert_eq!(figures_of(output), [("exec".to_owned(), 2000), ("boot, VM created".to_owned(), 254_000)]);
        let figures = BTreeMap::from([("exec".to_owned(), vec![2100, 2000, 2050])]);
        let table = table(&figures);
        let row: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row, ["exec", "2000", "2050", "2100", "5.0", "%", "3"]);
    }
}
