//! `cargo xtask budget`: how much the figures of `tests/boot-budget.json` differ from lab to lab.
//!
//! The test program `exact_boot` says each figure that it holds against the budget in a line of its own. This command
//! runs it in many labs, one after the other, and prints what each figure was in all of them, so that budgets and the
//! margins of the test are set from a measurement.

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
    /// Labs to measure in
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    labs: u32,
    /// Only tests whose names contain this
    filter: Option<String>,
}

/// The test program that measures.
const PROGRAM: &str = "exact_boot";
/// How its lines begin that name a figure: `figure: NAME: LEAST of [ALL]`.
const FIGURE: &str = "figure: ";
/// How long it may say nothing.
const SILENCE: Duration = Duration::from_secs(120);

/// Measures and prints a table; the exit status is 1 where a test failed in one of the labs.
pub(crate) fn run(arguments: &Arguments) -> Result<u8> {
    let (_lock, testbed) = test::testbed()?;
    let place = tempfile::tempdir_in(crate::cargo::target_directory())?;
    let programs = test::programs(false, place.path())?;
    let program =
        programs.iter().find(|program| program.name == PROGRAM).context("there is no exact_boot")?;
    let mut figures: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    let mut failed = 0;
    for lab in 1..=arguments.labs {
        let (passed, output) = measure(program, &testbed, arguments.filter.as_deref())?;
        let found = figures_of(&output);
        ensure!(!found.is_empty(), "no test said a figure:\n{output}");
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
    println!("{failed} of {} labs had a test that failed", arguments.labs);
    Ok(u8::from(failed > 0))
}

/// Runs the program in one exact lab; whether its tests passed, and what it printed.
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
    let status = job.drive(SILENCE, &mut answer)?;
    Ok((status == 0, String::from_utf8_lossy(&output).into_owned()))
}

/// The figures that a program's output names.
fn figures_of(output: &str) -> Vec<(String, u64)> {
    let figure = |line: &str| {
        // A test's name stands before its first line, without an end of its own.
        let (_, figure) = line.split_once(FIGURE)?;
        let (name, values) = figure.rsplit_once(": ")?;
        Some((name.to_owned(), values.split_whitespace().next()?.parse().ok()?))
    };
    output.lines().filter_map(figure).collect()
}

/// A row for each figure.
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
    fn figures_are_read_and_their_spread_is_said() {
        let output = "test a ... figure: exec: 2000 of [2000, 2100]\nfigure: boot, VM created: 254000 of []\nok\nfigure: exec: many\n";
        assert_eq!(figures_of(output), [("exec".to_owned(), 2000), ("boot, VM created".to_owned(), 254_000)]);
        let figures = BTreeMap::from([("exec".to_owned(), vec![2100, 2000, 2050])]);
        let table = table(&figures);
        let row: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row, ["exec", "2000", "2050", "2100", "5.0", "%", "3"]);
    }
}
