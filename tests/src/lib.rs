//! What the tests share: where things are, how `kindling` is run, and tiny guests in machine code.
//!
//! `cargo xtask test` lays out the *testbed*, a folder with the programs, images and kernels of
//! the tests, takes it to where there is a KVM, and names it in `KINDLING_TESTBED`.

pub mod conversation;
pub mod io_uring;
pub mod machine_code;
pub mod network;
pub mod terminal;
pub mod user;
pub mod vsock;

use std::fmt;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

/// No test waits longer for a guest: what has not ended by then hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// How often a test does what is worth doing often: so many times, or as often as `KINDLING_ROUNDS` says.
///
/// # Panics
/// When that is no number.
#[must_use]
pub fn rounds(usual: u32) -> u32 {
    std::env::var("KINDLING_ROUNDS")
        .map_or(usual, |text| text.parse().expect("KINDLING_ROUNDS is no number of rounds"))
}

/// Prints a line about a long test at once, which the harness would collect until its end.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// A file or folder of the testbed.
///
/// # Panics
/// Outside `cargo xtask test`, and for what is not there.
#[must_use]
pub fn testbed(name: &str) -> PathBuf {
    let Some(testbed) = std::env::var_os("KINDLING_TESTBED") else {
        panic!("KINDLING_TESTBED is not set: these tests are run by `cargo xtask test`");
    };
    let path = PathBuf::from(testbed).join(name);
    assert!(path.exists(), "the testbed has no {name}");
    path
}

/// The `kindling` command.
#[must_use]
pub fn kindling() -> Command {
    Command::new(testbed("kindling"))
}

/// `kindling boot` of the image with busybox, without input.
#[must_use]
pub fn boot() -> Command {
    let mut command = kindling();
    command.arg("boot").arg("--image").arg(testbed("images/busybox")).stdin(Stdio::null());
    command
}

/// A copy of an image, whose kernel can be pre-booted without other tests using it.
#[derive(Debug)]
pub struct Image(tempfile::TempDir);

impl Image {
    /// Copies an image of the testbed.
    ///
    /// # Panics
    /// When it cannot be copied.
    #[must_use]
    pub fn copy_of(name: &str) -> Self {
        let image = Self(tempfile::tempdir().expect("cannot make a folder"));
        for entry in std::fs::read_dir(testbed("images").join(name)).expect("cannot read the image") {
            let entry = entry.expect("cannot read the image");
            std::fs::copy(entry.path(), image.path().join(entry.file_name())).expect("cannot copy the image");
        }
        image
    }

    /// Its folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// A command of `kindling` for this image, without input.
    #[must_use]
    pub fn command(&self, name: &str) -> Command {
        let mut command = kindling();
        command.arg(name).arg("--image").arg(self.path()).stdin(Stdio::null());
        command
    }

    /// Pre-boots the kernel; the file.
    ///
    /// # Panics
    /// When that fails.
    #[track_caller]
    #[must_use]
    pub fn preboot(&self, vcpus: &str, memory: &str) -> PathBuf {
        let outcome = run(self.command("preboot").args(["--vcpus", vcpus, "--memory", memory]));
        let file = self.path().join(format!("preboot/{vcpus}-{memory}"));
        outcome.expect_status(0).expect_stderr(&format!("{} is there", file.display()));
        assert_eq!(outcome.stdout, "", "{outcome}");
        file
    }

    /// Runs a shell script in a guest that must continue from the pre-booted kernel.
    ///
    /// # Panics
    /// When the guest boots.
    #[track_caller]
    #[must_use]
    pub fn continued_shell(&self, options: &[&str], script: &str) -> Outcome {
        let report = self.path().join("report.json");
        let mut command = self.command("boot");
        command.args(options).arg("--report-json").arg(&report);
        let outcome = run(command.args(["--", "/bin/sh", "-c", script]));
        assert!(has_continued(&report), "it booted: {outcome}");
        assert!(!outcome.stderr.contains("preboot"), "{outcome}");
        outcome
    }
}

/// Whether a guest continued from a pre-booted kernel, by the report of its boot.
///
/// # Panics
/// When there is no report.
#[must_use]
pub fn has_continued(report: &Path) -> bool {
    std::fs::read_to_string(report).expect("no report").contains("pre-booted kernel loaded")
}

