//! Test programs in the lab: the exact one, but for tests that take long.
//!
//! One lab runs many, because packing and booting it takes longer than most of them. A lab that stands still is
//! replaced by another one for what has not ended: QEMU sometimes delivers a guest's interrupt twice
//! (docs/architecture.md, "The lab").

use crate::lab::{ATTEMPTS, DISK, Job, Silent};
use crate::test::Program;
use crate::test_images;
use anyhow::{Result, bail};
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

/// Where the testbed is inside the lab.
const TESTBED: &str = "/testbed";
/// MiB of memory of the lab: the largest guest has 4096.
const MEMORY_MIB: u64 = 6144;
/// How long a test may say nothing; the slowest take half a minute.
const SILENCE: Duration = Duration::from_secs(180);
/// The same for those that take long.
const LONG_SILENCE: Duration = Duration::from_secs(3600);
/// Says how often a test does what it does a few times otherwise.
const ROUNDS: &str = "KINDLING_ROUNDS";

/// Runs test programs one after the other; those that failed.
pub(crate) fn run(
    cpus: u8,
    programs: &[&Program],
    testbed: &Path,
    images: Option<&Path>,
    filter: &str,
) -> Result<Vec<String>> {
    let mut failed = Vec::new();
    let mut left = programs.to_vec();
    let mut attempt = 1;
    while !left.is_empty() {
        let silence = if left.iter().any(|program| program.takes_long) { LONG_SILENCE } else { SILENCE };
        let mut output = Vec::new();
        let result = job(cpus, &left, testbed, images, filter).run_unless_silent(silence, &mut output);
        let count = left.len();
        left.retain(|program| match verdict(&program.name, &output) {
            Some(Verdict::Passed) => false,
            Some(Verdict::Failed) => {
                failed.push(program.name.clone());
                false
            }
            None => true,
        });
        if left.len() < count {
            attempt = 1;
        }
        let names: Vec<_> = left.iter().map(|program| &*program.name).collect();
        match result {
            Ok(_) if left.is_empty() => {}
            Ok(status) => bail!("the lab's shell ended with status {status} before {}", names.join(", ")),
            Err(error) if error.is::<Silent>() && attempt < ATTEMPTS && !left.is_empty() => {
                attempt += 1;
                println!(
                    "\n{error:#}\na new lab for {} (attempt {attempt} of {ATTEMPTS} of the first)",
                    names.join(", ")
                );
            }
            Err(error) if error.is::<Silent>() && !left.is_empty() => {
                println!("\n{error:#}\n{} is given up", names[0]);
                failed.push(format!("{} (its lab stood still {ATTEMPTS} times)", names[0]));
                left.remove(0);
                attempt = 1;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(failed)
}

/// A lab that runs these programs and says after each how it ended.
fn job(cpus: u8, programs: &[&Program], testbed: &Path, images: Option<&Path>, filter: &str) -> Job {
    let rounds = std::env::var(ROUNDS).ok();
    // What takes long takes three times as long where instructions are counted.
    let takes_long = rounds.is_some() || programs.iter().any(|program| program.takes_long);
    let lab = if takes_long { "lab" } else { "exact lab" };
    let kind = format!("in the {lab}, {cpus} processor{}", if cpus == 1 { "" } else { "s" });
    let mut script = String::new();
    let mut with = vec![(testbed.to_owned(), TESTBED.to_owned())];
    for program in programs {
        let Program { name, path, .. } = program;
        let arguments = program.arguments(filter).join(" ");
        let _ = writeln!(script, "echo; echo '{name} ({kind})'; how={}", Verdict::Passed.word());
        let _ = writeln!(script, "/tests/{name} {arguments} || how={}", Verdict::Failed.word());
        let _ = writeln!(script, "echo; echo {name}: $how");
        with.push((path.clone(), format!("/tests/{name}")));
    }
    Job {
        exact: !takes_long,
        cpus,
        memory_mib: MEMORY_MIB,
        command: ["/bin/sh", "-c", &script].map(str::to_owned).to_vec(),
        environment: [("KINDLING_TESTBED", TESTBED), (test_images::VARIABLE, DISK)]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into_iter()
            .chain(rounds.map(|rounds| (ROUNDS.to_owned(), rounds)))
            .collect(),
        with,
        get: Vec::new(),
        disk: images.map(Path::to_owned),
    }
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
}

impl Verdict {
    const fn word(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
        }
    }
}

/// What a lab's output says of a program; nothing where the program had not ended.
fn verdict(name: &str, output: &[u8]) -> Option<Verdict> {
    let output = String::from_utf8_lossy(output);
    // The last line of a lab that stood still may be a part of one.
    let (whole, _) = output.rsplit_once('\n')?;
    let mut words = whole.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    words.find_map(|word| {
        [Verdict::Passed, Verdict::Failed].into_iter().find(|verdict| verdict.word() == word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_programs_that_ended_have_a_verdict() {
        let output = b"\nnet (there)\ntest a ... ok\n\nnet: passed\n\nnet_more (there)\n\nnet_more: failed\n\nblock (there)\nblock: passed";
        assert_eq!(verdict("net", output), Some(Verdict::Passed));
        assert_eq!(verdict("net_more", output), Some(Verdict::Failed));
        // Its line has no end.
        assert_eq!(verdict("block", output), None);
        assert_eq!(verdict("vsock", output), None);
        assert_eq!(verdict("net", b""), None);
    }
}
