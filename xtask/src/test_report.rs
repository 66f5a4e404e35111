//! The output of `cargo xtask test`: a block per test program, and a summary line.

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The report of a test run.
#[derive(Debug)]
pub(crate) struct Report {
    started: Instant,
    /// Whether output is printed immediately, which requires that programs run one after the other. Otherwise a
    /// program's block is printed at its end.
    live: bool,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    passed: u64,
    failed: u64,
    labs: u32,
    hung: u32,
    /// The programs with failed tests, and what their output says about it.
    programs: Vec<(String, String)>,
}

impl Report {
    pub(crate) fn new(started: Instant, live: bool) -> Self {
        Self { started, live, counts: Mutex::default() }
    }

    fn count(&self, change: impl FnOnce(&mut Counts)) {
        change(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn lab_started(&self) {
        self.count(|counts| counts.labs += 1);
    }

    pub(crate) fn lab_hung(&self) {
        self.count(|counts| counts.hung += 1);
    }

    /// Starts the block of a program.
    pub(crate) fn transcript(&self, name: &str, location: &str) -> Transcript<'_> {
        let mut transcript = Transcript {
            report: self,
            name: name.to_owned(),
            started: Instant::now(),
            text: Vec::new(),
            printed: 0,
        };
        transcript.add(format!("\n{name} ({location})\n").as_bytes());
        transcript
    }

    /// Prints the summary; returns whether all tests passed.
    pub(crate) fn finish(self) -> bool {
        let counts = self.counts.into_inner().unwrap_or_else(PoisonError::into_inner);
        // Repeated here, because the block of a program may be thousands of lines above.
        for (name, reason) in &counts.programs {
            println!("\nfailed: {name}\n{reason}");
        }
        println!("\n{}", counts.line(self.started.elapsed()));
        counts.programs.is_empty()
    }
}

impl Counts {
    fn line(&self, time: Duration) -> String {
        let Self { passed, failed, labs, hung, .. } = self;
        let (minutes, seconds) = (time.as_secs() / 60, time.as_secs() % 60);
        format!(
            "tests: {passed} passed, {failed} failed; labs: {labs} started, {hung} hung; time: {minutes} min {seconds} s"
        )
    }

    /// Adds the counts of libtest's summaries in a program's output.
    fn add(&mut self, name: &str, output: &[u8], passed: bool) {
        let output = String::from_utf8_lossy(output);
        for summary in output.lines().filter_map(|line| line.strip_prefix("test result: ")) {
            self.passed += number_before(summary, " passed");
            self.failed += number_before(summary, " failed");
        }
        if !passed {
            self.programs.push((name.to_owned(), reason(&output)));
        }
    }
}

/// The part of a failed program's output that says why: libtest's messages of failed tests, or the last lines.
fn reason(output: &str) -> String {
    /// Maximum number of lines.
    const LINES: usize = 40;
    let is_of_backtrace = |line: &str| {
        let start = line.trim_start();
        let number = start.split(':').next().unwrap_or_default();
        start.starts_with("at ") || start == "stack backtrace:" || number.parse::<u32>().is_ok()
    };
    let mut messages = Vec::new();
    let mut is_message = false;
    for line in output.lines() {
        is_message |= line.starts_with("---- ");
        // The list of names after the messages.
        is_message &= line != "failures:";
        if is_message && !line.is_empty() && !is_of_backtrace(line) {
            messages.push(line);
        }
    }
    if messages.is_empty() {
        let lines: Vec<_> = output.lines().filter(|line| !line.is_empty()).collect();
        messages = lines[lines.len().saturating_sub(LINES / 4)..].to_vec();
    }
    messages.truncate(LINES);
    messages.join("\n")
}

/// The number before a word.
fn number_before(text: &str, word: &str) -> u64 {
    let before = text.split(word).next().unwrap_or_default();
    before.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// The block of one program.
#[derive(Debug)]
pub(crate) struct Transcript<'a> {
    report: &'a Report,
    name: String,
    started: Instant,
    text: Vec<u8>,
    /// The number of bytes that have been printed.
    printed: usize,
}

impl Transcript<'_> {
    pub(crate) fn add(&mut self, output: &[u8]) {
        self.text.extend_from_slice(output);
        if self.report.live {
            self.print();
        }
    }

    /// Completes the block with the program's result.
    pub(crate) fn end(mut self, passed: bool) {
        let how = if passed { "passed" } else { "failed" };
        let line = format!("{}: {how} in {} s\n", self.name, self.started.elapsed().as_secs());
        self.text.extend_from_slice(line.as_bytes());
        self.print();
        self.report.count(|counts| counts.add(&self.name, &self.text, passed));
    }

    /// Prints new output. Errors are ignored, so that a closed pipe does not abort the tests.
    fn print(&mut self) {
        let mut output = io::stdout().lock();
        let _ = output.write_all(&self.text[self.printed..]).and_then(|()| output.flush());
        self.printed = self.text.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summaries_of_all_programs_are_summed() {
        let mut counts = Counts::default();
        let output = b"test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out\n\
            test result: FAILED. 3 passed; 2 failed; 0 ignored\n";
        counts.add("several", output, false);
        counts.add("one", b"test result: ok. 1 passed; 0 failed; 0 ignored\n", true);
        // A program without a summary adds no tests.
        counts.add("broken", b"Segmentation fault\n", false);
        (counts.labs, counts.hung) = (4, 1);
        assert_eq!(
            counts.line(Duration::from_secs(671)),
            "tests: 16 passed, 2 failed; labs: 4 started, 1 hung; time: 11 min 11 s"
        );
        let broken = "Segmentation fault";
        assert_eq!((&*counts.programs[0].0, &*counts.programs[1].1), ("several", broken));
        assert_eq!(counts.programs.len(), 2);
    }

    #[test]
    fn a_failure_is_repeated_without_its_backtrace() {
        let output = "test a ... FAILED\n\nfailures:\n\n---- a stdout ----\n\nthread 'a' panicked at a.rs:2:9:\n\
            left: 1\nstack backtrace:\n   0: __rustc::rust_begin_unwind\n             at /rustc/lib.rs:689:5\n\n\n\
            failures:\n    a\n\ntest result: FAILED. 0 passed; 1 failed\n";
        assert_eq!(reason(output), "---- a stdout ----\nthread 'a' panicked at a.rs:2:9:\nleft: 1");
        let refused =
            "test b ... ok\n\ntest result: ok. 1 passed; 0 failed\n\na monitor was refused a system call\n";
        assert!(reason(refused).ends_with("\na monitor was refused a system call"));
    }

    #[test]
    fn a_block_has_a_heading_and_its_tests_are_counted() {
        let report = Report::new(Instant::now(), false);
        let mut transcript = report.transcript("net", "here");
        transcript.add(b"test result: ok. 2 passed; 0 failed\n");
        assert!(transcript.text.starts_with(b"\nnet (here)\n"));
        transcript.end(true);
        let counts = report.counts.into_inner().unwrap();
        assert_eq!((counts.passed, counts.programs.len()), (2, 0));
    }
}