/// Boots the default image without a payload and checks init's greeting.
///
/// # Panics
/// When the greeting says something else.
#[track_caller]
pub fn expect_greeting(vcpus: u32, memory_mib: u32) {
    let outcome = run(kindling()
        .args(["boot", "--vcpus", &vcpus.to_string(), "--memory", &memory_mib.to_string(), "--image"])
        .arg(testbed("images/default"))
        .stdin(Stdio::null()));
    outcome.expect_status(0);
    let words: Vec<&str> = outcome.stdout.split_whitespace().collect();
    let position = |word: &str| words.iter().position(|w| *w == word).unwrap_or_else(|| panic!("{outcome}"));
    assert_eq!(words[position("on") + 1], vcpus.to_string(), "{outcome}");
    // The kernel keeps a part of the memory for itself: about 16 MiB and 2 % of the whole.
    let usable: u32 = words[position("usable,") - 2].parse().expect("no number");
    assert!(usable < memory_mib && usable > memory_mib - memory_mib / 40 - 24, "{outcome}");
    assert_eq!(outcome.stdout.lines().count(), 1, "a quiet kernel says nothing: {outcome}");
    assert_eq!(outcome.stderr, "", "{outcome}");
}

/// How a program ended, and what it said.
#[derive(Debug)]
pub struct Outcome {
    /// Exit status; `None` when a signal killed it.
    pub status: Option<i32>,
    /// Standard output without carriage returns.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "status {:?}\nstdout:\n{}\nstderr:\n{}", self.status, self.stdout, self.stderr)
    }
}

impl Outcome {
    /// Checks the exit status.
    ///
    /// # Panics
    /// With everything the program said, when it is another.
    #[track_caller]
    pub fn expect_status(&self, status: i32) -> &Self {
        assert_eq!(self.status, Some(status), "{self}");
        self
    }

    /// Checks that standard error has this text.
    ///
    /// # Panics
    /// With everything the program said, when it has not.
    #[track_caller]
    pub fn expect_stderr(&self, text: &str) -> &Self {
        assert!(self.stderr.contains(text), "standard error should have {text:?}; {self}");
        self
    }

    /// Expects text on standard output.
    ///
    /// # Panics
    /// When it is not there.
    pub fn expect_stdout(&self, text: &str) -> &Self {
        assert!(self.stdout.contains(text), "standard output should have {text:?}; {self}");
        self
    }
}

/// A program that runs, with its output being collected.
#[derive(Debug)]
pub struct Started {
    /// The process.
    pub child: Child,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
}

fn collect(stream: Option<impl Read + Send + 'static>) -> Option<JoinHandle<Vec<u8>>> {
    let mut stream = stream?;
    Some(std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        bytes
    }))
}

/// Starts a program whose output is collected.
///
/// # Panics
/// When it cannot be started.
#[must_use]
pub fn start(command: &mut Command) -> Started {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("cannot start");
    let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
    Started { child, stdout, stderr }
}

impl Started {
    /// Waits for the program's end.
    ///
    /// # Panics
    /// When it takes longer than `limit`; the program is killed then.
    #[track_caller]
    #[must_use]
    pub fn finish_within(mut self, limit: Duration) -> Outcome {
        let pid = self.child.id();
        let (tell, told) = mpsc::channel();
        let waiter = std::thread::spawn(move || {
            let status = self.child.wait().expect("cannot wait");
            let _ = tell.send(());
            (status, self.stdout, self.stderr)
        });
        let in_time = told.recv_timeout(limit).is_ok();
        if !in_time {
            kill(pid, libc::SIGKILL);
        }
        let (status, stdout, stderr) = waiter.join().expect("the waiting thread panicked");
        let text = |thread: Option<JoinHandle<Vec<u8>>>| {
            let bytes = thread.map(|thread| thread.join().expect("the reading thread panicked"));
            String::from_utf8_lossy(&bytes.unwrap_or_default()).replace('\r', "")
        };
        let outcome = Outcome { status: status.code(), stdout: text(stdout), stderr: text(stderr) };
        assert!(in_time, "it did not end within {limit:?}; {outcome}");
        outcome
    }

    /// Sends a signal to the program.
    pub fn signal(&self, signal: i32) {
        kill(self.child.id(), signal);
    }
}

/// Sends a signal to a process of a test's.
///
/// # Panics
/// When the number is none of a process.
#[expect(unsafe_code, reason = "kill has no safe wrapper in std")]
pub fn kill(pid: u32, signal: i32) {
    let pid = i32::try_from(pid).expect("a process id");
    // SAFETY: kill has no memory effects; the process is a test's own and has not ended.
    unsafe { libc::kill(pid, signal) };
}

/// Runs a program to its end.
///
/// # Panics
/// When it hangs.
#[track_caller]
#[must_use]
pub fn run(command: &mut Command) -> Outcome {
    start(command).finish_within(PATIENCE)
}
