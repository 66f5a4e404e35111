//! A guest that is talked with: it says a line when it has come so far, and is told to go on.

use crate::PATIENCE;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What a script in the guest begins with, so that it does not repeat what it is told. `heard` waits for a line.
pub const PREAMBLE: &str = "stty -echo; heard() { read -r line; };";

/// A running guest with its console.
#[derive(Debug)]
pub struct Conversation {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
    errors: Option<JoinHandle<String>>,
    /// All that it has said.
    said: Vec<String>,
}

impl Conversation {
    /// Starts a guest.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(command: &mut Command) -> Self {
        let streams = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = streams.spawn().expect("cannot start");
        let (tell, lines) = mpsc::channel();
        let output = child.stdout.take().expect("no standard output");
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                if tell.send(line).is_err() {
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
        Self { input: child.stdin.take(), child, lines, errors: Some(errors), said: Vec::new() }
    }

    /// Waits for a line that starts with this; what follows in it.
    ///
    /// # Panics
    /// With all that was said, when it does not come.
    #[track_caller]
    pub fn expect(&mut self, start: &str) -> String {
        self.hear(start, PATIENCE).unwrap_or_else(|| {
            panic!("the guest does not say {start:?} but\n{}\n{}", self.said.join("\n"), self.end())
        })
    }

    /// The same; nothing when it does not come so soon.
    fn hear(&mut self, start: &str, limit: Duration) -> Option<String> {
        let until = Instant::now() + limit;
        loop {
            let line = self.lines.recv_timeout(until.saturating_duration_since(Instant::now())).ok()?;
            self.said.push(line.clone());
            if let Some(rest) = line.strip_prefix(start) {
                return Some(rest.trim().to_owned());
            }
        }
    }

    /// Tells the guest to go on.
    ///
    /// # Panics
    /// When it has ended.
    pub fn go_on(&mut self) {
        self.input.as_mut().and_then(|input| writeln!(input, "on").ok()).expect("the guest has ended");
    }

    /// KiB of memory that the VMM has, of the host's and of files.
    ///
    /// # Panics
    /// When it has ended.
    #[must_use]
    pub fn rss_kib(&self) -> u64 {
        let status = std::fs::read_to_string(self.process().join("status")).expect("the VMM has ended");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("no VmRSS");
        line.trim().trim_end_matches(" kB").parse().expect("no number")
    }

    /// Sends the VMM a signal.
    pub fn signal(&self, signal: i32) {
        crate::kill(self.child.id(), signal);
    }

    /// The process of the VMM, by its folder in /proc: the command itself, or the monitor that it has started.
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

    /// The sections of /proc/PID/smaps whose mapping is of a file with this name, as text.
    ///
    /// # Panics
    /// When it has ended.
    #[must_use]
    pub fn smaps_of(&self, file: &str) -> Vec<String> {
        let smaps = std::fs::read_to_string(self.process().join("smaps")).expect("the VMM has ended");
        let is_head = |line: &str| line.split_once(' ').is_some_and(|(range, _)| range.contains('-'));
        let mut sections: Vec<String> = Vec::new();
        for line in smaps.lines() {
            if is_head(line) {
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

    /// Waits until something is so that nobody reports.
    ///
    /// # Panics
    /// When it does not become so.
    #[track_caller]
    pub fn wait_until(&self, what: &str, mut is_so: impl FnMut(&Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !is_so(self) {
            assert!(Instant::now() < until, "{what}: not within {PATIENCE:?}; {} KiB", self.rss_kib());
            // Nothing reports it; the guest needs the processor to get there.
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits for the guest's end.
    ///
    /// # Panics
    /// When it does not end with this status.
    #[track_caller]
    pub fn expect_status(self, status: i32) {
        drop(self.expect_end(&format!("exit status: {status}")));
    }

    /// Waits for the guest's end, which may also be a signal; what it said on standard error.
    ///
    /// # Panics
    /// When it ends in another way.
    #[track_caller]
    pub fn expect_end(mut self, end: &str) -> String {
        let until = Instant::now() + PATIENCE;
        // Its output ends with it.
        while let Ok(line) = self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            self.said.push(line);
        }
        let text = self.said.join("\n");
        while self.child.try_wait().is_ok_and(|status| status.is_none()) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        let seen = self.end();
        let (how, errors) = seen.split_once('\n').unwrap_or_default();
        assert!(how.starts_with(end), "{seen}\n{text}");
        errors.to_owned()
    }

    /// Ends it if it has not ended; how it did, and what it said on standard error.
    fn end(&mut self) -> String {
        self.input = None;
        let ended: Option<ExitStatus> = self.child.try_wait().ok().flatten();
        let status = ended.or_else(|| {
            let _ = self.child.kill();
            self.child.wait().ok()
        });
        let errors = self.errors.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        format!("{}\n{errors}", status.map_or_else(|| "lost".to_owned(), |status| status.to_string()))
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
