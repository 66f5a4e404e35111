//! Runs test programs in labs: exact labs, except for slow tests.
//!
//! A lab runs many programs, because packing and booting it takes longer than most of them. Its shell requests the next
//! program when one has ended, so that two labs share one queue.

use crate::bench::files::shared_libraries;
use crate::lab::{DISK, Job, OutputTimeout};
use crate::test::{FIRECRACKER, Program};
use crate::test_images;
use crate::test_report::{Report, Transcript};
use anyhow::{Result, bail};
use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The path of the testbed in the lab.
pub(crate) const TESTBED: &str = "/testbed";
/// Memory of a lab in MiB; the largest guest has 4096.
pub(crate) const MEMORY_MIB: u64 = 6144;
/// Limit of the time without output of a test; the slowest take half a minute.
const OUTPUT_TIMEOUT: Duration = Duration::from_secs(300);
/// The limit for slow tests.
const SLOW_OUTPUT_TIMEOUT: Duration = Duration::from_secs(3600);
/// The environment variable with the number of rounds of tests that repeat their work.
const ROUNDS: &str = "KINDLING_ROUNDS";
/// The test programs that take longest. They start first, so that both labs end at about the same time.
const SLOWEST_PROGRAMS: [&str; 11] = [
    "preboot",
    "cp",
    "images",
    "run",
    "many",
    "failed_calls",
    "root",
    "shared_folder",
    "payload",
    "instances",
    "hostile",
];
/// The prefix of the lines with which the lab's shell reports to this program.
const MARK: &str = "test lab:";
/// The word after the mark: the lab has booted, or the result of a program.
const READY: &str = "ready";
const PASSED: &str = "passed";
const FAILED: &str = "failed";
/// A record of the lab's kernel about a system call that the jail of a monitor refused (`audit_seccomp` in
/// kernel/auditsc.c). The end of the monitor may have no other visible effect, because its front may have ended before.
const REFUSAL: &str = "type=1326 .*/kindling-vmm\"";

/// A queue of test programs, and the configuration of the labs that run them.
#[derive(Debug)]
pub(crate) struct Queue<'a> {
    /// Number of processors of the lab.
    cpus: u8,
    /// The disk image with container images.
    images: Option<&'a Path>,
    testbed: &'a Path,
    filter: &'a str,
    /// All programs; every lab contains them.
    programs: Vec<&'a Program>,
    /// Programs that have not been started.
    waiting: Mutex<VecDeque<&'a Program>>,
}

impl<'a> Queue<'a> {
    pub(crate) fn new(
        cpus: u8,
        programs: Vec<&'a Program>,
        testbed: &'a Path,
        images: Option<&'a Path>,
        filter: &'a str,
    ) -> Self {
        let mut waiting: VecDeque<_> = programs.iter().copied().collect();
        let rank = |name: &str| {
            SLOWEST_PROGRAMS.iter().position(|long| *long == name).unwrap_or(SLOWEST_PROGRAMS.len())
        };
        waiting.make_contiguous().sort_by_key(|program| rank(&program.name));
        Self { cpus, images, testbed, filter, programs, waiting: Mutex::new(waiting) }
    }

