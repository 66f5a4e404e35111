//! A running guest whose console the test reads and writes line by line.

use crate::TIMEOUT;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The start of a guest script: disables the terminal's echo and defines `wait_line`, which waits for a line of input.
pub const PREAMBLE: &str = "stty -echo; wait_line() { read -r line; };";

/// A running guest with its console.
#[derive(Debug)]
pub struct GuestConsole {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
    errors: Option<JoinHandle<String>>,
    /// All lines read so far.
    output: Vec<String>,
}

impl GuestConsole {
    /// Starts the guest's command.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(command: &mut Command) -> Self {
        let streams = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = streams.spawn().expect("cannot start the command");
        let (sender, lines) = mpsc::channel();
        let output = child.stdout.take().expect("no standard output");
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut errors = child.stderr.take().expect("no standard error");
        let errors = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = errors.read_to_string(&mut text);
            text
        });
        Self { input: child.stdin.take(), child, lines, errors: Some(errors), output: Vec::new() }
    }

    /// Waits for a line that starts with `start`, and returns the rest of it.
    ///
    /// # Panics
    /// When no such line arrives in time; the message has all output.
    #[track_caller]
    pub fn expect(&mut self, start: &str) -> String {
        self.read_until(start, TIMEOUT).unwrap_or_else(|| {
            panic!("no line starts with {start:?} in\n{}\n{}", self.output.join("\n"), self.end())
        })
    }

    /// Waits for a line that starts with `start`; `None` at the end of the output or after `limit`.
    fn read_until(&mut self, start: &str, limit: Duration) -> Option<String> {
        let until = Instant::now() + limit;
        loop {
            let line = self.lines.recv_timeout(until.saturating_duration_since(Instant::now())).ok()?;
            self.output.push(line.clone());
            if let Some(rest) = line.strip_prefix(start) {
                return Some(rest.trim().to_owned());
            }
        }
    }

    /// Sends the guest a line, for which its script waits.
    ///
    /// # Panics
    /// When the guest has ended.
    pub fn send_line(&mut self) {
        self.input.as_mut().and_then(|input| writeln!(input, "on").ok()).expect("the guest has ended");
    }

    /// Resident memory (VmRSS) of the VMM in KiB.
    ///
    /// # Panics
    /// When the guest has ended.
    #[must_use]
    pub fn rss_kib(&self) -> u64 {
        let status = std::fs::read_to_string(self.process().join("status")).expect("the VMM has ended");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("no VmRSS");
        line.trim().trim_end_matches(" kB").parse().expect("not a number")
    }

    /// Sends the VMM a signal.
    pub fn signal(&self, signal: i32) {
        crate::kill(self.child.id(), signal);
    }

    /// The folder in /proc of the VMM's process: the command itself, or the monitor that it has started.
    ///
    /// # Panics
    /// When the command has ended.
    #[must_use]
    pub fn process(&self) -> PathBuf {
        let pid = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.expect("the command has ended");
        let folders = children.split_whitespace().map(|child| PathBuf::from("/proc").join(child));
        let mut folders = folders.filter(|folder| {
            std::fs::read_to_string(folder.join("comm")).is_ok_and(|name| name.trim() == "kindling-vmm")
        });
        folders.next().unwrap_or_else(|| format!("/proc/{pid}").into())
    }

    /// The sections of the VMM's /proc/PID/smaps for mappings of a file with this name.
    ///
    /// # Panics
    /// When the guest has ended.
    #[must_use]
    pub fn smaps_of(&self, file: &str) -> Vec<String> {
        let smaps = std::fs::read_to_string(self.process().join("smaps")).expect("the VMM has ended");
        let is_header = |line: &str| line.split_once(' ').is_some_and(|(range, _)| range.contains('-'));
        let mut sections: Vec<String> = Vec::new();
        for line in smaps.lines() {
            if is_header(line) {
                sections.push(String::new());
            }
            if let Some(section) = sections.last_mut() {
                *section += line;
                section.push('\n');
            }
        }
        sections.retain(|section| section.lines().next().is_some_and(|line| line.ends_with(file)));
        sections
    }

    /// Polls until a condition holds.
    ///
    /// # Panics
    /// When the condition does not hold within [`TIMEOUT`].
    #[track_caller]
    pub fn wait_until(&self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        let until = Instant::now() + TIMEOUT;
        while !condition(self) {
            assert!(Instant::now() < until, "{what}: not within {TIMEOUT:?}; {} KiB", self.rss_kib());
            // The pause leaves the processor to the guest.
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits for the command to exit.
    ///
    /// # Panics
    /// When it exits with another status.
    #[track_caller]
    pub fn expect_status(self, status: i32) {
        drop(self.expect_end(&format!("exit status: {status}")));
    }

    /// Waits for the command to end, with an exit status or a signal; returns its standard error.
    ///
    /// # Panics
    /// When it ends differently.
    #[track_caller]
    pub fn expect_end(mut self, end: &str) -> String {
        let until = Instant::now() + TIMEOUT;
        // The output is at its end when the command has ended.
        while let Ok(line) = self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            self.output.push(line);
        }
        let text = self.output.join("\n");
        while self.child.try_wait().is_ok_and(|status| status.is_none()) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        let ended = self.end();
        let (how, errors) = ended.split_once('\n').unwrap_or_default();
        assert!(how.starts_with(end), "{ended}\n{text}");
        errors.to_owned()
    }

    /// Kills the command unless it has ended; returns its status and standard error.
    fn end(&mut self) -> String {
        self.input = None;
        let exited: Option<ExitStatus> = self.child.try_wait().ok().flatten();
        let status = exited.or_else(|| {
            let _ = self.child.kill();
            self.child.wait().ok()
        });
        let errors = self.errors.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        format!("{}\n{errors}", status.map_or_else(|| "lost".to_owned(), |status| status.to_string()))
    }
}

impl Drop for GuestConsole {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
