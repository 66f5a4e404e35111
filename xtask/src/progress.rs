//! Progress of long operations: a bar on a terminal, lines elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// The progress of an operation whose length is known or estimated.
#[derive(Debug)]
pub(crate) struct Progress {
    what: String,
    unit: &'static str,
    bar: ProgressBar,
    lines: bool,
    started: Instant,
    last_line: Instant,
    done: u64,
    expected: u64,
}

/// Interval between lines if there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(15);

impl Progress {
    /// Starts to show the progress of `expected` units.
    pub(crate) fn new(what: impl Into<String>, unit: &'static str, expected: u64) -> Self {
        let what = what.into();
        let lines = !std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(Some(expected), ProgressDrawTarget::stderr());
        let template = format!("{{msg}} {{wide_bar}} {{pos}}/{{len}} {unit}, {{eta}} left");
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style);
        }
        if lines {
            eprintln!("{what} ...");
        }
        bar.set_message(what.clone());
        let started = Instant::now();
        Self { what, unit, bar, lines, started, last_line: started, done: 0, expected }
    }

    /// Records a finished unit. An estimate that was too low is increased.
    pub(crate) fn advance(&mut self) {
        self.done += 1;
        if self.done > self.expected {
            self.expected = self.done;
            self.bar.set_length(self.expected);
        }
        self.bar.set_position(self.done);
        if self.lines && self.last_line.elapsed() >= LINE_INTERVAL {
            self.last_line = Instant::now();
            let left = self.time_left();
            eprintln!(
                "{}: {} of {} {}, about {} s left",
                self.what,
                self.done,
                self.expected,
                self.unit,
                left.as_secs()
            );
        }
    }

    fn time_left(&self) -> Duration {
        let left = u32::try_from(self.expected - self.done).unwrap_or(u32::MAX);
        let done = u32::try_from(self.done).unwrap_or(u32::MAX).max(1);
        self.started.elapsed().saturating_mul(left) / done
    }

    /// Ends the operation and prints its duration.
    pub(crate) fn finish(self) {
        self.bar.finish_and_clear();
        eprintln!("{}: done in {:.1} s", self.what, self.started.elapsed().as_secs_f64());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