    fn next(&self) -> Option<&'a Program> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn is_slow(&self) -> bool {
        self.programs.iter().any(|program| program.is_slow)
    }

    /// The description of the lab in the report.
    fn location(&self) -> String {
        let lab = if self.counts_instructions() { "exact lab" } else { "lab" };
        format!("in the {lab}, {} processor{}", self.cpus, if self.cpus == 1 { "" } else { "s" })
    }

    /// Whether the lab counts instructions. Slow tests run without, because counting makes them three times as slow.
    fn counts_instructions(&self) -> bool {
        !self.is_slow() && std::env::var_os(ROUNDS).is_none()
    }

    /// Runs the programs of the queue in a lab until the queue is empty. A program whose lab prints nothing for too
    /// long has failed, and the next one gets a new lab.
    pub(crate) fn work(&self, report: &Report) -> Result<()> {
        while let Some(first) = self.next() {
            report.lab_started();
            let mut current = Some(self.begin(first, report));
            let mut lines = Lines::default();
            let mut answer = |data: &[u8]| {
                let mut name = None;
                lines.split(data, |line| match line.strip_prefix(MARK.as_bytes()) {
                    Some(how) => {
                        let how = how.trim_ascii();
                        if how != READY.as_bytes() {
                            if let Some(ended) = current.take() {
                                ended.transcript.end(how == PASSED.as_bytes());
                            }
                            current = self.next().map(|next| self.begin(next, report));
                        }
                        // An empty answer closes the shell's input, which ends the lab.
                        let program = current.as_ref().map(|current| current.program);
                        name =
                            Some(program.map_or_else(String::new, |program| format!("{}\n", program.name)));
                    }
                    None => {
                        current.iter_mut().for_each(|current| current.transcript.add(line));
                    }
                });
                Ok(name.map(String::into_bytes))
            };
            let silence = if self.is_slow() { SLOW_OUTPUT_TIMEOUT } else { OUTPUT_TIMEOUT };
            let result = self.job()?.drive(silence, &mut answer);
            match (result, current) {
                (Ok(0), None) => {}
                (Ok(status), _) => bail!("the shell of a test lab exited with status {status}"),
                (Err(error), Some(mut current)) if error.is::<OutputTimeout>() => {
                    // The line with the name of the running test is incomplete.
                    current.transcript.add(&lines.start);
                    current.transcript.add(format!("\n{error:#}\n").as_bytes());
                    current.transcript.end(false);
                    report.lab_hung();
                }
                (Err(error), _) => return Err(error),
            }
        }
        Ok(())
    }

    fn begin<'r>(&self, program: &'a Program, report: &'r Report) -> Current<'a, 'r> {
        Current { program, transcript: report.transcript(&program.name, &self.location()) }
    }

    /// The job of a lab whose shell runs the requested programs and prints their results.
    fn job(&self) -> Result<Job> {
        let rounds = std::env::var(ROUNDS).ok();
        let mut with = vec![(self.testbed.to_owned(), TESTBED.to_owned())];
        let mut arguments = String::new();
        for program in &self.programs {
            with.push((program.path.clone(), format!("/tests/{}", program.name)));
            let words = program.arguments(self.filter).join(" ");
            arguments += &format!("{}) set -- {words};; ", program.name);
        }
        let has_firecracker = self.programs.iter().any(|program| program.name == FIRECRACKER);
        if has_firecracker {
            with.extend(shared_libraries(&self.testbed.join(FIRECRACKER))?);
        }
        let script = format!(
            "echo '{MARK} {READY}'\n\
             while read -r name; do\n\
             case $name in {arguments} esac\n\
             if /tests/$name \"$@\" </dev/null; then how='{PASSED}'; else how='{FAILED}'; fi\n\
             if dmesg -c | grep '{REFUSAL}'; then echo 'a monitor was refused a system call'; how='{FAILED}'; fi\n\
             echo; echo \"{MARK} $how\"\n\
             done"
        );
        Ok(Job {
            exact: self.counts_instructions(),
            cpus: self.cpus,
            memory_mib: MEMORY_MIB,
            command: ["/bin/sh", "-c", &script].map(str::to_owned).to_vec(),
            environment: [("KINDLING_TESTBED", TESTBED), (test_images::VARIABLE, DISK)]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into_iter()
                .chain(rounds.map(|rounds| (ROUNDS.to_owned(), rounds)))
                .collect(),
            with,
            get: Vec::new(),
            disk: self.images.map(Path::to_owned),
            has_xsave: has_firecracker,
        })
    }
}

/// The program that is running in a lab.
struct Current<'a, 'r> {
    program: &'a Program,
    transcript: Transcript<'r>,
}

/// Splits output into lines.
#[derive(Debug, Default)]
struct Lines {
    /// The start of an incomplete line.
    start: Vec<u8>,
}

impl Lines {
    /// Passes each complete line, including its end, to `take`.
    fn split(&mut self, data: &[u8], mut take: impl FnMut(&[u8])) {
        self.start.extend_from_slice(data);
        while let Some(end) = self.start.iter().position(|&byte| byte == b'\n') {
            let rest = self.start.split_off(end + 1);
            take(&self.start);
            self.start = rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_complete_for_every_split_of_the_output() {
        let output = b"test a ... ok\n\ntest lab: passed\nno end";
        for cut in 0..output.len() {
            let mut lines = Lines::default();
            let mut taken = Vec::new();
            for part in [&output[..cut], &output[cut..]] {
                lines.split(part, |line| taken.push(String::from_utf8(line.to_vec()).unwrap()));
            }
            assert_eq!(taken, ["test a ... ok\n", "\n", "test lab: passed\n"]);
        }
    }
}
